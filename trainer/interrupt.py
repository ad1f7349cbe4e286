"""SIGTERM and Ctrl-C: once, and the step in hand is finished and saved; twice, and the run ends at once.

Where there is no step to finish, while models load or in an evaluation, the first one ends the run at once.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

from rich.console import Console

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_S = 1.0
"""A terminal's Ctrl-C reaches a process itself and again by way of torchrun: within this time it is one."""


class Interrupted(KeyboardInterrupt):
    """The first signal, with no step to finish: the run is not done, and the same command begins it or goes on."""


class Interrupt:
    """Takes a process's signals while the context lasts; where nothing can be saved, they end it at once."""

    def __init__(self, console: Console, *, is_last: bool = False) -> None:
        """Nothing is taken yet.

        Args:
            console: where it is said that a signal was understood.
            is_last: whether the process ends with the context. Signals are then ignored: torchrun sends them to whoever
                ends a moment later than another rank, and the exit code would be lost.
        """
        self._console = console
        self._is_last = is_last
        self._defers = False
        self._first_s: float | None = None
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """Whether the run shall stop after this step."""
        return self._first_s is not None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block a first signal only sets `requested`; after an error also while the run is taken down."""
        self._defers = True
        yield
        self._defers = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within the block, itself in one of `deferred`, a first signal ends the run at once, as one before does."""
        self._defers = False
        try:
            if self.requested:
                raise Interrupted
            yield
        finally:
            self._defers = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self._first_s is not None and now_s - self._first_s > SAME_S:
            raise KeyboardInterrupt
        if not self._defers:
            self._first_s = now_s
            raise Interrupted
        if self._first_s is None:
            self._first_s = now_s
            name = signal.Signals(number).name
            self._console.print(
                f"{name}: finishing and saving the step; once more ends the run at once", soft_wrap=True
            )

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if self._is_last else handler)  # type: ignore[arg-type]
