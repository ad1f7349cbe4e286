"""Rewards that misbehave, for tests: `tests.services.dummies:NAME`."""

import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from services.rewards.base import UnfitImage
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


class Choosy(Brightness):
    """Has no score without a prompt."""

    name, uses_prompts, needs_prompts, scale = "choosy", True, True, "made for a test"


class Secretive(Brightness):
    """Cannot be loaded, and says too much about it."""

    name = "secretive"

    def warmup(self) -> None:
        raise PermissionError("https://user:hunter2@weights.test")


class Oblong(Brightness):
    """Cannot score the second of several images."""

    name = "oblong"

    def score(self, images_BHWC: NDArray[np.uint8], prompts: Sequence[str] | None) -> NDArray[np.float64]:
        if len(images_BHWC) > 1:
            raise UnfitImage("this one is at fault: leave it out", index=1)
        return super().score(images_BHWC, prompts)


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


class DiesLoading(Brightness):
    """Kills its process while it loads."""

    name = "dies-loading"

    def warmup(self) -> None:
        os._exit(9)


class DiesWhenReady(Brightness):
    """Kills its process as soon as that is ready."""

    name = "dies-when-ready"

    def warmup(self) -> None:
        threading.Timer(0.3, os._exit, [9]).start()


class Drilled(Brightness):
    """Brightness that takes a moment, and does what the first byte of an image says; see `POISONS`.

    Its version is that of the environment, so that two of them can run side by side.
    """

    name = "drilled"
    version = os.environ.get("DRILLED_VERSION", "1")
    seconds = 0.01

    def score(self, images_BHWC: NDArray[np.uint8], prompts: Sequence[str] | None) -> NDArray[np.float64]:
        time.sleep(self.seconds)
        marks = set(images_BHWC[:, 0, 0, 0].tolist())
        scores_B = super().score(images_BHWC, prompts)
        if POISONS["raise"] in marks:
            raise RuntimeError("poison")
        if POISONS["kill"] in marks:
            os._exit(9)
        if POISONS["hang"] in marks:
            time.sleep(600)
        if POISONS["count"] in marks:
            return scores_B[1:]
        scores_B[images_BHWC[:, 0, 0, 0] == POISONS["nan"]] = np.nan
        return scores_B + (0.0 if self.version == "1" else 1.0)


POISONS = {"raise": 255, "kill": 254, "hang": 253, "count": 252, "nan": 251}
"""What the first byte of an image makes `Drilled` do; 250 and less are harmless."""
HARMLESS = 250


class Returns(Brightness):
    """Gives its scores in a form of one's choice, or raises."""

    name = "returns"

    def __init__(self, form: Callable[[NDArray[np.float64]], object]) -> None:
        self.form = form

    def score(self, images_BHWC: NDArray[np.uint8], prompts: Sequence[str] | None) -> NDArray[np.float64]:
        return self.form(super().score(images_BHWC, prompts))  # type: ignore[return-value]


class Stuck(Brightness):
    """Holds the interpreter's lock for as long as the universe lasts."""

    name = "stuck"

    def score(self, images_BHWC: NDArray[np.uint8], prompts: Sequence[str] | None) -> NDArray[np.float64]:
        re.match(r"(a+)+$", "a" * 60 + "b")
        return super().score(images_BHWC, prompts)


class Twin(Brightness):
    """Calls itself what another is called."""
