"""A reward in a few lines: the smaller a picture's JPEG, the better."""

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image


class JpegCompressibility:
    """Minus the size of each image as a JPEG of quality 95, in kB of 1000 bytes (arXiv 2305.13301)."""

    def score(self, images_BHWC: NDArray[np.uint8], prompts: Sequence[str] | None) -> list[float]:
        files = [io.BytesIO() for _ in images_BHWC]
        for image_HWC, file in zip(images_BHWC, files, strict=True):
            Image.fromarray(image_HWC).save(file, format="JPEG", quality=95)
        return [-file.getbuffer().nbytes / 1000 for file in files]
