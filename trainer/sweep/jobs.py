"""Runs as processes, so many at a time: started, watched, told to stop.

The first signal is passed on, and each run finishes its step, saves and exits 75. The second ends all of them.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from trainer.failures import EXIT_SUSPENDED
from trainer.interrupt import Interrupt
from trainer.sweep.display import Display
from trainer.sweep.found import find, last_metrics, next_folder
from trainer.sweep.plan import Run

LOOK_S = 0.2
STOP_S = 5.0  # from the gentler to the harder way of ending a run at once
WITH_THREADS = ': "${OMP_NUM_THREADS:=$0}"; export OMP_NUM_THREADS; exec "$@"'
"""Gives a run its share of the processors, unless the user has said how many threads it shall have."""


@dataclass(frozen=True)
class Ended:
    """A run that is not done.

    Args:
        run: which one.
        code: of its exit; negative for a signal.
        words: the last line of its log.
    """

    run: Run
    code: int
    words: str

    @property
    def goes_on(self) -> bool:
        """Whether the same command goes on with it, and nothing need be mended."""
        return self.code == EXIT_SUSPENDED


@dataclass
class _Job:
    run: Run
    process: subprocess.Popen[bytes]
    folder: Path
    began: int

    def step(self) -> int:
        """After how many steps the run is."""
        return int(last_metrics(self.folder).get("step", self.began))


def run_all(
    todo: Sequence[Run],
    at_once: int,
    display: Display,
    interrupt: Interrupt,
    lock: IO[bytes],
    when_ended: Callable[[], object],
) -> list[Ended]:
    """Takes runs to their end, in order, until all have ended or a signal has come.

    Args:
        todo: runs that are not done.
        at_once: how many may run at a time.
        display: is told of each.
        interrupt: whose signals are passed on.
        lock: held by every run as well, so that the folder stays this sweep's until the last one has ended.
        when_ended: called after each run that has ended.

    Returns:
        Those that are not done: with an interrupt, none that only did as they were told.
    """
    waiting, running, ended = list(todo), list[_Job](), list[Ended]()
    threads, told = max(1, len(os.sched_getaffinity(0)) // at_once), False
    try:
        with interrupt.deferred():
            while running or (waiting and not interrupt.requested):
                while waiting and len(running) < at_once and not interrupt.requested:
                    running.append(_start(waiting.pop(0), threads, lock, display))
                if interrupt.requested and not told:
                    told = True
                    _signal(running, signal.SIGTERM)
                for job in [job for job in running if job.process.poll() is not None]:
                    running.remove(job)
                    ended += _end(job, display, told=told)
                    when_ended()
                for job in running:
                    display.update(job.run, job.step())
                time.sleep(LOOK_S)
    finally:
        _end_at_once(running)
    return ended


def _start(run: Run, threads: int, lock: IO[bytes], display: Display) -> _Job:
    run.log.parent.mkdir(parents=True, exist_ok=True)
    folder = find(run)
    step = 0 if folder is None else int(last_metrics(folder).get("step", 0))
    folder = folder or next_folder(run)
    with run.log.open("ab") as log:
        log.write(f"$ {shlex.join(['python', '-m', *run.arguments])}\n".encode())
        log.flush()
        # In a session of its own, so that Ctrl-C reaches the sweep alone, which then passes it on.
        process = subprocess.Popen(
            ["/bin/sh", "-c", WITH_THREADS, str(threads), sys.executable, "-m", *run.arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock.fileno(),),
        )
    display.start(run, step)
    return _Job(run, process, folder, step)


def _end(job: _Job, display: Display, *, told: bool) -> list[Ended]:
    """What to say of a run that has ended, and whether it is to be reported."""
    code = job.process.returncode
    outcome = {0: "done", EXIT_SUSPENDED: "stopped"}.get(code, f"failed (exit code {code})")
    was_told = told and code in {EXIT_SUSPENDED, 130, -signal.SIGTERM}
    display.end(job.run, steps=job.step() - job.began, outcome="stopped" if was_told else outcome)
    return [] if code == 0 or was_told else [Ended(job.run, code, last_line(job.run))]


def last_line(run: Run) -> str:
    """What a run's log ends with."""
    with run.log.open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - 10_000))
        lines = [line for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"


def _signal(jobs: Iterable[_Job], number: signal.Signals) -> None:
    for job in jobs:
        with suppress(ProcessLookupError):
            job.process.send_signal(number)


def _end_at_once(jobs: Sequence[_Job]) -> None:
    """End what still runs: its services end with it."""
    _signal(jobs, signal.SIGTERM)
    gives_up_s = time.monotonic() + STOP_S
    for job in jobs:
        with suppress(subprocess.TimeoutExpired):
            job.process.wait(max(0.0, gives_up_s - time.monotonic()))
    _signal([job for job in jobs if job.process.poll() is None], signal.SIGKILL)
    for job in jobs:
        job.process.wait()
