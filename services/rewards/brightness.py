"""Brightness: the mean luma of an image.

Shape suffixes: B images of a batch, H height and W width in pixels, C = 3 channels (RGB).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LUMA_C = (0.2989, 0.5870, 0.1140)
"""Weights of R, G and B; they sum to a little less than 1."""


class Brightness:
    """Mean of 0.2989 R + 0.5870 G + 0.1140 B over the pixels, with channels in [0, 1] (arXiv 2505.23331, §4)."""

    name = "brightness"
    version = "1"
    low: float | None = 0.0
    high: float | None = sum(LUMA_C)
    higher_is_better = True
    uses_prompts = False
    needs_prompts = False
    scale = "mean luma, from 0 for black to nearly 1 for white"

    def warmup(self) -> None:
        """Nothing to load."""

    def score(self, images_BHWC: NDArray[np.uint8], prompts: Sequence[str] | None) -> NDArray[np.float64]:
        """Score a batch.

        Args:
            images_BHWC: uint8 (B, H, W, 3), 0–255.
            prompts: not used.

        Returns:
            float64 (B,) in [0, 0.9999].
        """
        del prompts
        _, height, width, _ = images_BHWC.shape
        # The sum over pixels is exact in integers, and so the same in any batch; the weights come last. Columns first:
        # the inner loop then runs along memory, many times faster than over all pixels at once.
        sums_BC = images_BHWC.sum(axis=1, dtype=np.uint32).sum(axis=1, dtype=np.int64)
        red_B, green_B, blue_B = (sums_BC[:, channel].astype(np.float64) for channel in range(3))
        luma_B: NDArray[np.float64] = LUMA_C[0] * red_B + LUMA_C[1] * green_B + LUMA_C[2] * blue_B
        luma_B /= 255.0 * height * width
        return luma_B
