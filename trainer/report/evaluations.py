"""Evaluations, as `trainer.evaluate` writes them: the paper's Table 1, and the columns that nothing optimises."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from trainer.evaluate.measures import SCORE
from trainer.evaluate.table import markdown_table
from trainer.report.files import read_json
from trainer.report.runs import Run

FILE = "evaluation.json"


class Measure(BaseModel):
    """A number of a row."""

    mean: float
    low: float | None
    high: float | None


class Split(BaseModel):
    """The numbers of a row's images: of all labels, the seen or the unseen."""

    images: int
    measures: dict[str, Measure | None]


class Row(BaseModel):
    """A model, or a folder of pictures."""

    name: str
    splits: dict[str, Split]


class Score(BaseModel):
    """A column of scores."""

    column: str
    reward: str
    prompt: str | None


class Interval(BaseModel):
    """What ± stands for."""

    level: float
    replicates: int
    resampled: str


class Evaluation(BaseModel):
    """What the report reads of `evaluation.json`."""

    command: str
    torch: str
    device: str
    threads: int
    sampling: dict[str, bool | int | float | None]
    scores: list[Score]
    interval: Interval
    rows: list[Row]


@dataclass(frozen=True)
class Table:
    """A table: its head, and rows of cells; the first cell of each names it."""

    head: list[str]
    rows: list[list[str]]


def read_evaluation(folder: Path) -> Evaluation:
    """An evaluation from its folder.

    Raises:
        FileError: it cannot be read, or is something else.
    """
    return read_json(folder / FILE, Evaluation)


def table_of(evaluation: Evaluation, without: Collection[str] = ()) -> Table | None:
    """The table of `table.md`, but for the measures of some names; None where no measure is left."""
    rows = [row.model_dump() for row in evaluation.rows]
    for row in rows:
        for split in row["splits"].values():
            split["measures"] = {name: each for name, each in split["measures"].items() if name not in without}
    if not any(_has_measure(row) for row in rows):
        return None
    head, _, *body = [_cells(line) for line in markdown_table(rows).splitlines()]
    return Table(head, body)


def _has_measure(row: dict[str, Any]) -> bool:
    return any(measure is not None for split in row["splits"].values() for measure in split["measures"].values())


def _cells(line: str) -> list[str]:
    """The cells of a line of Markdown; what a table says is decided where `table.md` is written, and nowhere else."""
    return [cell.replace("\\|", "|") for cell in re.split(r"(?<!\\) \| ", line.removeprefix("| ").removesuffix(" |"))]


def optimised(evaluation: Evaluation, runs: Sequence[Run]) -> set[str]:
    """The names of the evaluation's measures that are the reward of some run, or a part of it."""
    rewards = {(reward.name, reward.prompt) for run in runs for reward in run.config.rewards}
    return {f"{SCORE}{score.column}" for score in evaluation.scores if (score.reward, score.prompt) in rewards}
