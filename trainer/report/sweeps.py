"""Sweeps: the same recipe at several values of one setting, and what the runs come to at each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import BaseModel, Field

from trainer.report.charts import Band, Chart, Dots, Line, Numbers, Scale
from trainer.report.curves import cut_lines, spread_parts
from trainer.report.evaluations import Table
from trainer.report.files import FileError, read_json
from trainer.report.runs import Group, Run, read_run
from trainer.report.series import block_of, group_series
from trainer.report.text import TITLES, is_share, mean, mean_and_range

FILE = "sweep.json"
WIDE = 20.0  # largest over smallest value, from which on an axis is logarithmic

FINALS: dict[str, Callable[[Run], float | None]] = {
    "reward": lambda run: run.evaluated("after", "reward"),
    "label_accuracy": lambda run: run.evaluated("after", "label_accuracy"),
    "kl": lambda run: run.last("kl"),
    "seconds": lambda run: run.seconds(),
}
"""What a finished run has come to."""


class _Started(BaseModel):
    seed: int
    folder: str | None
    done: bool


class _Point(BaseModel):
    name: str
    value: float | None = Field(allow_inf_nan=False)
    runs: list[_Started]


class _File(BaseModel):
    name: str
    summary: str
    axis: str | None
    points: list[_Point]


@dataclass(frozen=True)
class Point:
    """One value of the setting: its name, its place on the axis, its runs so far, and how many there are to be."""

    name: str
    value: float | None
    runs: tuple[Run, ...]
    planned: int

    @property
    def finished(self) -> list[Run]:
        """The runs that are."""
        return [run for run in self.runs if run.summary is not None]


@dataclass(frozen=True)
class Sweep:
    """A sweep; `axis` is the name of the setting that its points differ in, or `point`."""

    name: str
    summary: str
    axis: str
    points: tuple[Point, ...]


def read_sweep(folder: Path) -> Sweep:
    """A sweep and its runs from its folder; runs that have not begun are left out.

    Raises:
        FileError: a file cannot be read or is something else, or a run that is said to be done is not there.
    """
    path = folder / FILE
    content = read_json(path, _File)
    points = []
    for point in content.points:
        runs = []
        for started in point.runs:
            place = None if started.folder is None else folder / started.folder
            if place is not None and (place / "config.yaml").is_file():
                runs.append(read_run(place))
            elif started.done:
                raise FileError(f"{path}: the run {place or started.seed} is done and not there; put it back")
        points.append(Point(point.name, point.value, tuple(runs), len(point.runs)))
    if not points:
        raise FileError(f"{path}: no points; let the sweep begin, or leave it out")
    return Sweep(content.name, content.summary, content.axis or "point", tuple(points))


def table_of(sweep: Sweep) -> Table:
    """A row a point: its runs, and mean and range of what the finished ones have come to."""
    return Table(
        [sweep.axis, "runs", *(_title(name) for name in FINALS)],
        [
            [
                point.name,
                f"{len(point.finished)} of {point.planned}",
                *(mean_and_range([final(run) for run in point.finished], name) for name, final in FINALS.items()),
            ]
            for point in sweep.points
        ],
    )


def final_charts(sweep: Sweep) -> list[Chart]:
    """What finished runs have come to, against the axis: a dot a run, a line through the means."""
    places, scale, linear_to = _places(sweep.points)
    charts = []
    for name, final in FINALS.items():
        dots = [
            (place, value)
            for place, point in zip(places, sweep.points, strict=True)
            for run in point.finished
            if (value := final(run)) is not None
        ]
        if not dots:
            continue
        means = [
            (place, value)
            for place, point in zip(places, sweep.points, strict=True)
            if (value := mean([final(run) for run in point.finished])) is not None
        ]
        parts = (Line(*_columns(sorted(means))), Dots(*_columns(dots)))
        words = "; ".join(
            f"{point.name}: {mean_and_range([final(run) for run in point.finished], name)}" for point in sweep.points
        )
        charts.append(
            Chart(
                alt=f"{sweep.name}: final {TITLES[name]} against {sweep.axis}. {words}.",
                x=sweep.axis,
                y=_title(name),
                parts=parts,
                is_share=is_share(name),
                ticks=dict(zip(places, (point.name for point in sweep.points), strict=True)),
                scale=scale,
                linear_to=linear_to,
                starts_at_zero=name in {"kl", "seconds"},
            )
        )
    return charts


def _places(points: Sequence[Point]) -> tuple[list[float], Scale, float]:
    """Where the points stand on the axis: by value where each has one of its own, else side by side."""
    values = [point.value for point in points if point.value is not None]
    if len(values) < len(points) or len(set(values)) < len(values) or len(values) < 2:
        return [float(place) for place in range(len(points))], "linear", 1.0
    positive = [value for value in values if value > 0]
    if min(values) >= 0 and len(positive) > 1 and max(positive) / min(positive) >= WIDE:
        return values, "log" if min(values) > 0 else "symlog", min(positive)
    return values, "linear", 1.0


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[Numbers, Numbers]:
    x_N, y_N = np.asarray(pairs, dtype=np.float64).T
    return x_N, y_N


def curve_charts(sweep: Sweep) -> list[Chart]:
    """Reward and label accuracy in training, a colour a point: by step, or by images where steps differ in size."""
    runs = [run for point in sweep.points for run in point.runs]
    block, sizes = block_of(runs), {_images(run) for run in runs}
    charts = []
    for name in ("reward", "label_accuracy"):
        parts: list[Line | Band] = []
        for colour, point in enumerate(sweep.points):
            spread, averaged, cut = group_series(Group(point.name, point.runs), name, block)
            size = _images(point.runs[0]) if point.runs and len(sizes) > 1 else 1
            lines = [*spread_parts(spread, averaged, colour), *cut_lines(cut, colour)]
            parts += [replace(part, x_N=part.x_N * size) for part in lines]
        if parts:
            x = "images" if len(sizes) > 1 else "step"
            words = ", ".join(point.name for point in sweep.points)
            alt = f"{sweep.name}: {TITLES[name]} by {x}, one line for each {sweep.axis}: {words}."
            charts.append(Chart(alt, x, TITLES[name], tuple(parts), is_share=is_share(name)))
    return charts


def _images(run: Run) -> int:
    """That a step samples."""
    return run.config.rollout.labels * run.config.rollout.group_size


def unfinished(sweep: Sweep) -> str:
    """The points that are not complete, in words; nothing where all are."""
    missing = [
        f"{point.name}: {len(point.finished)} of {point.planned} runs"
        for point in sweep.points
        if len(point.finished) < point.planned
    ]
    return "; ".join(missing)


def _title(name: str) -> str:
    return TITLES[name] if name == "seconds" else f"final {TITLES[name]}"
