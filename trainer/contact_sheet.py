"""Samples of one or more policies as PNG files that hold the settings they were drawn by.

A sheet has a panel for each policy, side by side; in each, a row a label and a column a seed, the same in all.
Shape legend: B images of a panel · H, W pixels.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from trainer.config import ConfigError
from trainer.pictures import save_png

SETTINGS = "settings"
"""The PNG's text that holds the settings as JSON."""
GAP, MARGIN, BETWEEN = 2, 4, 12  # pixels between images, around all, between panels
GROUND, BLACK = (225, 225, 225), (0, 0, 0)  # grey, so that a bright picture has an edge


@dataclass(frozen=True)
class Panel:
    """Samples of one policy.

    Args:
        name: of the policy.
        images_BHW3: uint8 (B, H, W, 3), row after row.
        keys: B times (label, seed, index).
        rows: the name of each row.
        about: what the policy is, as plain texts.
    """

    name: str
    images_BHW3: NDArray[np.uint8]
    keys: Sequence[tuple[int, int, int]]
    rows: Sequence[str]
    about: Mapping[str, str]


def join(parts: Sequence[Panel]) -> Panel:
    """The samples of a policy, put together from parts that follow one another."""
    images_BHW3 = np.concatenate([part.images_BHW3 for part in parts])
    return replace(parts[0], images_BHW3=images_BHW3, keys=[key for part in parts for key in part.keys])


def check_size(rows: int, columns: int, side: int, most: int) -> None:
    """Refuse a sheet that nobody could look at, before it is drawn.

    Raises:
        ConfigError: it has more than `most` pixels.
    """
    if rows * columns * side * side > most:
        raise ConfigError(
            f"{rows} × {columns} images of {side}×{side} are {rows * columns * side * side:,} pixels, "
            f"more than {most:,}: name fewer --labels or --seeds, lower --zoom, or give a folder as --out"
        )


def save_sheet(path: Path, panels: Sequence[Panel], settings: Mapping[str, object], *, zoom: int = 1) -> None:
    """Writes the panels as one picture.

    Args:
        path: of the PNG.
        panels: of equally many rows and columns.
        settings: kept in the PNG, with what the panels are.
        zoom: how many times each pixel is repeated.

    Raises:
        CheckpointError: it cannot be written.
    """
    side = panels[0].images_BHW3.shape[1] * zoom
    font = ImageFont.load_default(size=max(11, min(28, side // 8)))
    line = int(font.getbbox("Ag")[3]) + 4
    rows, columns = len(panels[0].rows), len(panels[0].images_BHW3) // len(panels[0].rows)
    left = MARGIN + max(int(font.getlength(name)) for name in panels[0].rows) + 6
    wide = columns * (side + GAP) - GAP
    top = MARGIN + line
    size = (left + len(panels) * (wide + BETWEEN) - BETWEEN + MARGIN, top + rows * (side + GAP) - GAP + MARGIN)
    sheet = Image.new("RGB", size, GROUND)
    pen = ImageDraw.Draw(sheet)
    for row, name in enumerate(panels[0].rows):
        pen.text((MARGIN, top + row * (side + GAP) + (side - line) // 2), name, BLACK, font)
    for place, panel in enumerate(panels):
        begin = left + place * (wide + BETWEEN)
        pen.text((begin, MARGIN), _fitting(panel.name, wide, font), BLACK, font)
        for index, image_HW3 in enumerate(panel.images_BHW3):
            picture = Image.fromarray(image_HW3).resize((side, side), Image.Resampling.NEAREST)
            row, column = divmod(index, columns)
            sheet.paste(picture, (begin + column * (side + GAP), top + row * (side + GAP)))
    keys = [list(key) for key in panels[0].keys]
    models = [{"name": panel.name, **panel.about} for panel in panels]
    _write(path, sheet, {**settings, "models": models, "label_seed_index": keys})


def check_names(names: Sequence[str]) -> None:
    """Refuse models whose files would have the same names, before anything is drawn.

    Raises:
        ConfigError: there are two such.
    """
    files = [_file_name(name) for name in names]
    twice = next((file for file in files if files.count(file) > 1), None)
    if twice is not None:
        raise ConfigError(f"the files of two models would be named {twice}_….png: tell them apart by NAME=MODEL")


def _file_name(model: str) -> str:
    return re.sub(r"[^\w@.-]+", "-", model)


def save_images(folder: Path, panel: Panel, settings: Mapping[str, object]) -> None:
    """Writes each image to `MODEL_LABEL_seedS_I.png` in a folder, with its settings; `check_names` comes first.

    Args:
        folder: is made where it is missing.
        panel: all samples of a policy, or some.
        settings: kept in each PNG, with what the image is.

    Raises:
        CheckpointError: one cannot be written.
    """
    for image_HW3, (label, seed, index) in zip(panel.images_BHW3, panel.keys, strict=True):
        own = {"models": [{"name": panel.name, **panel.about}], "label_seed_index": [[label, seed, index]]}
        file = folder / f"{_file_name(panel.name)}_{label:04d}_seed{seed}_{index}.png"
        _write(file, Image.fromarray(image_HW3), {**settings, **own})


def _fitting(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of a text as there is room for."""
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2] + "…"
    return text


def _write(path: Path, picture: Image.Image, settings: Mapping[str, object]) -> None:
    info = PngInfo()
    info.add_text(SETTINGS, json.dumps(settings, allow_nan=False))
    save_png(path, picture, info)
