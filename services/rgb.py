"""A decoded picture of any mode as RGB, upright; docs/contract.md has the table of what becomes of each mode."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a picture upright, by its EXIF orientation."""


def to_rgb(picture: Image.Image) -> NDArray[np.uint8]:
    """Turn a decoded picture upright and into RGB.

    Args:
        picture: loaded, of any mode; its EXIF tells how it was held.

    Returns:
        uint8 (H, W, 3), 0–255, of memory of its own that is read-only.
    """
    turn = UPRIGHT.get(_orientation(picture))
    if turn is not None:
        picture = picture.transpose(turn)
    if picture.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion to 8 bits clips it
        grey_HW = np.clip(np.asarray(picture).astype(np.int64), 0, 2**16 - 1) >> 8
        return np.repeat(grey_HW.astype(np.uint8)[:, :, None], 3, axis=2)
    if picture.has_transparency_data:
        colour = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour)
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))  # convert would copy what is RGB


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation; 1, upright, where there is none that can be read."""
    try:
        return int(picture.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - on broken EXIF Pillow fails in any way; the pixels are whole all the same
        return 1
