"""Starts the reward services a run does not name by url, and stops them with it.

The services run in a process of their own (`python -m services serve`), which ends when its standard input closes: so
nothing outlives a run, however the run ends.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty, Queue
from types import TracebackType
from typing import Self

STOP_S = 8.0  # between the gentler and the harder ways of stopping
START_S = 960.0  # a first start downloads weights; the services' own supervisor gives up a minute earlier, and says why


class LocalRewardsError(RuntimeError):
    """The services could not be started; the message holds their own last words and where the log is."""


class LocalRewards:
    """Reward services of this machine, for as long as the context lasts.

    Args:
        names: rewards to serve; none starts nothing.
        log: file that the services' log goes to.
        timeout_s: seconds until all of them must be ready.
    """

    def __init__(self, names: Sequence[str], log: Path, *, timeout_s: float = START_S) -> None:
        self._names, self._log, self._timeout_s = tuple(names), log, timeout_s
        self._process: subprocess.Popen[str] | None = None
        self._stopping = False
        self.urls: dict[str, str] = {}

    def __enter__(self) -> Self:
        if self._names:
            try:
                self._start()
            except BaseException:
                self._stop()
                raise
        return self

    def _start(self) -> None:
        command = [sys.executable, "-m", "services", "serve", *self._names, "--port", "0"]
        command += ["--announce", "--until-stdin-closes"]
        with self._log.open("a", encoding="utf-8") as log:
            # In a session of its own, so that Ctrl-C reaches the run alone, which then closes the services' input.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                cwd=os.getcwd(),
            )
        try:
            self.urls = dict(json.loads(self._first_line())["rewards"])
        except (ValueError, KeyError, TypeError) as error:
            raise LocalRewardsError(f"the services' announcement is not understood; see {self._log}") from error

    def _first_line(self) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        lines: Queue[str] = Queue()
        threading.Thread(
            target=lambda out: lines.put(out.readline()), args=(self._process.stdout,), daemon=True
        ).start()
        try:
            line = lines.get(timeout=self._timeout_s)
        except Empty:
            raise LocalRewardsError(
                f"{', '.join(self._names)}: not ready after {self._timeout_s:.0f} s; see {self._log}"
            ) from None
        if not line:
            raise LocalRewardsError(f"{', '.join(self._names)}: {self._last_words(self._process)}")
        return line

    def when_dead(self, tell: Callable[[LocalRewardsError], object]) -> None:
        """Has `tell` called, from another thread, if the services end before they are stopped."""
        process = self._process
        if process is None:
            return

        def watch() -> None:
            process.wait()
            if not self._stopping:
                tell(LocalRewardsError(f"{', '.join(self._names)}: {self._last_words(process)}"))

        threading.Thread(target=watch, name="local rewards", daemon=True).start()

    def _last_words(self, process: subprocess.Popen[str]) -> str:
        code = process.wait(timeout=10)
        lines = [line for line in self._log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
        return f"{lines[-1] if lines else 'no message'} (exit code {code}; log: {self._log})"

    def _stop(self) -> None:
        self._stopping = True
        process = self._process
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        for ask in (process.terminate, process.terminate, process.kill):  # a second signal means: at once
            try:
                process.wait(timeout=STOP_S)
                break
            except subprocess.TimeoutExpired:
                ask()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
        self._process = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop()
