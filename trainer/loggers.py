"""Where a run's numbers go besides its file: TensorBoard, Prometheus, Weights & Biases, or what else is made alike."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from trainer.config import ConfigError
from trainer.prometheus import Prometheus, check_address


class Logger(Protocol):
    """Takes a step's numbers."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the numbers of a step, counted from 1."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Event files under the run's folder."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], done: int) -> None:
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the numbers of a step."""
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self._board.close()


class WeightsAndBiases:
    """A run of Weights & Biases, named after the folder; `WANDB_MODE=offline` keeps it here.

    A run that goes on is the same one there. What it repeats after a kill is dropped there as well as here only with
    an account that may rewind runs; without one, repeated steps are ignored, which on the CPU are the same numbers.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], done: int) -> None:
        import wandb  # noqa: PLC0415 - optional; `check` has looked for it

        self._run = wandb.init(
            project="var-grpo",
            name=folder.name,
            id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(folder),
            config=dict(settings),
            settings=wandb.Settings(silent=True),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the numbers of a step."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Write what is left."""
        self._run.finish()


LOGGERS: dict[str, Callable[[Path, Mapping[str, Any], int], Logger]] = {
    "tensorboard": TensorBoard,
    "prometheus": Prometheus,
    "wandb": WeightsAndBiases,
}
"""By their names in `run.loggers`: from a run's folder, its settings and the steps that are done."""


def check(names: Sequence[str]) -> None:
    """Find before any work that a logger cannot be had.

    Raises:
        ConfigError: it is not installed, or cannot listen where it is told to.
    """
    if "prometheus" in names:
        check_address()
    if "wandb" in names and find_spec("wandb") is None:
        raise ConfigError("run.loggers has wandb, which is not installed: pip install wandb")
