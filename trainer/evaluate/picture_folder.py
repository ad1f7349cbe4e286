"""A folder of pictures in place of a policy's samples: a row of a table for what the policy learnt from.

Shape legend: N pictures of the folder · B of a chunk · S side in pixels.
"""

import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from services.images import FORMATS, BodyError, decode_picture
from services.protocol import Limits
from trainer.config import ConfigError
from trainer.inference.labels import parse_labels

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
UNLABELLED = -1
LIMITS = Limits(max_pixels=100_000_000, max_body_bytes=300_000_000)
WORDNET_ID = re.compile(r"n\d{8}")


class PictureError(RuntimeError):
    """A picture cannot be read; the message names it."""


@dataclass(frozen=True)
class PictureFolder:
    """Pictures and their labels, in the order of their paths.

    Args:
        folder: where they are.
        files: N paths.
        labels_N: int64, `UNLABELLED` for pictures that lie in the folder itself.
        side: S, to which they are brought.
    """

    folder: Path
    files: tuple[Path, ...]
    labels_N: NDArray[np.int64]
    side: int

    def digest(self) -> str:
        """SHA-256 over the pictures' paths, sizes, times and labels, and the side, in hexadecimal."""
        digest = hashlib.sha256(f"{self.side}".encode())
        for file, label in zip(self.files, self.labels_N, strict=True):
            status = file.stat()
            digest.update(f"{file.relative_to(self.folder)} {status.st_size} {status.st_mtime_ns} {label}\n".encode())
        return digest.hexdigest()

    def read(self, places: Sequence[int]) -> NDArray[np.uint8]:
        """Some of the pictures, uint8 (B, S, S, 3): the shorter side resized to S, then the middle.

        Raises:
            PictureError: one cannot be read.
        """
        return np.stack([_square(_decode(self.files[place]), self.side) for place in places])


def open_pictures(
    folder: Path, *, count: int, names: tuple[str, ...], side: int | None, labels: Sequence[int] | None
) -> PictureFolder:
    """Finds the pictures of a folder.

    Args:
        folder: its sub-folders are named for labels, by index or name; or there are as many, named by WordNet's ids as
            ImageNet's are, as there are labels, and their order is the labels'.
        count: of labels; 0 where nobody knows them: then any names will do, and tell the labels apart.
        names: of labels; none where they have none.
        side: to which they are brought; None leaves them as they are, if they are squares of one size.
        labels: take pictures of these alone; None for all.

    Raises:
        ConfigError: there are none, one is no picture or too large, a sub-folder is named for no label, or nobody says
            the size.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise ConfigError(f"--images {folder}: holds no picture; name a folder of {', '.join(SUFFIXES)} files")
    of_folder = _folder_labels(folder, files, count, names)
    labels_N = np.array([of_folder[file.relative_to(folder).parts[0]] if file.parent != folder else UNLABELLED
                         for file in files], dtype=np.int64)  # fmt: skip
    if labels is not None:
        kept = [place for place, label in enumerate(labels_N) if label in set(labels)]
        files, labels_N = [files[place] for place in kept], labels_N[kept]
        if not files:
            raise ConfigError(f"--images {folder}: holds no picture of the labels of --labels")
    sizes = _sizes(files)
    return PictureFolder(folder, tuple(files), labels_N, side or _common_side(files, sizes))


def _folder_labels(folder: Path, files: Sequence[Path], count: int, names: tuple[str, ...]) -> dict[str, int]:
    """The label of each sub-folder that holds pictures."""
    below = sorted({file.relative_to(folder).parts[0] for file in files if file.parent != folder})
    if not count and not all(name.isdecimal() for name in below):
        return {name: label for label, name in enumerate(below)}
    if not count:
        return {name: int(name) for name in below}
    if len(below) == count and all(WORDNET_ID.fullmatch(name) for name in below):
        return {name: label for label, name in enumerate(below)}
    return {name: parse_labels(name, count, names, f"--images {folder}")[0] for name in below}


def _sizes(files: Sequence[Path]) -> list[tuple[int, int]]:
    """Width and height of each picture, by its header alone: most that cannot be read are found before any work."""
    sizes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours
        for file in files:
            try:
                with Image.open(file, formats=FORMATS) as picture:
                    sizes.append(picture.size)
                is_too_large = picture.width * picture.height > LIMITS.max_pixels
            except Image.DecompressionBombError:
                is_too_large = True
            except Exception as error:  # on hostile bytes a decoder fails in any way; all mean the same
                reason = getattr(error, "strerror", None) or f"it is none of {', '.join(FORMATS)}"
                raise ConfigError(f"{file}: no picture ({reason}); mend it, or take it out of the folder") from error
            if is_too_large:
                raise ConfigError(
                    f"{file} has more than {LIMITS.max_pixels:,} pixels; make it smaller, or take it out of the folder"
                )
    return sizes


def _common_side(files: Sequence[Path], sizes: Sequence[tuple[int, int]]) -> int:
    side = sizes[0][0]
    for file, (width, height) in zip(files, sizes, strict=True):
        if (width, height) != (side, side):
            raise ConfigError(f"{file} is {width}×{height}, the pictures differ: give --size PIXELS")
    return side


def _decode(file: Path) -> NDArray[np.uint8]:
    try:
        return decode_picture(file.read_bytes(), 0, LIMITS, room_bytes=LIMITS.max_body_bytes)
    except (BodyError, OSError) as error:
        raise PictureError(f"{file}: {error}; mend it, or take it out of the folder") from error


def _square(image_HW3: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    height, width, _ = image_HW3.shape
    if (height, width) == (side, side):
        return image_HW3
    scale = side / min(height, width)
    wide, high = max(side, round(width * scale)), max(side, round(height * scale))
    resized = Image.fromarray(image_HW3).resize((wide, high), Image.Resampling.BICUBIC)  # antialiased
    left, top = (wide - side) // 2, (high - side) // 2
    return np.asarray(resized.crop((left, top, left + side, top + side)))
