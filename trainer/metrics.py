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
from torch.utils.tensorboard import SummaryWriter

Metrics = dict[str, float | None]


class Phases:
    """Seconds spent in each phase of a step.

    Args:
        device: a GPU's work is waited for at both ends of a phase, so that it counts where it was asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
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
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def metrics(self, images: int) -> Metrics:
        """`seconds/<phase>`, their sum, and images a second over it."""
        total = sum(self.seconds.values())
        named: Metrics = {f"seconds/{phase}": seconds for phase, seconds in self.seconds.items()}
        return named | {"seconds/step": total, "images_per_second": images / total}


class MetricsLog:
    """Writes each step's metrics to `metrics.jsonl` and TensorBoard under a run's folder, and shows them live.

    Args:
        folder: of the run.
        steps: how many steps there will be.
        console: where the progress bar is drawn.
    """

    def __init__(self, folder: Path, steps: int, console: Console) -> None:
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"))
        self._bar = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=10),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=console,
            refresh_per_second=2,
        )
        self._task = self._bar.add_task("starting", total=steps)

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Records one finished step; a value that is None is written as null and skipped by TensorBoard."""
        self._file.write(json.dumps({"step": step, **metrics}, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            if value is not None:
                self._board.add_scalar(name, value, step)
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
        try:
            self._file.close()
            self._board.close()
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
