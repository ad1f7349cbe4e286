"""Where a run's numbers go: a JSON line a step, TensorBoard, a line on the terminal. docs/metrics.md defines them."""

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainer.config import Config
from trainer.loggers import LOGGERS, Logger
from trainer.models.checkpoints import write_atomically

Metrics = dict[str, float | None]


class Phases:
    """Seconds spent in each phase of a step, and in all of it.

    Args:
        device: a GPU's work is waited for at both ends of a phase, so that it counts where it was asked for; but not
            what other streams do beside it, as the copy of the step before does.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began = self._now()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Adds the time of the block to a phase."""
        began = self._now()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + self._now() - began

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return time.perf_counter()

    def metrics(self, images: int) -> Metrics:
        """`seconds/<phase>`, the seconds since the step began, and images a second over these."""
        total = self._now() - self._began
        named: Metrics = {f"seconds/{phase}": seconds for phase, seconds in self.seconds.items()}
        return named | {"seconds/step": total, "images_per_second": images / total}


def _drop_after(path: Path, step: int) -> None:
    """Keep of a file of metrics the lines up to a step: the steps after it are about to be taken again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines(keepends=True):
        try:
            is_later = json.loads(line)["step"] > step
        except (ValueError, KeyError, TypeError):  # cut short by a kill
            break
        if is_later or not line.endswith("\n"):
            break
        kept.append(line)
    content = "".join(kept).encode()
    write_atomically(path, len(content), lambda temporary: temporary.write_bytes(content))


class MetricsLog:
    """Writes each step's metrics to `metrics.jsonl` and the loggers, and shows them live; on the first rank alone.

    Args:
        folder: of the run.
        config: of the run.
        console: where the progress bar is drawn.
        done: steps that are done already; what the file has of later ones, which were not saved, is dropped.
        writes: whether this rank does anything at all.
    """

    def __init__(self, folder: Path, config: Config, console: Console, done: int, writes: bool) -> None:
        self._writes = writes
        self._bar = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=10),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=console,
            refresh_per_second=2,
            disable=not writes,
        )
        self._task = self._bar.add_task("starting", total=config.run.steps, completed=done)
        self._loggers: list[Logger] = []
        if writes:
            _drop_after(folder / "metrics.jsonl", done)
            self._loggers = [LOGGERS[name](folder, config.to_dict(), done) for name in config.run.loggers]
            self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Records one finished step; a value that is None is written as null and skipped by the loggers."""
        self._file.write(json.dumps({"step": step, **metrics}, allow_nan=False) + "\n")
        self._file.flush()
        for logger in self._loggers:
            logger.log(step, {name: value for name, value in metrics.items() if value is not None})
        self._bar.update(self._task, completed=step, description=_headline(metrics))

    def __enter__(self) -> Self:
        self._report_thread_error = threading.excepthook
        threading.excepthook = self._on_thread_error
        self._bar.start()
        return self

    def _on_thread_error(self, error: threading.ExceptHookArgs) -> None:
        """TensorBoard's writing thread hands its OSError to the next `write`; it need not be printed here as well."""
        if not isinstance(error.exc_value, OSError):
            self._report_thread_error(error)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.stop()
        if not self._writes:
            return
        try:
            self._file.close()
            for logger in self._loggers:
                logger.close()
        except OSError:
            if error is None:  # else a full disk has already been reported
                raise
        finally:
            threading.excepthook = self._report_thread_error


def _headline(metrics: Mapping[str, float | None]) -> str:
    shown = (
        ("reward", "reward", "{:.3f}"),
        ("success_rate", "success", "{:.0%}"),
        ("label_accuracy", "label", "{:.0%}"),
        ("kl", "kl", "{:.3f}"),
        ("images_per_second", "img/s", "{:.0f}"),
    )  # short enough for a terminal of 80 columns
    parts = []
    for name, short, form in shown:
        value = metrics.get(name)
        if value is not None:
            parts.append(f"{short} {form.format(value)}")
    return " ".join(parts)
