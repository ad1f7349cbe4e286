"""What the folders of a sweep's runs hold: which runs are done, and the numbers that they have come to."""

import json
import re
from pathlib import Path
from typing import Any

from trainer.config import ConfigError
from trainer.inference.sources import read_settings
from trainer.models.checkpoints import CheckpointError
from trainer.run_folder import STATES, check_settings, is_of
from trainer.sweep.plan import Plan, Run

REMEDY = "give the options that it was run with, or another --dir, or move that folder away"
MEASURES = ("reward", "raw_score", "success_rate", "label_accuracy", "kl")


def find(run: Run) -> Path | None:
    """The folder in which a run is done or half done: the latest of its name that has a summary or a state.

    Raises:
        ConfigError: it was run with other settings.
    """
    folder = latest(run)
    if folder is not None:
        _check(run, folder)
    return folder


def latest(run: Run) -> Path | None:
    """The folder that `find` finds, whatever it was run with."""
    return max(_numbered(run), default=(0, None))[1]


def next_folder(run: Run) -> Path:
    """The folder that a run will make for itself where `find` finds none."""
    parent, name = run.config.run.dir, str(run.config.run.name)
    number = 1
    while (folder := parent / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return folder


def _numbered(run: Run) -> list[tuple[int, Path]]:
    parent, pattern = run.config.run.dir, re.compile(re.escape(str(run.config.run.name)) + r"(?:-(\d+))?")
    return [
        (int(match[1] or 1), folder)
        for folder in (parent.iterdir() if parent.is_dir() else ())
        if (match := pattern.fullmatch(folder.name))
        and ((folder / "summary.json").is_file() or any((folder / STATES).glob("step_*")))
        and is_of(folder, str(run.config.run.name))
    ]


def _check(run: Run, folder: Path) -> None:
    """Hold what a folder was run with to what is wanted now.

    Raises:
        ConfigError: they differ in what changes the numbers.
    """
    read_settings(folder)  # without them `check_settings` finds nothing
    try:
        check_settings(folder, run.config)
    except CheckpointError as error:
        raise ConfigError(f"{str(error).rpartition('; ')[0]}; {REMEDY}") from error
    summary, wanted = read_summary(folder), run.config.run.steps
    steps = (state.name.removeprefix("step_") for state in (folder / STATES).glob("step_*"))
    taken = max((int(step) for step in steps if step.isdecimal()), default=0)  # a copy among them is no state
    done = max(taken, 0 if summary is None else int(summary["steps"]))
    if done > wanted:
        raise ConfigError(f"{folder}: {done} steps are done, and run.steps is {wanted}; {REMEDY}")


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a run that was finished, for however many steps; None without one."""
    try:
        summary = json.loads((folder / "summary.json").read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"{folder / 'summary.json'}: not JSON ({error}); {REMEDY}") from error
    return summary if isinstance(summary, dict) and isinstance(summary.get("steps"), int) else None


def is_done(run: Run) -> bool:
    """Whether a run has taken all steps and was evaluated.

    Raises:
        ConfigError: it was run with other settings.
    """
    folder = find(run)
    summary = None if folder is None else read_summary(folder)
    return summary is not None and summary["steps"] == run.config.run.steps


def last_metrics(folder: Path) -> dict[str, Any]:
    """The metrics of the last step that a run has taken; none before its first."""
    try:
        lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    except FileNotFoundError:
        return {}
    for line in reversed(lines):
        try:
            return dict(json.loads(line))
        except (ValueError, TypeError):  # being written, or cut short by a kill
            continue
    return {}


def numbers(run: Run, sweep: Path) -> dict[str, Any]:
    """What `sweep.json` says of a run; what is not known is None.

    Args:
        run: done, half done or not begun.
        sweep: folder that the run's is told relative to.
    """
    folder = find(run)
    metrics = {} if folder is None else last_metrics(folder)
    summary = (None if folder is None else read_summary(folder)) or {}
    done = summary.get("steps") == run.config.run.steps
    steps = run.config.run.steps if done else int(metrics.get("step", 0))
    first = run.config.rewards[0].name
    measured = metrics | {"raw_score": metrics.get(f"raw_score/{first}")}
    return {
        "seed": run.seed,
        "folder": None if folder is None else str(folder.relative_to(sweep)),
        "done": done,
        "steps": steps,
        "seconds": summary.get("seconds") if done else None,
        "images": run.images_a_step * steps,
        **{name: measured.get(name) for name in MEASURES},
        "before": summary.get("before") if done else None,
        "after": summary.get("after") if done else None,
    }


def seeds_of(plan: Plan) -> set[int]:
    """The seeds for which any point of a sweep has a folder."""
    names = (folder.name for point in plan.file.points for folder in (plan.folder / point.name).glob("*-seed-*"))
    found = (re.search(r"-seed-(\d+)(?:-\d+)?$", name) for name in names)
    return {int(match[1]) for match in found if match}
