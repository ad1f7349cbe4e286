"""Whether a picture is painted, by its pixels alone: what tells the renderer's paintings from its other styles.

The ground of a painting is broad strokes, that of a photo or an old picture a smooth gradient, that of a sketch blank
paper. No network looks, so none can be misled. Shape legend: B images · H, W pixels · P pixels of the frame.
"""

import numpy as np
from numpy.typing import NDArray

from trainer.miniature.rating import colourfulness
from trainer.miniature.render import LUMA

FRAME = 5  # pixels from the edge: mostly ground
RELIEF = 0.025  # luma; by it and by COLOUR a test tells held-out renders apart
COLOUR = 25.0  # of `colourfulness`: what is drawn in pencil or printed in sepia has less


def ground_relief(images_BHW3: NDArray[np.uint8]) -> NDArray[np.float64]:
    """How far the ground is from smooth: in luma, float64 (B,) in [0, 1].

    The median distance of the frame's pixels from the quadratic surface that fits them best; the median, for where the
    object reaches into the frame it is no ground.

    Args:
        images_BHW3: uint8 (B, H, W, 3), H and W above 2 · `FRAME`.
    """
    height, width = images_BHW3.shape[1:3]
    inside = np.zeros((height, width), dtype=bool)
    inside[FRAME:-FRAME, FRAME:-FRAME] = True
    y_P, x_P = ((np.argwhere(~inside) / (height - 1, width - 1)) * 2 - 1).T
    surface_P6 = np.stack([np.ones_like(x_P), x_P, y_P, x_P * x_P, y_P * y_P, x_P * y_P], axis=1)
    luma_BP = images_BHW3[:, ~inside] / 255.0 @ LUMA
    fitted_BP = luma_BP @ np.linalg.pinv(surface_P6).T @ surface_P6.T
    relief_B: NDArray[np.float64] = np.median(np.abs(luma_BP - fitted_BP), axis=1)
    return relief_B


def is_painted(images_BHW3: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether each of uint8 images (B, H, W, 3) has a ground of strokes, and colour; bool (B,)."""
    return (ground_relief(images_BHW3) >= RELIEF) & (colourfulness(images_BHW3) >= COLOUR)
