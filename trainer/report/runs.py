"""The folders of runs as plain values, and which of them are seeds of the same recipe."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, ConfigDict, RootModel

from trainer.config import FREE_TO_CHANGE, Config, ConfigError, RewardConfig
from trainer.inference.sources import read_settings
from trainer.metrics import Metrics
from trainer.report.files import FileError, read_json, read_text

SHOWN = 3  # settings in the name of a group; the others are in its table
PLACES = ("dir", "name", "seed", "device", "grid_every", "score_timeout_s", "resume", "loggers")
"""Of `run`: what does not make it another recipe."""


class Summary(BaseModel):
    """`summary.json`: what a finished run sums up."""

    model_config = ConfigDict(frozen=True)

    recipe: str
    seed: int
    steps: int
    seconds: float
    before: Metrics | None
    after: Metrics | None


class _Values(RootModel[Metrics]):
    pass


class _Versions(RootModel[dict[str, str]]):
    pass


@dataclass(frozen=True, eq=False)
class Run:
    """A run, as far as it has come.

    Args:
        folder: of the run.
        config: its settings.
        versions: of what it ran on, by name; empty where they are not recorded.
        lines: the metrics of each step.
        summary: None while it is unfinished.
        between: by step, the evaluations in between.
    """

    folder: Path
    config: Config
    versions: dict[str, str]
    lines: list[Metrics]
    summary: Summary | None
    between: dict[int, Metrics]

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.folder.resolve().name

    @property
    def seed(self) -> int:
        """Of everything random in it."""
        return self.config.run.seed

    @property
    def steps(self) -> int:
        """How many are done."""
        return int(self.lines[-1]["step"] or 0) if self.lines else 0

    @property
    def state(self) -> str:
        """`finished`, or how far it has come."""
        return "finished" if self.summary is not None else f"unfinished, {self.steps} of {self.config.run.steps} steps"

    def last(self, name: str) -> float | None:
        """A metric of the last step."""
        return self.lines[-1].get(name) if self.lines else None

    def seconds(self) -> float | None:
        """Of all its steps: as the run sums them up, or as far as it has come."""
        if self.summary is not None:
            return self.summary.seconds
        return sum(line.get("seconds/step") or 0.0 for line in self.lines) if self.lines else None

    def evaluated(self, when: str, name: str) -> float | None:
        """A number of the evaluation `before` or `after`; None where it is missing."""
        measured: Metrics | None = getattr(self.summary, when, None)
        return (measured or {}).get(name)


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of one recipe that differ in their seed alone.

    Args:
        name: that of the recipe; where there are several of it, with the settings in which they differ.
        runs: by seed.
    """

    name: str
    runs: tuple[Run, ...]

    @cached_property
    def averaged(self) -> tuple[Run, ...]:
        """The finished runs; where none is finished, all of them."""
        return self.finished or self.runs

    @cached_property
    def finished(self) -> tuple[Run, ...]:
        """Those that are."""
        return tuple(run for run in self.runs if run.summary is not None)

    @property
    def seeds(self) -> int:
        """How many there are: fewer than runs where some were taken twice, or a folder was copied."""
        return len({run.seed for run in self.runs})

    def label(self, run: Run) -> str:
        """`seed 0`, with the folder's name where two runs have that seed."""
        is_twice = sum(other.seed == run.seed for other in self.runs) > 1
        return f"seed {run.seed} ({run.name})" if is_twice else f"seed {run.seed}"

    @property
    def shown(self) -> Run:
        """The run whose pictures stand for the group."""
        return self.averaged[0]


def raw_score(reward: RewardConfig) -> str:
    """The metric that holds what the reward's service answers."""
    return f"raw_score/{reward.name}"


def in_words(reward: RewardConfig) -> str:
    """A reward by its name, and its prompt where it has one."""
    return reward.name if reward.prompt is None else f"{reward.name}: {reward.prompt}"


def read_run(folder: Path) -> Run:
    """A run from its folder.

    Raises:
        FileError: a file cannot be read, or holds something else.
    """
    try:
        config = read_settings(folder)
    except ConfigError as error:
        raise FileError(f"{error}; leave the run out, or correct the file") from error
    summary = read_json(folder / "summary.json", Summary) if (folder / "summary.json").exists() else None
    if summary is not None and summary.steps < config.run.steps:  # it goes on, to more steps than it had
        summary = None
    versions = folder / "versions.json"
    return Run(
        folder=folder,
        config=config,
        versions=read_json(versions, _Versions).root if versions.exists() else {},
        lines=read_metrics(folder),
        summary=summary,
        between={
            int(path.stem.removeprefix("step_")): read_json(path, _Values).root
            for path in sorted((folder / "evaluations").glob("step_*.json"))
            if path.stem.removeprefix("step_").isdecimal()
        },
    )


def read_metrics(folder: Path) -> list[Metrics]:
    """The lines of `metrics.jsonl`; one that a kill cut short, the last, is left out. None where there is no file.

    Raises:
        FileError: another line is no step's.
    """
    path = folder / "metrics.jsonl"
    rows = read_text(path).splitlines() if path.exists() else []
    lines: list[Metrics] = []
    for number, row in enumerate(rows, start=1):
        try:
            line = _Values.model_validate(json.loads(row, parse_constant=lambda _: None)).root
            if line.get("step") is None:
                raise ValueError("it has no step")
        except (ValueError, RecursionError) as error:
            if number == len(rows):
                break
            raise FileError(f"{path}: line {number} is no step's metrics; correct it or leave the run out") from error
        lines.append(line)
    return lines


def flat(value: object, path: str = "") -> dict[str, object]:
    """Each setting by its `section.key`; a list of plain values is one."""
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        value = dict(enumerate(value))
    if isinstance(value, dict) and value:
        return {name: each for key, part in value.items() for name, each in flat(part, f"{path}.{key}").items()}
    return {path.removeprefix("."): value}


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs of equal settings but for the seed, together; in the order in which they were given."""
    by_settings: dict[str, list[Run]] = {}
    for run in runs:
        by_settings.setdefault(json.dumps(_identity(run.config), sort_keys=True), []).append(run)
    gathered = [sorted(each, key=lambda run: (run.seed, run.name)) for each in by_settings.values()]
    recipes = [_recipe(each) for each in gathered]
    groups = []
    for own, recipe in zip(gathered, recipes, strict=True):
        rivals = [_identity(each[0].config) for each, other in zip(gathered, recipes, strict=True) if other == recipe]
        groups.append(Group(_group_name(recipe, _identity(own[0].config), rivals), tuple(own)))
    return groups


def _identity(config: Config) -> dict[str, object]:
    """The settings that make a recipe another one, by `section.key`."""
    content = config.to_dict()
    del content["summary"], content["checkpoint"], content["eval"]["every"]
    for section, names in (*FREE_TO_CHANGE.items(), ("run", PLACES)):
        for each in content[section] if isinstance(content[section], list) else [content[section]]:
            for name in names:
                if section != "model" or name in {"recompute", "compile"}:
                    del each[name]
    return flat(content)


def _recipe(runs: Sequence[Run]) -> str:
    """What the runs call their recipe; unfinished ones know their own name alone, which ends in the seed."""
    recipe = next((run.summary.recipe for run in runs if run.summary is not None), None)
    if recipe is None:
        return (runs[0].config.run.name or runs[0].name).removesuffix(f"-seed-{runs[0].config.run.seed}")
    return Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe


def _group_name(recipe: str, own: dict[str, object], rivals: Sequence[dict[str, object]]) -> str:
    """The recipe, with the settings in which it differs from others of that name."""
    keys = dict.fromkeys(key for rival in rivals for key in rival)
    differing = [key for key in keys if any(rival.get(key) != own.get(key) for rival in rivals)]
    if not differing:
        return recipe
    more = f", {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
    lasts = [key.rpartition(".")[2] for key in differing]
    short = [last if lasts.count(last) == 1 else key for key, last in zip(differing, lasts, strict=True)]
    named = [f"{name} {own.get(key)}" for name, key in zip(short[:SHOWN], differing, strict=False)]
    return f"{recipe} ({', '.join(named)}{more})"
