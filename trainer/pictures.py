"""Images as PNG files, each there whole or not at all. Shape legend: B images · H, W pixels."""

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from trainer.models.checkpoints import write_atomically


def save_grid(path: Path, images_BHW3: NDArray[np.uint8], *, columns: int, zoom: int = 1) -> None:
    """Writes uint8 images (B, H, W, 3) row by row on a white ground, each `zoom` times enlarged.

    Raises:
        CheckpointError: it cannot be written.
    """
    count, height, width, _ = images_BHW3.shape
    rows, gap = -(-count // columns), 2
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for index, image in enumerate(images_BHW3):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image
    picture = Image.fromarray(canvas)
    save_png(path, picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST))


def save_png(path: Path, picture: Image.Image, info: PngInfo | None = None) -> None:
    """Writes a picture, with texts that stand beside its pixels.

    Raises:
        CheckpointError: it cannot be written.
    """
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True, pnginfo=info)
    content = buffer.getvalue()
    write_atomically(path, len(content), lambda temporary: temporary.write_bytes(content))
