"""A sweep's file, and the runs that it stands for; all of their settings are checked before the first one starts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.config import Config, ConfigError
from trainer.nearest import nearest
from trainer.options import explain, load_config, packaged_names, parse_overrides, read_yaml

SAFE = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
RESULTS, SUMMARY = "sweep.json", "summary.md"
"""Files beside the folders of the points, which therefore have other names."""
OWN = {
    "run.dir": "give --dir",
    "run.name": "it is made of recipe and seed",
    "run.seed": "give --seeds",
    "run.resume": "a sweep always goes on",
}
"""Settings that a sweep gives each run itself, and what to do instead."""
MOST_SEEDS = 1000  # a mistyped range must not fill the disk


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PointFile(_Part):
    """One point.

    Args:
        name: of its folder.
        value: where it stands on the axis; null where there is none.
        recipe: of its runs; the sweep's when null.
        settings: on top of the recipe's and the sweep's.
    """

    name: Annotated[str, Field(pattern=SAFE)]
    value: float | None = None
    recipe: str | None = None
    settings: dict[str, Any] = {}


class SweepFile(_Part):
    """What a sweep's file holds.

    Args:
        summary: one line.
        axis: what the points differ in; null for a set of recipes.
        recipe: of every point that names none of its own.
        settings: of every point, by the names that `python -m trainer.run` takes.
        points: at least one.
    """

    summary: str
    axis: str | None = None
    recipe: str | None = None
    settings: dict[str, Any] = {}
    points: Annotated[tuple[PointFile, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Run:
    """One run of a sweep: its point and seed, how it is started, and all of its settings."""

    point: str
    recipe: str
    seed: int
    options: tuple[str, ...]
    config: Config

    @property
    def arguments(self) -> list[str]:
        """What follows `python -m`."""
        return ["trainer.run", self.recipe, *self.options]

    @property
    def name(self) -> str:
        """What it is called in a message: `0.02/mini-aesthetic-seed-0`."""
        return f"{self.point}/{self.config.run.name}"

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return self.config.run.dir / f"{self.config.run.name}.log"

    @property
    def images_a_step(self) -> int:
        """Images that each step samples."""
        return self.config.rollout.labels * self.config.rollout.group_size


@dataclass(frozen=True)
class Plan:
    """A sweep: its file, where it goes, and the options of the command line that all of its runs take."""

    name: str
    file: SweepFile
    folder: Path
    options: tuple[str, ...] = ()

    def run(self, point: PointFile, seed: int) -> Run:
        """The run of a point and a seed.

        Raises:
            ConfigError: its settings are wrong; the message names the point.
        """
        where = f"sweep {self.name}, point {point.name}"
        recipe = point.recipe or self.file.recipe
        if recipe is None:
            raise ConfigError(f"{where}: no recipe; name one for the point, or one for the sweep")
        try:
            given = self.file.settings | point.settings | parse_overrides(self.options)
            place = {"run.dir": str(self.folder / point.name), "run.name": f"{Path(recipe).stem}-seed-{seed}"}
            options = tuple(_options({**given, **place, "run.seed": seed, "run.resume": "auto"}))
            config = load_config(recipe, parse_overrides(options))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        return Run(point.name, recipe, seed, options, config)

    def runs(self, seeds: Sequence[int], points: Sequence[str] = ()) -> list[Run]:
        """The runs of some seeds and points, all points when none is named; all points of the first seed come first.

        Raises:
            ConfigError: a point is unknown, or a setting is wrong.
        """
        names = [point.name for point in self.file.points]
        for name in points:
            if name not in names:
                raise ConfigError(f"--points: the sweep {self.name} has no point {name!r}; {nearest(name, names)}")
        return [
            self.run(point, seed) for seed in seeds for point in self.file.points if not points or point.name in points
        ]


def sweep_names() -> list[str]:
    """The sweeps that come with the package."""
    return packaged_names("sweeps")


def read_sweep(sweep: str) -> tuple[str, SweepFile]:
    """Name and content of a sweep, by its name or by the path of a YAML file.

    Raises:
        ConfigError: there is none, or something in it is wrong.
    """
    name, content = read_yaml(sweep, "sweep")
    try:
        file = SweepFile.model_validate(content)
        PointFile(name=name)  # a folder, too
    except ValidationError as error:
        raise ConfigError(f"sweep {name}: {explain(error, SweepFile)}") from error
    names = [point.name for point in file.points]
    twice = next((each for each in names if names.count(each) > 1), None)
    if twice is not None:
        raise ConfigError(f"sweep {name}: two points are named {twice}: give each a name of its own")
    if taken := {RESULTS, SUMMARY} & set(names):
        raise ConfigError(f"sweep {name}: no point can be named {min(taken)}, for the sweep writes a file of that name")
    for settings in (file.settings, *(point.settings for point in file.points)):
        refuse_own(settings, f"sweep {name}")
    return name, file


def refuse_own(settings: Mapping[str, Any], where: str) -> None:
    """Refuse the settings that a sweep gives its runs itself, and whole sections.

    Raises:
        ConfigError: there is one.
    """
    for key, value in settings.items():
        if key in OWN:
            raise ConfigError(f"{where}: {key} is the sweep's to set: {OWN[key]}")
        if isinstance(value, dict) and "." not in key:  # would set the rest of the section back to its defaults
            first = next(iter(value), "…")
            raise ConfigError(f"{where}: {key} is a section: name each of its settings, as in {key}.{first}")


def _options(settings: Mapping[str, Any]) -> list[str]:
    """Settings as options of the command line, which reads their values as YAML."""
    return [part for key, value in settings.items() for part in (f"--{key}", _text(value))]


def _text(value: object) -> str:
    """A value as YAML in one line; JSON is that, and a text is left as it is where it means itself."""
    try:
        if isinstance(value, str) and yaml.safe_load(value) == value:
            return value
    except yaml.YAMLError:
        pass
    return json.dumps(value, ensure_ascii=False, default=str)


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0-2`, `0,1,2` or both.

    Raises:
        ConfigError: it is not of that form, or one is there twice.
    """
    seeds: list[int] = []
    for part in text.replace(" ", "").split(","):
        first, dash, last = part.partition("-")
        is_range = first.isdecimal() and (last.isdecimal() or not dash)
        low, high = (int(first), int(last or first)) if is_range else (1, 0)
        if not low <= high < low + MOST_SEEDS:
            raise ConfigError(f"--seeds {text}: write 0-2 or 0,1,2, and {MOST_SEEDS:,} seeds at most")
        seeds += range(low, high + 1)
    twice = next((seed for seed in seeds if seeds.count(seed) > 1), None)
    if twice is not None:
        raise ConfigError(f"--seeds {text}: {twice} is there twice; give each once")
    return tuple(seeds)
