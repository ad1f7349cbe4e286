"""The metrics of several runs on one axis: each by itself, their mean, and what lies between smallest and largest.

Shape legend: N steps of a run · C steps that all runs have.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.report.runs import Group, Run

POINTS = 600
"""The most of a line; longer ones are means over as many consecutive steps as it takes."""


@dataclass(frozen=True)
class Series:
    """A metric of a run: steps float64 (N,) and values float64 (N,), without the steps where there is none."""

    steps_N: NDArray[np.float64]
    values_N: NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """Mean, smallest and largest over runs, float64 (C,), at the steps that all of them have."""

    steps_C: NDArray[np.float64]
    mean_C: NDArray[np.float64]
    low_C: NDArray[np.float64]
    high_C: NDArray[np.float64]


def block_of(runs: Sequence[Run]) -> int:
    """How many consecutive steps become one point in a chart of these runs."""
    return max(1, -(-max((run.steps for run in runs), default=0) // POINTS))


def columns_of(run: Run, names: Sequence[str], block: int) -> list[NDArray[np.float64]] | None:
    """The steps that have all of some metrics, and each of these, float64 (N,); None where no step has them.

    Args:
        run: that took the steps.
        names: of the metrics.
        block: how many consecutive steps become one point, their mean.
    """
    keys = ("step", *names)
    rows = [[line[key] for key in keys] for line in run.lines if all(line.get(key) is not None for key in keys)]
    if not rows:
        return None
    columns = list(np.asarray(rows, dtype=np.float64).T)
    if block == 1:
        return columns
    blocks_N = (columns[0] - 1) // block
    firsts_C = np.unique(blocks_N, return_index=True)[1]
    counts_C = np.diff([*firsts_C, len(blocks_N)])
    return [np.add.reduceat(column_N, firsts_C) / counts_C for column_N in columns]


def series_of(run: Run, name: str, block: int) -> Series | None:
    """A metric of a run, a point for each `block` steps; None where no step has it."""
    columns = columns_of(run, (name,), block)
    return None if columns is None else Series(*columns)


def spread_of(series: Sequence[Series]) -> Spread | None:
    """Over several runs; None where they have no step in common, or there is none."""
    if not series:
        return None
    steps_C = series[0].steps_N
    for each in series[1:]:
        steps_C = np.intersect1d(steps_C, each.steps_N)
    if not len(steps_C):
        return None
    rows_RC = np.stack([each.values_N[np.isin(each.steps_N, steps_C)] for each in series])
    return Spread(steps_C, rows_RC.mean(axis=0), rows_RC.min(axis=0), rows_RC.max(axis=0))


def group_series(group: Group, name: str, block: int) -> tuple[Spread | None, list[Series], list[Series]]:
    """Of a group: the spread over its averaged runs, these runs, and those that were cut short beside finished ones."""
    averaged = [each for run in group.averaged if (each := series_of(run, name, block)) is not None]
    others = [run for run in group.runs if run not in group.averaged]
    cut = [each for run in others if (each := series_of(run, name, block)) is not None]
    return spread_of(averaged), averaged, cut
