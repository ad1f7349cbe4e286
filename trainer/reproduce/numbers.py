"""What the programme's commands wrote, by sweep, point and seed."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from trainer.config import ConfigError
from trainer.reproduce.stages import SWEEPS, evaluation

ALL = "all"
REMEDY = "run the programme first"
Numbers = Mapping[str, Any]


@dataclass(frozen=True)
class Programme:
    """The numbers of some seeds.

    Args:
        seeds: that are done.
        sweeps: each sweep's `sweep.json`.
        plain: each seed's `evaluation.json` by plain samples.
        inference: the first seed's, by samples as at inference.
    """

    seeds: tuple[int, ...]
    sweeps: Mapping[str, Numbers]
    plain: Mapping[int, Numbers]
    inference: Numbers

    def run(self, sweep: str, point: str, seed: int) -> Numbers:
        """What `sweep.json` says of a run."""
        found = next(each for each in self.sweeps[sweep]["points"] if each["name"] == point)
        run: Numbers = next(each for each in found["runs"] if each["seed"] == seed)
        return run

    def points(self, sweep: str) -> list[str]:
        """The names of a sweep's points, in order."""
        return [point["name"] for point in self.sweeps[sweep]["points"]]

    def measure(self, row: str, name: str, seed: int, *, split: str = ALL, key: str = "mean") -> float:
        """A measure of a policy's plain samples: `mean`, or `std` over images."""
        return measure_of(self.plain[seed], row, name, split=split, key=key)

    def over_seeds(self, value: Callable[[int], float]) -> list[float]:
        """A number for each seed."""
        return [value(seed) for seed in self.seeds]

    def mean(self, value: Callable[[int], float]) -> float:
        """Its mean over the seeds."""
        return fmean(self.over_seeds(value))


def measure_of(content: Numbers, row: str, name: str, *, split: str = ALL, key: str = "mean") -> float:
    """A measure of a row of an `evaluation.json`."""
    found = next(each for each in content["rows"] if each["name"] == row)
    return float(found["splits"][split]["measures"][name][key])


def read(folder: Path, seeds: Sequence[int]) -> Programme:
    """Reads what the programme has written.

    Args:
        folder: of the programme.
        seeds: that are wanted; all of their runs must be done.

    Raises:
        ConfigError: something is not there yet.
    """
    sweeps = {name: _read(folder / name / "sweep.json") for name in SWEEPS}
    for name, content in sweeps.items():
        for point in content["points"]:
            done = {run["seed"] for run in point["runs"] if run["done"]}
            if left := [seed for seed in seeds if seed not in done]:
                raise ConfigError(
                    f"{folder / name / point['name']}: seed {left[0]} is not done; run the programme first"
                )
    plain = {seed: _read(evaluation(folder, seed, plain=True) / "evaluation.json") for seed in seeds}
    inference = _read(evaluation(folder, seeds[0], plain=False) / "evaluation.json")
    return Programme(tuple(seeds), sweeps, plain, inference)


def _read(path: Path) -> Numbers:
    try:
        content: Numbers = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}; {REMEDY}") from error
    return content
