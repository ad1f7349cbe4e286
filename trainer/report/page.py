"""The page: what was read, section by section, in one file of HTML."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from trainer.report import curves, evaluations, sweeps
from trainer.report.charts import Chart, draw, series_colour
from trainer.report.evaluations import Evaluation, Table
from trainer.report.grids import STRIPS, Drawn, Gallery, Strips, make_gallery, make_strips, read_grids
from trainer.report.runs import Group, Run, group_runs, in_words, raw_score
from trainer.report.series import block_of
from trainer.report.settings_table import command_of, settings_of, versions_of
from trainer.report.sweeps import Sweep
from trainer.report.text import DASH, mean, mean_and_range, show, show_change, title_of, value_range

PICTURE_BYTES = 10_000_000  # of all pictures, as they stand in the page
GROUP_BYTES = 3_000_000  # the most of one recipe's
STRIPS_SHARE = 0.4
RESULTS = ("reward", "scores", "success rate", "label accuracy", "KL, last step", "seconds")
NOT_OPTIMISED = "label_accuracy"
"""That every evaluation measures and no recipe optimises."""


@dataclass(frozen=True)
class Pictures:
    """What a group's samples look like; None where its grids do not suffice."""

    strips: Strips | None
    gallery: Gallery | None


@dataclass
class Report:
    """What the page is made from.

    Args:
        title: of the page.
        runs: in the order in which they were given.
        evaluations: with their names.
        sweeps: likewise.
    """

    title: str
    runs: list[Run]
    evaluations: list[tuple[str, Evaluation]]
    sweeps: list[Sweep]
    groups: list[Group] = field(init=False)

    def __post_init__(self) -> None:
        self.groups = group_runs(self.runs)


def render(report: Report) -> str:
    """The page as HTML; the same folders give the same page.

    Raises:
        FileError: a run's grid cannot be read.
    """
    environment = Environment(
        loader=PackageLoader("trainer.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["capfirst"] = lambda text: text[:1].upper() + text[1:]
    environment.globals |= {
        "draw": draw,
        "show": show,
        "colour": series_colour,
        "dash": DASH,
        "style": Markup(_style()),  # noqa: S704 - our own file
    }
    pictures = {group: _pictures(group, len(report.groups)) for group in report.groups}
    return environment.get_template("page.html").render(
        title=report.title,
        groups=report.groups,
        overview=_overview(report.groups),
        settings={group: settings_of(group) for group in report.groups},
        versions={group: versions_of(group) for group in report.groups},
        command_of=command_of,
        curves={group: curves.training_curves(group) for group in report.groups},
        block_of=block_of,
        tables=[(name, each, evaluations.table_of(each)) for name, each in report.evaluations],
        pictures=pictures,
        paths=_paths(report.groups),
        unoptimised=_unoptimised(report),
        sweeps=[_ablation(sweep) for sweep in report.sweeps],
    )


def _style() -> str:
    return (Path(__file__).parent / "templates" / "page.css").read_text("utf-8")


@dataclass(frozen=True)
class Cell:
    """Numbers of several runs: a mean a line, before and after where it has both, and the range of the latter."""

    lines: list[tuple[str, str]]


def _overview(groups: Sequence[Group]) -> dict[str, Any]:
    """The table of results: its columns, a row for each group, and one for each run."""
    rows = [(group, _results(group, group.finished)) for group in groups]
    runs = [(group, run, _results(group, [run])) for group in groups for run in group.runs]
    kept = [
        at
        for at in range(len(RESULTS))
        if any(text != DASH for *_, cells in rows + runs for text, _ in cells[at].lines)
    ]
    return {
        "head": [RESULTS[at] for at in kept],
        "rows": [(group, [cells[at] for at in kept]) for group, cells in rows],
        "runs": [(group, run, [cells[at] for at in kept]) for group, run, cells in runs],
    }


def _results(group: Group, runs: Sequence[Run]) -> list[Cell]:
    """What runs of a group have come to, in the order of `RESULTS`."""
    rewards = group.shown.config.rewards
    scores = [
        (f"{reward.name} {text}", ends) for reward in rewards for text, ends in [_change(runs, raw_score(reward))]
    ]
    kl, seconds = [run.last("kl") for run in runs], [run.seconds() for run in runs]
    return [
        Cell([_change(runs, "reward")]),
        Cell(scores),
        *(Cell([_change(runs, name)]) for name in ("success_rate", NOT_OPTIMISED)),
        Cell([(show(mean(kl)), value_range(kl))]),
        Cell([(show(mean(seconds), "seconds"), value_range(seconds, "seconds"))]),
    ]


def _change(runs: Sequence[Run], name: str) -> tuple[str, str]:
    """`0.237 → 0.387` and the range of the latter."""
    before, after = ([run.evaluated(when, name) for run in runs] for when in ("before", "after"))
    if not any(value is not None for value in (*before, *after)):
        return DASH, ""
    return f"{show(mean(before), name)} → {show(mean(after), name)}", value_range(after, name)


def _pictures(group: Group, groups: int) -> Pictures:
    """A group's strips and gallery, in its share of what a page may hold."""
    most = min(GROUP_BYTES, PICTURE_BYTES // groups)
    shown = read_grids(group.shown, max(steps for _, steps in STRIPS))
    drawn: dict[Run, Drawn] = {} if shown is None else {group.shown: shown}
    for run in group.runs:
        if run is not group.shown and (ends := read_grids(run, 2)) is not None:
            drawn[run] = ends
    return Pictures(
        strips=None if shown is None else make_strips(group, shown, int(most * STRIPS_SHARE)),
        gallery=make_gallery(group, drawn, int(most * (1 - STRIPS_SHARE))) if drawn else None,
    )


def _paths(groups: Sequence[Group]) -> list[tuple[str, list[Group], Chart]]:
    charts = ((title, each, curves.reward_against_kl(title, each)) for title, each in curves.same_reward(groups))
    return [(title, each, chart) for title, each, chart in charts if chart is not None]


def _unoptimised(report: Report) -> dict[str, Any]:
    """What the runs' evaluations and the given ones say of scores that no recipe optimises."""
    rows, charts = [], []
    for group in report.groups:
        watched = {raw_score(reward): in_words(reward) for reward in group.shown.config.eval.rewards}
        for name, title in (watched | {NOT_OPTIMISED: title_of(NOT_OPTIMISED)}).items():
            before, after = ([run.evaluated(when, name) for run in group.averaged] for when in ("before", "after"))
            changes = [b - a for a, b in zip(before, after, strict=True) if a is not None and b is not None]
            ranges = [mean_and_range(values, name) for values in (before, after)]
            rows.append([group.name, title, *ranges, show_change(changes, name)])
            chart = curves.between_curve(group, name, title)
            charts += [] if chart is None else [(group.name, chart)]
    tables = []
    for name, evaluation in report.evaluations:
        table = evaluations.table_of(evaluation, evaluations.optimised(evaluation, report.runs))
        tables += [] if table is None else [(name, table)]
    head = ["recipe", "measure", "before", "after", "change"]
    return {"table": Table(head, rows) if rows else None, "charts": charts, "tables": tables}


def _ablation(sweep: Sweep) -> dict[str, Any]:
    return {
        "sweep": sweep,
        "finals": sweeps.final_charts(sweep),
        "curves": sweeps.curve_charts(sweep),
        "table": sweeps.table_of(sweep),
        "unfinished": sweeps.unfinished(sweep),
    }
