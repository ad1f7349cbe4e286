"""Shows a sweep at work: a line for each running job and one for all; plain lines where there is no terminal."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from trainer.sweep.plan import Run


class Display:
    """What is running, how many runs are done and left, and how long the rest may take.

    Args:
        console: where it is shown.
        total: runs of the sweep.
        done: of them before it began.
        images: that the runs which are left are to sample, for the estimate.
        at_once: runs at a time.
    """

    def __init__(self, console: Console, *, total: int, done: int, images: int, at_once: int) -> None:
        self._console = console
        self._total, self._done, self._images_left, self._at_once = total, done, images, at_once
        self._seconds = self._images = 0.0  # of the runs that were finished while it looked on
        self._tasks: dict[Run, tuple[TaskID, float]] = {}
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=10), MofNCompleteColumn())
        self._bar = Progress(*columns, console=console, refresh_per_second=2, disable=not console.is_terminal)
        self._all = self._bar.add_task("", total=total, completed=done)

    def start(self, run: Run, step: int) -> None:
        """A run starts, or goes on after a step."""
        task = self._bar.add_task(escape(run.name), total=run.config.run.steps, completed=step)
        self._tasks[run] = (task, time.monotonic())
        self._images_left -= step * run.images_a_step
        self._say(f"{run.name}: {'goes on after step ' + str(step) if step else 'started'}")

    def update(self, run: Run, step: int) -> None:
        """A run has taken so many steps."""
        self._bar.update(self._tasks[run][0], completed=step)

    def end(self, run: Run, *, steps: int, outcome: str) -> None:
        """A run has ended: `done`, or how else.

        Args:
            run: that has ended.
            steps: taken since it was started.
            outcome: what to say of it.
        """
        task, began_s = self._tasks.pop(run)
        self._bar.remove_task(task)
        took_s = time.monotonic() - began_s
        self._images_left -= steps * run.images_a_step
        if outcome == "done":
            self._done += 1
            self._seconds, self._images = self._seconds + took_s, self._images + steps * run.images_a_step
        self._bar.update(self._all, completed=self._done, description=escape(self._rest().removeprefix(", ")))
        self._say(f"{run.name}: {outcome} in {took_s:.0f} s; {self._done} of {self._total} done{self._rest()}")

    def _rest(self) -> str:
        """How long the rest may take, by the images a second of the runs that were finished."""
        if not self._images or self._done == self._total:
            return ""
        left = self._total - self._done
        seconds = max(0.0, self._images_left) * self._seconds / self._images / min(self._at_once, left)
        return (
            f", {left} left, about {seconds / 60:.0f} min" if seconds >= 90 else f", {left} left, about {seconds:.0f} s"
        )

    def _say(self, line: str) -> None:
        if self._bar.disable or "done" in line:
            self._console.print(escape(line), soft_wrap=True)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.stop()
