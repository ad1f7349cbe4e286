"""The miniature's rule of beauty: a rating from 1 to 10 that follows from the pixels alone.

It plays the part that people's votes play for the LAION predictor: colourful, contrasty, well exposed pictures are
rated high; grey, flat, murky or washed-out ones low. Shape legend: B images · H, W pixels.
"""

import numpy as np
from numpy.typing import NDArray

from trainer.miniature.render import LUMA

FULL_COLOUR = 109.0  # "extremely colourful" on the scale of Hasler and Süsstrunk
FULL_CONTRAST = 0.20
SHARES = (0.5, 0.3, 0.2)  # of colour, contrast, exposure
LOWEST, HIGHEST = 1.0, 10.0

Images = NDArray[np.uint8]
Values = NDArray[np.float64]


def colourfulness(images_BHW3: Images) -> Values:
    """Colourfulness M^(3) of uint8 images, (B,), from 0 to about 190 (Hasler and Süsstrunk 2003, eq. 19)."""
    red, green, blue = (images_BHW3[..., channel].astype(np.float64) for channel in range(3))
    rg, yb = red - green, (red + green) / 2 - blue
    spread = np.hypot(rg.std(axis=(1, 2)), yb.std(axis=(1, 2)))
    values: Values = spread + 0.3 * np.hypot(rg.mean(axis=(1, 2)), yb.mean(axis=(1, 2)))
    return values


def contrast(images_BHW3: Images) -> Values:
    """RMS contrast: the standard deviation of the luma of uint8 images, (B,) in [0, 0.5]."""
    values: Values = (images_BHW3 / 255.0 @ LUMA).std(axis=(1, 2))
    return values


def exposure(images_BHW3: Images) -> Values:
    """1 for a mean luma of one half, falling to 0 for black and for white, (B,)."""
    values: Values = 1 - np.abs((images_BHW3 / 255.0 @ LUMA).mean(axis=(1, 2)) - 0.5) / 0.5
    return values


def rating(images_BHW3: Images) -> Values:
    """Rating of uint8 images (B, H, W, 3): float64 (B,) from 1 to 10."""
    colour_B = np.minimum(colourfulness(images_BHW3) / FULL_COLOUR, 1)
    contrast_B = np.minimum(contrast(images_BHW3) / FULL_CONTRAST, 1)
    parts = (colour_B, contrast_B, exposure(images_BHW3))
    share_B = sum(share * part for share, part in zip(SHARES, parts, strict=True))
    return np.asarray(LOWEST + (HIGHEST - LOWEST) * share_B, dtype=np.float64)
