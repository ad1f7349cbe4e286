"""What the queue gives and holds: `python -m benchmarks.queue [--json FILE]`.

- workers: images a second of 1, 2 and 4 workers whose scorer sleeps, beside what their sleep alone would allow.
- aof: what it costs that Redis writes each job down (`appendonly yes`, `appendfsync everysec`).
- memory: what an image of 256×256 takes of Redis and of the API while it waits.

A real API, workers and a Redis of their own, with pixels in shared memory or through Redis. The scorer hardly needs a
processor, so that the figures hold on a machine that has other things to do. What is compared takes turns, round by
round; a figure is the median of the rounds. Each answer is held to the right scores.
"""

import argparse
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from redis import Redis
from rich.console import Console
from rich.table import Table

from benchmarks.contenders import OURS, request_of
from benchmarks.load import TIMEOUT_S, load
from benchmarks.serving import stop
from benchmarks.sleeper import FORWARD_S, Sleeper
from services.batching.keys import Keys
from services.images import encode_batch
from services.redis_server import RedisServer
from services.settings import environment_of_children
from trainer import machine

PARTS = ("workers", "aof", "memory")
SLEEPER = "benchmarks.sleeper:Sleeper"
KEYS = Keys(Sleeper.name, Sleeper.version)
MAX_BATCH, REQUEST_IMAGES, SIDE = 32, 16, 64
CLIENTS = 32
"""Enough for a full batch in the hands of each of four workers and another that waits."""
FEW_CLIENTS = 2
AOF_WORKERS = 2
MEMORY_SIDE = 256
WAIT_S = 60.0
SETTLE_S = 3.0
"""Redis gives back the buffer of a connection that was silent for two seconds."""


class Flow(NamedTuple):
    """What went through, at one load.

    Attributes:
        images_s: images a second with every worker busy.
        of_ideal: the same, of what workers that only sleep could do.
        p50_ms, p99_ms: of a request under that load.
        idle_p50_ms, idle_p99_ms: of a request where no other waits; 0 where it was not asked for.
        aof_bytes: bytes that Redis wrote to its log for an image.
    """

    images_s: float
    of_ideal: float
    p50_ms: float
    p99_ms: float
    idle_p50_ms: float = 0.0
    idle_p99_ms: float = 0.0
    aof_bytes: float = 0.0


class Held(NamedTuple):
    """Bytes that one waiting image takes: of Redis (`used_memory`) and of the API (resident set)."""

    redis: float
    api: float


class Fleet(NamedTuple):
    """Running processes.

    Attributes:
        port: of the API.
        api: its process id.
        redis: a client of their Redis.
    """

    port: int
    api: int
    redis: "Redis"


@contextlib.contextmanager
def fleet(
    workers: int, *, shared: bool, aof: bool = False, reward: str = SLEEPER, settings: Mapping[str, str] | None = None
) -> Iterator[Fleet]:
    """Start a Redis, an API and workers of a reward, and end them after the block.

    Args:
        workers: how many.
        shared: whether pixels go through shared memory.
        aof: whether Redis logs each write.
        reward: as `python -m services` knows it.
        settings: variables of their environment, in place of those for the sleeper.

    Raises:
        RuntimeError: one of them does not start.
    """
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(RedisServer())
        redis = stack.enter_context(Redis.from_url(server.url))
        if aof:
            log_all(redis)
        environment = {
            **environment_of_children(server.url),
            "PYTHONPATH": str(machine.ROOT),
            "REWARD_SHARED_MEMORY": str(shared).lower(),
            **({"OMP_NUM_THREADS": "1", "REWARD_MAX_BATCH": str(MAX_BATCH)} if settings is None else settings),
        }
        roles = [["api", reward, "--port", "0"], *([["worker", reward]] * workers)]
        children = [stack.enter_context(child(role, environment)) for role in roles]
        said = [announced(each) for each in children]
        (url,) = said[0]["rewards"].values()
        yield Fleet(int(url.rpartition(":")[2]), children[0].pid, redis)


@contextlib.contextmanager
def child(role: Sequence[str], environment: dict[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    """Start `python -m services ROLE`, which ends with this process or with the block."""
    command = [sys.executable, "-m", "services", *role, "--announce", "--parent", str(os.getpid())]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=machine.ROOT, env=environment, start_new_session=True, **streams)
    try:
        yield process
    finally:
        stop(process)
        assert process.stdout is not None
        process.stdout.close()


def announced(process: "subprocess.Popen[bytes]") -> dict[str, Any]:
    """What a child says once it is ready.

    Raises:
        RuntimeError: it cannot start.
    """
    assert process.stdout is not None
    said: dict[str, Any] = json.loads(process.stdout.readline() or b'{"error": "it ended without a word"}')
    if "error" in said:
        raise RuntimeError(f"a process of the services did not start: {said['error']}")
    return said


def log_all(redis: "Redis") -> None:
    """Have Redis append every write to its log, flushed to disk every second, and never rewrite that."""
    for name, value in (("appendfsync", "everysec"), ("auto-aof-rewrite-percentage", "0"), ("appendonly", "yes")):
        redis.config_set(name, value)

    def is_written() -> bool:
        said: Any = redis.info("persistence")
        return said["aof_enabled"] == 1 and not said["aof_rewrite_in_progress"] and not said["aof_rewrite_scheduled"]

    wait_until(is_written, "the append-only file")


def aof_size(redis: "Redis") -> int:
    """Bytes of the append-only file; 0 where there is none."""
    said: Any = redis.info("persistence")
    return int(said.get("aof_current_size", 0))


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait for something.

    Raises:
        RuntimeError: it does not come about.
    """
    gives_up_s = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > gives_up_s:
            raise RuntimeError(f"{what}: not within {WAIT_S:g} s")
        time.sleep(0.02)


def images_of(count: int, side: int) -> NDArray[np.uint8]:
    """Noise, always alike: uint8 (count, side, side, 3)."""
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def flow(workers: int, seconds: float, *, shared: bool = True, aof: bool = False, idle: bool = False) -> Flow:
    """Load a fleet from clients that keep every worker busy, and, if asked for, then from few that find it idle."""
    images_BHWC = images_of(REQUEST_IMAGES, SIDE)
    expected = images_BHWC[:, 0, 0, 0].astype(float).tolist()
    with fleet(workers, shared=shared, aof=aof) as running:
        request = request_of(OURS, "w1", encode_batch(images_BHWC), running.port)
        asking: dict[str, Any] = {"images": REQUEST_IMAGES, "pid": running.api, "expected": expected}
        before, counted = aof_size(running.redis), scored(running.redis)
        full = load(running.port, request, clients=CLIENTS, seconds=seconds, **asking)
        wait_until(lambda: queued(running.redis) == 0, "an empty queue")
        written, images = aof_size(running.redis) - before, scored(running.redis) - counted
        few = load(running.port, request, clients=FEW_CLIENTS, seconds=seconds, **asking) if idle else None
    ideal = workers * MAX_BATCH / FORWARD_S
    rest = (few.p50_ms, few.p99_ms) if few else (0.0, 0.0)
    return Flow(full.images_s, full.images_s / ideal, full.p50_ms, full.p99_ms, *rest, written / images)


def scored(redis: "Redis") -> int:
    """Images that workers have scored."""
    counted: Any = redis.hget(KEYS.events, "batch_images")
    return int(counted or 0)


def queued(redis: "Redis") -> int:
    """Images that wait or are in work."""
    counted: Any = redis.hget(KEYS.load, "images")
    return int(counted or 0)


def resident(pid: int) -> int:
    """Bytes of a process's resident set."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def held(images: int, *, shared: bool) -> Held:
    """Fill the queue of an API that has no worker, and see what that takes."""
    body = encode_batch(images_of(REQUEST_IMAGES, MEMORY_SIDE))
    with fleet(0, shared=shared) as running, contextlib.ExitStack() as stack:
        request = request_of(OURS, "w1", body, running.port)

        def send(total: int) -> None:
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", running.port), TIMEOUT_S))
            connection.sendall(request)
            wait_until(lambda: queued(running.redis) == total, f"{total} images in the queue")

        send(REQUEST_IMAGES)  # so that what is there but once is there
        before = memory_of(running)
        requests = images // REQUEST_IMAGES
        for number in range(requests):
            send((number + 2) * REQUEST_IMAGES)
        after = memory_of(running)
    count = requests * REQUEST_IMAGES
    return Held((after.redis - before.redis) / count, (after.api - before.api) / count)


def memory_of(running: Fleet) -> Held:
    """Bytes of Redis and of the API, all in all, once they have come to rest."""
    time.sleep(SETTLE_S)
    said: Any = running.redis.info("memory")
    return Held(said["used_memory"], resident(running.api))


def median_of(rows: "Sequence[Flow] | Sequence[Held]") -> list[float]:
    """Each figure's median over the rounds."""
    return [statistics.median(column) for column in zip(*rows, strict=True)]


Ways = dict[str, Callable[[], "Flow | Held"]]


def ways(part: str, workers: Sequence[int], seconds: float, images: int) -> Ways:
    """What a part compares: by name, how it is measured."""
    if part == "workers":
        return {str(count): lambda count=count: flow(count, seconds) for count in workers}
    paths = {"shared memory": True, "through Redis": False}
    if part == "memory":
        return {name: lambda shared=shared: held(images, shared=shared) for name, shared in paths.items()}
    return {
        f"{name}, {'AOF' if aof else 'no AOF'}": lambda shared=shared, aof=aof: flow(
            AOF_WORKERS, seconds, shared=shared, aof=aof, idle=True
        )
        for name, shared in paths.items()
        for aof in (False, True)
    }


def run(compared: Ways, rounds: int) -> dict[str, list[Any]]:
    """Measure the ways in turn, each round in the other order."""
    results: dict[str, list[Any]] = {name: [] for name in compared}
    for number in range(rounds):
        for name in list(compared)[:: -1 if number % 2 else 1]:
            results[name].append(compared[name]())
    return results


def show(part: str, results: dict[str, list[Any]]) -> None:
    """Print the table of a part."""
    if part == "memory":
        pixels = MEMORY_SIDE * MEMORY_SIDE * 3
        table = Table(
            "", "Redis", "API", "both", "× its pixels", title=f"memory: bytes an image of {pixels} bytes that waits"
        )
        for name, rows in results.items():
            redis, api = median_of(rows)
            figures = (redis, api, redis + api)
            table.add_row(name, *(f"{figure:,.0f}" for figure in figures), f"{(redis + api) / pixels:.2f}")
    else:
        title = f"{part}: {REQUEST_IMAGES} images of {SIDE}×{SIDE} a request, {FORWARD_S:g} s for {MAX_BATCH} at most"
        columns = ("images/s", "of ideal", "p50 ms", "p99 ms")
        table = Table("", *columns, *(("idle p50", "idle p99", "AOF B/image") if part == "aof" else ()), title=title)
        for name, rows in results.items():
            images_s, of_ideal, *times, aof_bytes = median_of(rows)
            cells = [
                f"{images_s:,.0f}",
                f"{of_ideal:.2f}",
                *(f"{time_ms:.0f}" for time_ms in times),
                f"{aof_bytes:,.0f}",
            ]
            table.add_row(name, *cells[: len(table.columns) - 1])
    Console(width=120).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.queue", description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--workers", default="1,2,4", help="how many, one after the other")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--images", type=int, default=256, help="that wait while memory is measured")
    parser.add_argument("--json", type=Path, help="a file to keep every figure in")
    options = parser.parse_args(arguments)
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts has {', '.join(sorted(unknown))}, must be of {', '.join(PARTS)}")
    if options.images < REQUEST_IMAGES:
        parser.error(f"--images is {options.images}, must be at least {REQUEST_IMAGES}, the images of a request")
    with RedisServer() as server, Redis.from_url(server.url) as redis:
        said: Any = redis.info("server")
    about = {
        "date": machine.today(),
        "commit": machine.commit(),
        "processor": machine.processor(),
        "cores": os.cpu_count(),
        "load average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": {"Redis": said["redis_version"], **{name: version(name) for name in ("uvicorn", "redis")}},
        "rounds": options.rounds,
        "seconds": options.seconds,
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    results = {}
    for part in parts:
        counts = [int(count) for count in options.workers.split(",")]
        results[part] = run(ways(part, counts, options.seconds, options.images), options.rounds)
        show(part, results[part])
    if options.json:
        kept = {
            part: {name: [row._asdict() for row in rows] for name, rows in by.items()} for part, by in results.items()
        }
        options.json.write_text(json.dumps({"about": about, "results": kept}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
