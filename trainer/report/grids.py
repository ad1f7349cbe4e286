"""The grids of samples that a run saves: cut into cells, and put together anew as strips and galleries.

Shape legend: S seeds (rows of a grid) · L labels (its columns) · H, W pixels of a sample, of one size.
"""

import base64
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.evaluation import GRID_COLUMNS, GRID_ROWS
from trainer.inference.labels import label_names
from trainer.report.files import FileError
from trainer.report.runs import Group, Run

GAP = 2  # pixels between the samples of a grid, as trainer/pictures.py draws them
BLOCK_GAP = 6
WRAP = 8  # labels side by side in a gallery
LARGEST = 128  # pixels a side; larger samples are made smaller
STRIPS = ((6, 12), (4, 12), (4, 8), (3, 6), (2, 4), (1, 2))
"""Labels and steps of the strips, from what one would like to see to what always fits."""
GALLERIES = ((16, 4), (16, 2), (8, 2), (8, 1), (4, 1), (2, 1))
"""Labels and seeds of a gallery, likewise."""
ROOM = 1060  # CSS pixels of the page's width
MOST_RUNS = 4  # whose last samples are shown

Cells = NDArray[np.uint8]


@dataclass(frozen=True)
class Grid:
    """A grid: the step after which it was drawn, and its samples, uint8 (S, L, H, W, 3), at most `LARGEST` a side."""

    step: int
    cells_SLHW3: Cells


@dataclass(frozen=True)
class Drawn:
    """Some of the grids of a run, how many it saved, and how many pixels a side its samples have."""

    grids: list[Grid]
    saved: int
    side: int


@dataclass(frozen=True)
class Picture:
    """A PNG for the page, its size in CSS pixels, and what it shows in words."""

    uri: str
    width: int
    height: int
    alt: str


@dataclass(frozen=True)
class Strips:
    """The same labels and seed across training: a row a label, a picture a step; and what was left out of it."""

    steps: list[int]
    rows: list[tuple[str, list[Picture]]]
    left_out: str


@dataclass(frozen=True)
class Gallery:
    """Samples before and after: titles and pictures; the labels, in order; rows of seeds; what was left out."""

    pictures: list[tuple[str, Picture]]
    labels: str
    seeds: int
    left_out: str


def read_grids(run: Run, most: int) -> Drawn | None:
    """Up to so many of a run's grids, evenly spread, with the first and the last; None where it has fewer than two.

    An unfinished run may be writing its last one: where that cannot be read it does not count.

    Raises:
        FileError: a picture cannot be read, or is no grid.
    """
    paths = sorted((run.folder / "grids").glob("step_*.png"))
    if run.summary is None and paths:
        try:
            _read_cells(paths[-1])
        except FileError:
            paths.pop()
    if len(paths) < 2:
        return None
    wrong = next((path for path in paths if not path.stem.removeprefix("step_").isdecimal()), None)
    if wrong is not None:
        raise FileError(f"{wrong}: its name holds no step; call it step_NNNNNN.png or move it away")
    chosen = [paths[place] for place in _spread(len(paths), most)]
    cells = [_read_cells(path) for path in chosen]
    side = cells[0].shape[2]
    if any(each.shape != cells[0].shape for each in cells):
        raise FileError(f"{run.folder / 'grids'}: grids of different sizes; keep those of one run there")
    grids = [
        Grid(int(path.stem.removeprefix("step_")), _shrunk(each)) for path, each in zip(chosen, cells, strict=True)
    ]
    return Drawn(grids, len(paths), side)


def _read_cells(path: Path) -> Cells:
    """The samples of a grid, uint8 (S, L, H, W, 3): they are square, and there are always so many rows of them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=["PNG"]) as opened:
                pixels_HW3 = np.asarray(opened.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise FileError(f"{path}: no picture ({error}); move it away or leave the run out") from error
    height, width = pixels_HW3.shape[:2]
    pitch, over = divmod(height + GAP, GRID_ROWS)
    columns = (width + GAP) // max(pitch, 1)
    if over or pitch <= GAP or columns * pitch - GAP != width or not 1 <= columns <= GRID_COLUMNS:
        raise FileError(
            f"{path}: {width}×{height} pixels are no grid of {GRID_ROWS} rows of square samples with {GAP} pixels "
            "between them, as a run draws it; move it away or leave the run out"
        )
    padded = np.pad(pixels_HW3, ((0, GAP), (0, GAP), (0, 0)))
    cells = padded.reshape(GRID_ROWS, pitch, columns, pitch, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(cells[:, :, :-GAP, :-GAP])


def column_names(run: Run, columns: int) -> list[str]:
    """The labels of a grid's columns, by name where they have one; `column 1`, … where it is not known which they are.

    `Evaluator.save_grid` takes every so-many-th of the labels that are trained on.
    """
    names = label_names(run.config.model.classifier)
    classes = run.config.rollout.classes or tuple(range(len(names)))
    labels = classes[:: max(1, len(classes) // GRID_COLUMNS)][:GRID_COLUMNS]
    if len(labels) != columns:
        return [f"column {column}" for column in range(1, columns + 1)]
    return [names[label].split(",")[0] if label < len(names) else f"label {label}" for label in labels]


def make_strips(group: Group, drawn: Drawn, most: int) -> Strips:
    """Strips of the group's shown run, of at most so many bytes.

    Args:
        group: of which one run is shown.
        drawn: by that run.
        most: bytes of all pictures, as they stand in the page; the smallest strips are made in any case.
    """
    grids, names = drawn.grids, column_names(group.shown, drawn.grids[0].cells_SLHW3.shape[1])
    for labels, steps in STRIPS:
        columns, places = _spread(len(names), labels), _spread(len(grids), steps)
        zoom = _zoom(drawn.side, len(places), ROOM)
        rows = []
        for column in columns:
            pictures = [
                _picture(grids[place].cells_SLHW3[0, column], f"{names[column]} after {grids[place].step} steps", zoom)
                for place in places
            ]
            rows.append((names[column], pictures))
        if sum(len(picture.uri) for _, pictures in rows for picture in pictures) <= most:
            break
    left_out = _left_out(
        (len(columns), len(names), "labels"),
        (len(places), drawn.saved, "saved steps"),
        (min(drawn.side, LARGEST), drawn.side, "pixels a side"),
    )
    return Strips([grids[place].step for place in places], rows, left_out)


def make_gallery(group: Group, drawn: dict[Run, Drawn], most: int) -> Gallery:
    """The first grid of the shown run beside the last of it and of further runs, of at most so many bytes.

    Args:
        group: of the runs.
        drawn: by each run that has two grids or more, at least one.
        most: bytes of all pictures, as they stand in the page; the smallest gallery is made in any case.
    """
    runs = [run for run in dict.fromkeys((*group.averaged, *group.runs)) if run in drawn]
    shown, first = runs[:MOST_RUNS], drawn[runs[0]]
    names = column_names(runs[0], first.grids[0].cells_SLHW3.shape[1])
    panels = [("before training", first.grids[0])]
    panels += [(f"after {(last := drawn[run].grids[-1]).step} steps, {group.label(run)}", last) for run in shown]
    for labels, seeds in GALLERIES:
        columns, rows = _spread(len(names), labels), range(seeds)
        kept, zoom = ", ".join(names[column] for column in columns), _zoom(first.side, min(labels, WRAP), ROOM // 2)
        pictures = [
            (title, _picture(_sheet(grid, columns, rows), f"Samples {title}: {kept}.", zoom)) for title, grid in panels
        ]
        if sum(len(picture.uri) for _, picture in pictures) <= most:
            break
    left_out = _left_out(
        (len(columns), len(names), "labels"),
        (len(rows), GRID_ROWS, "seeds"),
        (len(shown), len(runs), "runs"),
        (min(first.side, LARGEST), first.side, "pixels a side"),
    )
    return Gallery(
        pictures, f"{kept}, from left to right{' and on' if len(columns) > WRAP else ''}", len(rows), left_out
    )


def _spread(count: int, most: int) -> list[int]:
    """Up to `most` of `count` places, evenly spread, with the first and the last."""
    return list(dict.fromkeys(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()))


def _zoom(side: int, count: int, room: int) -> int:
    """How many times larger so many samples side by side are shown, in whole pixels; at most so large as is of use."""
    shown = min(side, LARGEST)
    return max(1, min(room // ((shown + GAP) * count), -(-LARGEST // shown)))


def _left_out(*parts: tuple[int, int, str]) -> str:
    return ", ".join(f"{shown} of {count} {what}" for shown, count, what in parts if shown < count)


def _sheet(grid: Grid, columns: Sequence[int], rows: Sequence[int]) -> Cells:
    """Some labels and seeds on one sheet on a transparent ground, uint8 (H, W, 4); labels wrap into further blocks."""
    cells = grid.cells_SLHW3[np.ix_(rows, columns)]
    side, wrap = cells.shape[2], min(WRAP, len(columns))
    pitch, blocks = side + GAP, -(-len(columns) // wrap)
    block_height = len(rows) * pitch - GAP + BLOCK_GAP
    sheet = np.zeros((blocks * block_height - BLOCK_GAP, wrap * pitch - GAP, 4), dtype=np.uint8)
    for row, place in np.ndindex(len(rows), len(columns)):
        top, left = place // wrap * block_height + row * pitch, place % wrap * pitch
        sheet[top : top + side, left : left + side, :3] = cells[row, place]
        sheet[top : top + side, left : left + side, 3] = 255
    return sheet


def _shrunk(cells_SLHW3: Cells) -> Cells:
    """Samples at most `LARGEST` pixels a side."""
    seeds, labels, side = cells_SLHW3.shape[:3]
    if side <= LARGEST:
        return cells_SLHW3
    small = [
        np.asarray(Image.fromarray(cell).resize((LARGEST, LARGEST), Image.Resampling.LANCZOS))
        for row in cells_SLHW3
        for cell in row
    ]
    return np.stack(small).reshape(seeds, labels, LARGEST, LARGEST, 3)


def _picture(pixels: Cells, alt: str, zoom: int) -> Picture:
    """uint8 (H, W, 3 or 4) as a picture of the page, shown `zoom` times enlarged."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    uri = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")
    return Picture(uri, pixels.shape[1] * zoom, pixels.shape[0] * zoom, alt)
