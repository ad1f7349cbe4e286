"""Rewards that misbehave, for tests: `tests.services.dummies:NAME`."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from services.rewards.brightness import Brightness

POISON = 255
"""The value of the first byte of an image that makes `Picky` raise and `Deadly` kill its process."""
FOLDER_VARIABLE = "DUMMY_FOLDER"


class Nan(Brightness):
    """Gives no number for images whose first byte is `POISON`."""

    name = "nan"

    def score(self, images_BHWC: NDArray[np.uint8], prompts: Sequence[str] | None) -> NDArray[np.float64]:
        scores_B = super().score(images_BHWC, prompts)
        scores_B[images_BHWC[:, 0, 0, 0] == POISON] = np.nan
        return scores_B


class Short(Brightness):
    """Gives one score too few."""

    name = "short"

    def score(self, images_BHWC: NDArray[np.uint8], prompts: Sequence[str] | None) -> NDArray[np.float64]:
        return super().score(images_BHWC, prompts)[1:]


class Picky(Brightness):
    """Raises on a batch with a poisoned image."""

    name = "picky"

    def score(self, images_BHWC: NDArray[np.uint8], prompts: Sequence[str] | None) -> NDArray[np.float64]:
        if (images_BHWC[:, 0, 0, 0] == POISON).any():
            raise RuntimeError("poison")
        return super().score(images_BHWC, prompts)


class Slow(Brightness):
    """Takes its time."""

    name = "slow"
    seconds = 0.3

    def score(self, images_BHWC: NDArray[np.uint8], prompts: Sequence[str] | None) -> NDArray[np.float64]:
        time.sleep(self.seconds)
        return super().score(images_BHWC, prompts)


class Counting(Brightness):
    """Remembers the sizes of its batches."""

    name = "counting"

    def __init__(self) -> None:
        self.batches: list[int] = []

    def score(self, images_BHWC: NDArray[np.uint8], prompts: Sequence[str] | None) -> NDArray[np.float64]:
        self.batches.append(len(images_BHWC))
        return super().score(images_BHWC, prompts)


class HangsOnce(Brightness):
    """Hangs in the first process that scores, after it has written its pid down; scores in any later one."""

    name = "hangs-once"

    def score(self, images_BHWC: NDArray[np.uint8], prompts: Sequence[str] | None) -> NDArray[np.float64]:
        pid_file = Path(os.environ[FOLDER_VARIABLE]) / "pid"
        if not pid_file.exists():
            pid_file.write_text(str(os.getpid()))
            time.sleep(600)
        return super().score(images_BHWC, prompts)


class Chatty(Brightness):
    """Prints while it loads and while it scores, as libraries do."""

    name = "chatty"

    def warmup(self) -> None:
        print("Loading weights ...", flush=True)
        print('{"step": 1}', flush=True)

    def score(self, images_BHWC: NDArray[np.uint8], prompts: Sequence[str] | None) -> NDArray[np.float64]:
        print("x" * 200_000, flush=True)
        return super().score(images_BHWC, prompts)


class SlowWarm(Brightness):
    """Takes ten minutes to load."""

    name = "slow-warm"

    def warmup(self) -> None:
        time.sleep(600)


class NoWeights(Brightness):
    """Does not find its weights."""

    name = "no-weights"

    def warmup(self) -> None:
        raise FileNotFoundError("/weights/none.safetensors: no such file")


class Nameless:
    """Is not a reward."""


class Deadly(Brightness):
    """Kills its process on a poisoned image."""

    name = "deadly"

    def score(self, images_BHWC: NDArray[np.uint8], prompts: Sequence[str] | None) -> NDArray[np.float64]:
        if (images_BHWC[:, 0, 0, 0] == POISON).any():
            os._exit(9)
        return super().score(images_BHWC, prompts)
