"""A reward that costs time and no processor: what a GPU is to the queue."""

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from services.rewards.brightness import Brightness

FORWARD_S = 0.05


class Sleeper(Brightness):
    """Sleeps `FORWARD_S` for a batch of any size; the score of an image is its first byte."""

    name = "sleeper"
    low, high = 0.0, 255.0
    scale = "the first byte"

    def score(self, images_BHWC: NDArray[np.uint8], prompts: Sequence[str] | None) -> NDArray[np.float64]:
        """Score uint8 (B, H, W, 3): float64 (B,)."""
        del prompts
        time.sleep(FORWARD_S)
        return images_BHWC[:, 0, 0, 0].astype(np.float64)
