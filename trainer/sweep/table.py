"""What a sweep has come to: `sweep.json` for programs, `summary.md` and a table on the terminal for people."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trainer.run_folder import write_text
from trainer.sweep.found import numbers, seeds_of
from trainer.sweep.plan import RESULTS, SUMMARY, Plan

DASH = "–"
Numbers = dict[str, Any]
Format = Callable[[float], str]


def summarise(plan: Plan, seeds: Sequence[int]) -> Numbers:
    """Writes `sweep.json` and `summary.md` from the folders of all points, and returns the former's content.

    Args:
        plan: of the sweep.
        seeds: that are wanted; those that have folders are told of, too.

    Raises:
        ConfigError: a folder was run with other settings.
    """
    every = sorted({*seeds, *seeds_of(plan)})
    points = []
    for point in plan.file.points:
        runs = [plan.run(point, seed) for seed in every]
        points.append(
            {
                "name": point.name,
                "value": point.value,
                "recipe": runs[0].recipe,
                "runs": [numbers(run, plan.folder) for run in runs],
            }
        )
    content = {"name": plan.name, "summary": plan.file.summary, "axis": plan.file.axis, "points": points}
    write_text(plan.folder / RESULTS, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(plan.folder / SUMMARY, markdown(content))
    return content


def rows(content: Numbers) -> tuple[list[str], list[list[str]]]:
    """The head of the table and a row a point: means over the seeds that are done, with [least, greatest].

    Args:
        content: of `sweep.json`.
    """
    head = [content["axis"] or "point", "seeds", "reward", "label accuracy", "KL", "steps", "images", "seconds"]
    table = []
    for point in content["points"]:
        done = [run for run in point["runs"] if run["done"]]

        def over(name: str, form: Format, done: Sequence[Numbers] = done) -> str:
            return _spread([run[name] for run in done], form)

        table.append(
            [
                point["name"],
                f"{len(done)} of {len(point['runs'])}",
                _change(done, "reward", lambda value: f"{value:.3f}"),
                _change(done, "label_accuracy", lambda value: f"{value:.1%}"),
                over("kl", lambda value: f"{value:.3f}"),
                over("steps", lambda value: f"{value:,.0f}"),
                over("images", lambda value: f"{value:,.0f}"),
                over("seconds", lambda value: f"{value:,.0f}"),
            ]
        )
    return head, table


def _change(done: Sequence[Numbers], name: str, form: Format) -> str:
    before, after = (_spread([(run[when] or {}).get(name) for run in done], form) for when in ("before", "after"))
    return DASH if before == after == DASH else f"{before} → {after}"


def _spread(values: Sequence[float | None], form: Format) -> str:
    """Mean [least, greatest] of what is known, or the one value."""
    known = [value for value in values if value is not None]
    if not known:
        return DASH
    low, high = form(min(known)), form(max(known))
    return form(sum(known) / len(known)) + ("" if low == high else f" [{low}, {high}]")


def missing(content: Numbers) -> str:
    """The seeds that are not done, by point; empty when all are."""
    left = []
    for point in content["points"]:
        seeds = [str(run["seed"]) for run in point["runs"] if not run["done"]]
        if seeds:
            left.append(f"{point['name']} (seed {', '.join(seeds)})")
    return ", ".join(left)


def markdown(content: Numbers) -> str:
    """`summary.md`."""
    head, table = rows(content)
    cells = [head, ["---", *("---:" for _ in head[1:])], *table]
    lines = [f"# {content['name']}", "", content["summary"], ""]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells]
    lines += ["", "Means over the seeds that are done, with [least, greatest]; before → after training."]
    if left := missing(content):
        lines += ["", f"Missing: {left}."]
    return "\n".join(lines) + "\n"


def show(content: Numbers, console: Console) -> None:
    """Prints the table, and what is missing."""
    head, cells = rows(content)
    table = Table(title=escape(f"{content['name']}: {content['summary']}"), title_justify="left")
    for number, column in enumerate(head):
        table.add_column(escape(column), justify="right" if number else "left")
    for row in cells:
        table.add_row(*map(escape, row))
    console.print(table)
    if left := missing(content):
        console.print(escape(f"missing: {left}"), soft_wrap=True)
