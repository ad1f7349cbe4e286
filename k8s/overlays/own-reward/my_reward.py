"""A reward of one's own: the share of blue in a picture, from 0 to 1."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class MyReward:
    """Mean of the blue channel divided by 255."""

    name = "my-reward"
    version = "1"

    def score(self, images_BHWC: NDArray[np.uint8], prompts: Sequence[str] | None) -> NDArray[np.float64]:
        """Score uint8 images (B, H, W, 3); the result is (B,)."""
        return images_BHWC[..., 2].mean(axis=(1, 2), dtype=np.float64) / 255
