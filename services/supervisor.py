"""`serve`: API and worker of each reward, with a Redis where none is given; what dies is started again."""

import asyncio
import contextlib
import itertools
import logging
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.children import Child
from services.folders import OwnFolder
from services.processes import EXIT_INTERRUPTED, StartError, announce, bind_several, stop_on_signals, url_of
from services.redis_server import RedisServer
from services.settings import environment_of_children

logger = logging.getLogger(__name__)

START_S = 900.0
"""Loading a large reward model from a cold disk takes minutes; beyond this something is wrong."""
GRACE_S = 35.0
"""How long a child may take to finish what it has in hand, when all are told to stop."""
BROKEN_GRACE_S = 1.0
"""Likewise when one of them is given up: what the others have in hand cannot be finished without it."""
REDIS_POLL_S = 0.5
REDIS_SPARE_BYTES = 256 * 2**20
MEMORY_ROOT = Path("/dev/shm")  # noqa: S108 - only mkdtemp writes there
METRICS_PREFIX = "reward-metrics-"
METRICS_SPARE_BYTES = 2**24


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What `serve` was asked to do.

    Attributes:
        names: the rewards.
        host, port: where the first API listens; the others take the ports after it, or any if it is 0.
        announces: whether to print the addresses as one JSON line on stdout when all are ready.
        until_stdin_closes: whether the end of stdin stops everything.
        log_file: where the log goes, or None for stderr.
        verbose: whether the children log more than warnings.
        redis_url: where the queue lives, or None for a Redis of our own.
        queue_bytes: bound of each reward's queue, by which our own Redis is sized.
        api_processes: of each reward.
    """

    names: Sequence[str]
    host: str
    port: int
    announces: bool
    until_stdin_closes: bool
    log_file: Path | None
    verbose: bool
    redis_url: str | None
    queue_bytes: int
    api_processes: int


def serve(options: ServeOptions) -> int:
    """Run everything until a signal or the end of stdin, or until a child has died too often.

    Returns:
        The exit code: 0 when told to stop, 130 on Ctrl-C.

    Raises:
        StartError: a port is taken, a child does not start, or one died too often; everything is stopped by then.
        services.redis_server.RedisMissing: no Redis is given and none is found.
    """
    with contextlib.ExitStack() as stack:
        listeners = []
        for offset in range(len(options.names)):
            port = options.port + offset if options.port else 0
            listeners.append(bind_several(options.host, port, options.api_processes))
            for listener in listeners[-1]:
                stack.enter_context(listener)
        return asyncio.run(_supervise(options, listeners))


async def _supervise(options: ServeOptions, listeners: Sequence[Sequence[socket.socket]]) -> int:
    """Run everything; `listeners` has for each reward a socket of each of its APIs."""
    stop = asyncio.Event()
    received = stop_on_signals(stop, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
    if options.until_stdin_closes:
        _watch_stdin(stop)
    with contextlib.ExitStack() as stack:
        redis = None
        redis_url = options.redis_url
        if redis_url is None:
            redis = stack.enter_context(RedisServer(max_memory_bytes=_redis_bytes(options)))
            redis_url = redis.url
        metrics = stack.enter_context(_metrics_folder()).path if options.api_processes > 1 else None
        children = _children(options, listeners, redis_url, metrics)
        urls = {name: url_of(group[0]) for name, group in zip(options.names, listeners, strict=True)}
        try:
            await _until_stopped(children, redis, stop, urls, announces=options.announces)
        finally:
            for listener in itertools.chain(*listeners):
                listener.close()  # so that no connection waits for an API that will not come back
            await _stop(children, received, GRACE_S if stop.is_set() else BROKEN_GRACE_S)
    return EXIT_INTERRUPTED if signal.SIGINT in received else 0


def _redis_bytes(options: ServeOptions) -> int:
    """What our own Redis may take: the queues of all rewards at their bounds, twice.

    While images are on their way in or out, buffers hold them once more.
    """
    return 2 * options.queue_bytes * len(options.names) + REDIS_SPARE_BYTES


def _metrics_folder() -> OwnFolder:
    """Where API processes count: in memory where the system has such a place, lest a full disk end them.

    Raises:
        StartError: it cannot be made, or has no room: a file that is mapped and cannot grow kills who writes.
    """
    reasons = []
    for root in (MEMORY_ROOT, Path(tempfile.gettempdir())):
        try:
            if (free := shutil.disk_usage(root).free) >= METRICS_SPARE_BYTES:
                return OwnFolder(METRICS_PREFIX, root)
            reasons.append(f"{root} has {free} bytes left, needs {METRICS_SPARE_BYTES}")
        except OSError as error:
            reasons.append(f"{root}: {error.strerror}")
    raise StartError(f"no folder for metrics ({'; '.join(reasons)}): make room, or set REWARD_API_PROCESSES=1")


def _children(
    options: ServeOptions, listeners: Sequence[Sequence[socket.socket]], redis_url: str, metrics: Path | None
) -> Sequence[Child]:
    """APIs and a worker for each reward. The sockets stay open here: while an API is started again, callers wait."""
    shared = [] if options.log_file is None else ["--log-file", str(options.log_file)]
    if options.verbose:
        shared.append("--verbose")
    children, environment = [], environment_of_children(redis_url)
    for place, (name, group) in enumerate(zip(options.names, listeners, strict=True)):
        for number, fd in enumerate((listener.fileno() for listener in group), start=1):
            arguments, label = [*shared, "--fd", str(fd)], f"api {name}"
            if metrics is not None:
                arguments += ["--metrics-folder", str(metrics / str(place))]
                label += f" ({number} of {len(group)})"
            children.append(Child("api", name, arguments, environment, fd, label=label))
        children.append(Child("worker", name, shared, environment, None, label=f"worker {name}"))
    return children


async def _until_stopped(
    children: Sequence[Child], redis: RedisServer | None, stop: asyncio.Event, urls: dict[str, str], *, announces: bool
) -> None:
    """Start all, announce when they are ready, keep them alive; return when told to stop.

    Raises:
        StartError: a child was not ready in time, or died before it was, or too often.
    """
    for child in children:
        await child.start()
    keeping = {asyncio.create_task(child.keep()) for child in children} | {asyncio.create_task(_keep_redis(redis))}
    ready = asyncio.create_task(_all_ready(children))
    stopped = asyncio.create_task(stop.wait())
    tasks: set[asyncio.Task[Any]] = {*keeping, ready, stopped}
    try:
        done, _ = await asyncio.wait(tasks, timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise StartError(f"the services were not ready after {START_S:g} s: see the log")
        if done == {ready}:
            _refuse_twins(children)
            logger.info("ready: %s, queue at %s", urls, redis.url if redis else "REDIS_URL")
            if announces:
                announce({"rewards": urls})
            done, _ = await asyncio.wait(tasks - {ready}, return_when=asyncio.FIRST_COMPLETED)
        if stopped not in done:
            for task in done & keeping:
                task.result()  # raises: it returns never
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _refuse_twins(children: Sequence[Child]) -> None:
    """Two rewards that name themselves alike would share a queue, and answer for each other.

    Raises:
        StartError: there are such.
    """
    names: dict[str, str] = {}
    for child in children:
        if child.serves is not None and names.setdefault(child.serves, child.name) != child.name:
            raise StartError(
                f"{names[child.serves]} and {child.name} both call themselves {child.serves}: "
                "give one of them another name or version"
            )


async def _all_ready(children: Sequence[Child]) -> None:
    await asyncio.gather(*(child.is_ready.wait() for child in children))


async def _keep_redis(redis: RedisServer | None) -> None:
    """Start our own Redis again when it dies; the APIs submit again what it lost. Returns never."""
    while True:
        await asyncio.sleep(REDIS_POLL_S)
        if redis is not None and redis.is_dead:
            logger.warning("the embedded Redis died; it is started again")
            redis.revive()


async def _stop(children: Sequence[Child], received: list[int], grace_s: float) -> None:
    """Stop the APIs, which still need the workers to finish, and then the workers; each role has `grace_s`."""
    for role in ("api", "worker"):
        group = [child for child in children if child.role == role]
        for child in group:
            child.terminate()
        waits = asyncio.gather(*(child.wait() for child in group))
        signals = len(received)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while not waits.done() and len(received) == signals:  # a further signal means: at once
                    await asyncio.wait([waits], timeout=0.05)
        for child in group:
            child.kill()
        await waits


def _watch_stdin(stop: asyncio.Event) -> None:
    """Stop when stdin ends. A stdin that is no pipe, socket or terminal (such as /dev/null) has ended already."""

    loop = asyncio.get_running_loop()

    def on_readable() -> None:
        try:
            data = os.read(0, 65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            loop.remove_reader(0)
            stop.set()

    try:
        loop.add_reader(0, on_readable)
    except (PermissionError, OSError, ValueError):
        logger.warning("stdin is no pipe and so has closed already: stopping (--until-stdin-closes)")
        stop.set()
