"""Grids of images as PNG files. Shape legend: B images · H, W pixels."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def save_grid(path: Path, images_BHW3: NDArray[np.uint8], *, columns: int, zoom: int = 1) -> None:
    """Writes uint8 images (B, H, W, 3) row by row on a white ground, each `zoom` times enlarged."""
    count, height, width, _ = images_BHW3.shape
    rows, gap = -(-count // columns), 2
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for index, image in enumerate(images_BHW3):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image
    picture = Image.fromarray(canvas)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(path, optimize=True)
