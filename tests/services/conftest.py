"""A real Redis, real processes, and helpers that wait for a condition instead of sleeping."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from numpy.typing import NDArray
from redis import Redis

from services.redis_server import RedisServer

ROOT = Path(__file__).resolve().parents[2]
START_S = 60.0


@pytest.fixture
def anyio_backend() -> str:
    """Run async tests on asyncio alone: the services use no other loop."""
    return "asyncio"


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One Redis for all tests."""
    with RedisServer(max_memory_bytes=256 * 2**20) as server:
        yield server


@pytest.fixture
def redis_url(redis_server: RedisServer) -> Iterator[str]:
    """An empty Redis; afterwards every key but the streams must have a TTL."""
    with Redis.from_url(redis_server.url) as client:
        client.flushall()
        yield redis_server.url
        keys: Any = client.keys("*")
        immortal = [key for key in keys if client.ttl(key) == -1 and client.type(key) != b"stream"]
        client.flushall()
    assert not immortal, f"keys without a TTL: {immortal}"


def wait_until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Wait until a condition holds; fail the test if it never does."""
    gives_up_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < gives_up_s, f"not within {timeout_s} s"
        time.sleep(0.01)


async def wait_until_async(condition: Callable[[], Awaitable[object]], timeout_s: float = 20.0) -> None:
    """Like `wait_until`, for a condition that is awaited."""
    gives_up_s = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < gives_up_s, f"not within {timeout_s} s"
        await asyncio.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def descendants(pid: int) -> list[int]:
    """The processes below a process."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if parent == pid:
            child = int(stat.parent.name)
            found += [child, *descendants(child)]
    return found


def command_line(pid: int) -> bytes:
    """The command line of a process, with a zero byte after each part; empty where it has gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def random_images(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    """Noise, uint8."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


class Process:
    """A `python -m services …` of a test."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str], stderr: IO[bytes]) -> None:
        self._stderr = stderr
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "services", *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
        self.pid = self._popen.pid

    def announced(self) -> dict[str, Any]:
        """The JSON line that says that it is ready."""
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        assert line, f"it ended without an announcement: {self.errors()}"
        message: dict[str, Any] = json.loads(line)
        return message

    def url(self) -> str:
        """The address of the one reward that it announces."""
        (url,) = self.announced()["rewards"].values()
        return str(url)

    def children(self, role: bytes) -> list[int]:
        """Its processes of a role, such as `worker`."""
        return [pid for pid in descendants(self._popen.pid) if f"\0{role.decode()}\0".encode() in command_line(pid)]

    def close_stdin(self) -> None:
        """What a parent's death does."""
        assert self._popen.stdin is not None
        self._popen.stdin.close()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to this process alone."""
        self._popen.send_signal(number)

    def wait(self, timeout_s: float = START_S) -> int:
        """Its exit code."""
        return self._popen.wait(timeout_s)

    def rest_of_stdout(self) -> bytes:
        """What it printed after the lines already read."""
        assert self._popen.stdout is not None
        return self._popen.stdout.read()

    def errors(self) -> str:
        """What it has written to stderr."""
        self._stderr.seek(0)
        return self._stderr.read().decode()

    def close(self) -> None:
        """End it, whatever it does."""
        if self._popen.poll() is None:
            self._popen.kill()
        self._popen.wait(START_S)
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Start `python -m services` with arguments and, by keyword, variables; all are ended with the test."""
    processes: list[Process] = []
    files: list[IO[bytes]] = []

    def starter(*arguments: str, **environment: str) -> Process:
        file = (tmp_path / f"stderr-{len(files)}").open("w+b")
        files.append(file)
        processes.append(Process(arguments, environment, file))
        return processes[-1]

    yield starter
    for process in reversed(processes):
        process.close()
    for file in files:
        file.close()
