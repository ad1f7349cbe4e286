"""A fleet of real processes on a real Redis, started again as they die, as an orchestrator would."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from services.batching.keys import Keys
from services.batching.streams import GROUP
from services.redis_server import find_redis
from tests.services.conftest import ROOT, wait_until

REWARD = "tests.services.dummies:Drilled"
LEASE_S = 2.0
SETTINGS = {
    "REWARD_LEASE_MS": str(int(1000 * LEASE_S)),
    "REWARD_SCORE_TIMEOUT_S": "1.5",
    "REWARD_MAX_BATCH": "64",
    "REWARD_QUEUE_IMAGES": "2048",
    "REWARD_REDIS_TIMEOUT_S": "2",
}
KEEP_POLL_S = 0.02


class Member:
    """One process of the fleet, started again whenever it ends; it and its log stay the same to others."""

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        self._command, self._environment, self._log = command, dict(environment), log
        self.starts = 0
        self.process = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        self.starts += 1
        with self._log.open("ab") as log:
            return subprocess.Popen(
                self._command, cwd=ROOT, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def keep(self) -> None:
        """Start it again if it has ended."""
        if self.process.poll() is not None:
            self.process = self._start()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to whatever process it is now."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def end(self) -> None:
        """End it for good."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)

    def log(self) -> str:
        """What all its processes wrote."""
        return self._log.read_text(errors="replace")


class Fleet:
    """Redis, APIs and workers of one reward; use as `with`.

    Args:
        folder: for logs and Redis's data.
        apis, workers: how many of each.
        durable: whether Redis keeps its data over a restart.
        settings: further variables of the environment.
    """

    def __init__(
        self, folder: Path, *, apis: int = 2, workers: int = 2, durable: bool = False, **settings: str
    ) -> None:
        self._folder = folder
        self._short = Path(tempfile.mkdtemp(prefix="f-"))  # the path of a socket may have a hundred bytes
        self._durable = durable
        self._counts = {"api": apis, "worker": workers}
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", **SETTINGS, **settings}
        self.environment["REDIS_URL"] = self.redis_url = f"unix://{self._short / 'redis.sock'}"
        self.apis: list[Member] = []
        self.workers: list[Member] = []
        self.urls: list[str] = []
        self.redis: Member
        self._stop = threading.Event()
        self._keeper = threading.Thread(target=self._keep_all, daemon=True)

    def __enter__(self) -> Self:
        try:
            self.redis = self._member("redis", self._redis_command())
            wait_until(self._answers)
            for _ in range(self._counts["api"]):
                self.add_api()
            for _ in range(self._counts["worker"]):
                self.add_worker()
            self._keeper.start()
            self.wait_ready()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        if self._keeper.is_alive():
            self._keeper.join()
        for member in self.members:
            member.end()
        for file in self._short.iterdir():
            if file.is_socket() or file.is_file():
                file.unlink()
        with contextlib.suppress(OSError):
            self._short.rmdir()

    @property
    def members(self) -> list[Member]:
        """All of them, Redis last."""
        return [*self.apis, *self.workers, *([self.redis] if hasattr(self, "redis") else [])]

    def add_api(self, **environment: str) -> str:
        """One more API; returns its address."""
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.apis.append(self._member(f"api-{len(self.apis)}", _services("api", "--port", str(port)), environment))
        self.urls.append(f"http://127.0.0.1:{port}")
        return self.urls[-1]

    def add_worker(self, **environment: str) -> None:
        """One more worker."""
        self.workers.append(self._member(f"worker-{len(self.workers)}", _services("worker"), environment))

    def _member(self, name: str, command: list[str], environment: Mapping[str, str] | None = None) -> Member:
        return Member(command, {**self.environment, **(environment or {})}, self._folder / f"{name}.log")

    def _redis_command(self) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": str(self._short / "redis.sock"),
            "dir": str(self._folder),
            "save": "",
            "appendonly": "yes" if self._durable else "no",
            "appendfsync": "always",
            "maxmemory": "256mb",
            "maxmemory-policy": "noeviction",
        }
        return [find_redis(), *(part for name, value in options.items() for part in (f"--{name}", value))]

    def _keep_all(self) -> None:
        while not self._stop.wait(KEEP_POLL_S):
            for member in self.members:
                member.keep()

    @contextlib.contextmanager
    def client(self) -> Iterator["Redis"]:
        """A client of the fleet's Redis."""
        with Redis.from_url(self.redis_url, socket_timeout=5) as redis:
            yield redis

    def _answers(self) -> bool:
        with contextlib.suppress(RedisError), self.client() as redis:
            return bool(redis.ping())
        return False

    def wait_ready(self) -> None:
        """Wait until every API says that it is ready."""

        def all_ready() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return all(httpx.get(f"{url}/readyz", timeout=5).status_code == 200 for url in self.urls)
            return False

        wait_until(all_ready, timeout_s=60)


def _services(role: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "services", role, REWARD, "--verbose", *arguments]


def left_behind(redis: "Redis", keys: Keys) -> list[str]:
    """What is in the queue, and what would stay for ever; empty once all is done."""
    left = []
    try:
        redis.ping()
    except RedisConnectionError:  # it was killed a moment ago
        return ["whatever is in a Redis that is not back yet"]
    if count := redis.xlen(keys.jobs):
        left.append(f"{count} entries in {keys.jobs}")
    with contextlib.suppress(RedisError):  # no group yet
        pending: Any = redis.xpending(keys.jobs, GROUP)
        if pending["pending"]:
            left.append(f"{pending['pending']} pending in {keys.jobs}")
    if payloads := redis.keys(keys.payload("*")):
        left.append(f"{len(payloads)} payloads")  # type: ignore[arg-type]
    found: Any = redis.keys("*")
    for key in found:
        if redis.ttl(key) == -1 and redis.type(key) != b"stream":
            left.append(f"{key!r} has no TTL")
    return left


def assert_clean(fleet: Fleet, version: str = "1") -> None:
    """Within one lease of the last answer nothing is left in the queue."""
    keys = Keys("drilled", version)
    ends_s = time.monotonic() + LEASE_S + 1.0  # for looking, on a busy machine
    with fleet.client() as redis:
        while left := left_behind(redis, keys):
            assert time.monotonic() < ends_s, left
            time.sleep(0.02)


def dead_letters(fleet: Fleet, version: str = "1") -> list[dict[bytes, bytes]]:
    """What the dead letters hold."""
    with fleet.client() as redis:
        entries: Any = redis.xrange(Keys("drilled", version).dead)
    return [fields for _, fields in entries]
