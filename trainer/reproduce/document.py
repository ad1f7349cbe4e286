"""Writes the programme's tables into a Markdown page, between marks; what stands outside them is left as it is."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from trainer import machine
from trainer.config import ConfigError
from trainer.evaluate.table import markdown_table
from trainer.reproduce.claims import AESTHETIC, OLD_PICTURE, PAINTED, PAINTING, claims
from trainer.reproduce.numbers import ALL, Numbers, Programme, measure_of
from trainer.reproduce.stages import GROUPS, KL, PAPER, PRETRAINED
from trainer.run_folder import write_text
from trainer.sweep.table import rows as sweep_rows

DASH = "–"
STYLES = ("photo", "old picture", "painting", "sketch")


def check(path: Path) -> str:
    """Reads a page, and holds it to what `write` needs.

    Args:
        path: of the page.

    Returns:
        Its text.

    Raises:
        ConfigError: it cannot be read or written, or a part's marks are not there once, in their order.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--results {path}: cannot be read ({error}); give a page such as docs/results.md") from error
    if not os.access(path, os.W_OK) or not os.access(path.resolve().parent, os.W_OK):
        raise ConfigError(f"--results {path}: cannot be written; give a page in a folder that can")
    for name in PARTS:
        begin, end = marks(name)
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ConfigError(
                f"--results {path}: needs the lines {begin} and {end} once, where the table goes; add them"
            )
    return text


def write(path: Path, programme: Programme) -> None:
    """Fills every part of a page that stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->`.

    Args:
        path: of the page.
        programme: the numbers.

    Raises:
        ConfigError: as `check`.
        OSError: it cannot be written.
    """
    text = check(path)
    for name, content in PARTS.items():
        begin, end = marks(name)
        before, after = text.partition(begin)[0], text.partition(end)[2]
        text = f"{before}{begin}\n{content(programme)}\n{end}{after}"
    write_text(path, text)


def marks(name: str) -> tuple[str, str]:
    """The lines between which a part stands."""
    return f"<!-- begin: {name} -->", f"<!-- end: {name} -->"


def provenance(programme: Programme) -> str:
    """Where the numbers are from: command, hardware, versions, day and commit."""
    content = next(iter(programme.plain.values()))
    device = machine.processor() if content["device"] == "cpu" else content["device"]
    cores = f"{len(os.sched_getaffinity(0))} cores of " if content["device"] == "cpu" else ""
    seeds = ",".join(map(str, programme.seeds))
    return (
        f"`python -m trainer.reproduce --seeds {seeds}`: {cores}{device}, torch {content['torch']}, "
        f"{machine.today()}, commit {machine.commit()}."
    )


def claims_table(programme: Programme) -> str:
    """A row a claim: its bar, every seed, all seeds together, whether it holds."""
    head = ["claim of the paper", "bar", *(f"seed {seed}" for seed in programme.seeds), "together", "holds"]
    found = claims(programme)
    return table(
        head,
        [[each.text, each.bar, *each.seeds, each.together, "yes" if each.holds else "**no**"] for each in found],
        left=2,
    )


def runs_table(programme: Programme) -> str:
    """A row a run of the paper's experiments, before → after."""
    head = ["experiment", "seed", "score", "success", "label accuracy", "KL", "steps", "seconds"]
    lines = []
    for point in programme.points(PAPER):
        for seed in programme.seeds:
            run = programme.run(PAPER, point, seed)
            scores = [name for name in run["before"] if name.startswith("raw_score/")]
            lines.append(
                [
                    point,
                    str(seed),
                    "; ".join(_change(run, name, "{:.3f}") for name in scores),
                    _change(run, "success_rate", "{:.1%}"),
                    _change(run, "label_accuracy", "{:.1%}"),
                    DASH if run["kl"] is None else f"{run['kl']:.3f}",
                    str(run["steps"]),
                    f"{run['seconds']:,.0f}",
                ]
            )
    return table(head, lines)


def _change(run: Numbers, name: str, form: str) -> str:
    before, after = run["before"].get(name), run["after"].get(name)
    return DASH if after is None else f"{form.format(before)} → {form.format(after)}".replace("%", " %")


def policies_table(programme: Programme) -> str:
    """What the plain samples of each policy are: means over the seeds, with the least and the greatest."""
    columns: list[tuple[str, str, str]] = [
        ("rating", AESTHETIC, "{:.2f}"),
        ('"an old picture"', OLD_PICTURE, "{:.3f}"),
        ('"a painting"', PAINTING, "{:.3f}"),
        ("label", "accuracy/top1", "{:.1%}"),
        *((f"{style}, by the judge", f"style/{style}", "{:.1%}") for style in STYLES),
        ("painted, by pixels", PAINTED, "{:.1%}"),
        ("colourfulness", "colourfulness", "{:.0f}"),
        ("diversity", "diversity", "{:.3f}"),
    ]
    rows = [row["name"] for row in programme.plain[programme.seeds[0]]["rows"]]
    lines = [[name, *(_spread(programme, name, measure, form) for _, measure, form in columns)] for name in rows]
    return table(["policy", *(title for title, _, _ in columns)], lines)


def _spread(programme: Programme, row: str, measure: str, form: str) -> str:
    values = [measure_of(programme.plain[seed], row, measure) for seed in programme.seeds]
    low, mean, high = (form.format(value) for value in (min(values), fmean(values), max(values)))
    return (mean if low == high or row == PRETRAINED else f"{mean} [{low}, {high}]").replace("%", " %")


def table_1(programme: Programme) -> str:
    """The paper's Table 1, of the first seed, by samples as at inference, with 95 % intervals over images."""
    rows = [{**row, "splits": {ALL: row["splits"][ALL]}} for row in programme.inference["rows"]]
    return markdown_table(rows).strip()


def sweep_table(programme: Programme, sweep: str) -> str:
    """A row a point of a sweep: means over the seeds, with the least and the greatest."""
    content: dict[str, Any] = dict(programme.sweeps[sweep])
    content["points"] = [
        {**point, "runs": [run for run in point["runs"] if run["seed"] in programme.seeds]}
        for point in content["points"]
    ]
    head, lines = sweep_rows(content)
    return table(head, [[cell.replace("%", " %") for cell in line] for line in lines])


def table(head: Sequence[str], lines: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A Markdown table; the first columns to the left, the others to the right."""
    escape: Callable[[str], str] = lambda cell: cell.replace("|", "\\|")  # noqa: E731 - a name for what follows
    cells = [[escape(cell) for cell in line] for line in (head, *lines)]
    rule = ["---" if column < left else "---:" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (cells[0], rule, *cells[1:]))


PARTS: dict[str, Callable[[Programme], str]] = {
    "provenance": provenance,
    "claims": claims_table,
    "runs": runs_table,
    "policies": policies_table,
    "table-1": table_1,
    "kl": lambda programme: sweep_table(programme, KL),
    "groups": lambda programme: sweep_table(programme, GROUPS),
}
"""What stands between the marks of a page, by their name."""
