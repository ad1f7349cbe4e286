"""`serve`: an API and a worker for each reward, with a Redis where none is given, all living and dying together."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.processes import EXIT_INTERRUPTED, StartError, announce, bind, stop_on_signals, url_of
from services.redis_server import RedisServer
from services.settings import environment_of_children

logger = logging.getLogger(__name__)

START_S = 900.0
"""Loading a large reward model from a cold disk takes minutes; beyond this something is wrong."""
GRACE_S = 35.0
"""How long a child may take to finish what it has in hand, when all are told to stop."""
BROKEN_GRACE_S = 1.0
"""Likewise when one of them has died: what the others have in hand cannot be finished without it."""
REDIS_POLL_S = 0.5
REDIS_SPARE_BYTES = 256 * 2**20


@dataclass(slots=True)
class Child:
    """A process of ours, and what it said about its failure."""

    label: str
    process: asyncio.subprocess.Process
    error: str | None = None

    async def ready(self) -> None:
        """Wait for its first line; return only if that says that it is ready."""
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        message: dict[str, Any] = json.loads(line) if line.strip() else {}
        self.error = message.get("error")
        if not message or self.error is not None:
            await self.process.wait()
            await asyncio.Event().wait()  # its death is reported by whoever watches the processes


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What `serve` was asked to do.

    Attributes:
        names: the rewards.
        host, port: where the first API listens; the others take the ports after it, or any if it is 0.
        announces: whether to print the addresses as one JSON line on stdout when all are ready.
        until_stdin_closes: whether the end of stdin stops everything.
        log_file: where the log goes, or None for stderr.
        redis_url: where the queue lives, or None for a Redis of our own.
        queue_bytes: bound of the queue, by which our own Redis is sized.
    """

    names: Sequence[str]
    host: str
    port: int
    announces: bool
    until_stdin_closes: bool
    log_file: Path | None
    redis_url: str | None
    queue_bytes: int


def serve(options: ServeOptions) -> int:
    """Run everything until a signal, the end of stdin, or the death of a child.

    Returns:
        The exit code: 0 when told to stop, 130 on Ctrl-C.

    Raises:
        StartError: a port is taken, or a child died; everything is stopped by then.
        services.redis_server.RedisMissing: no Redis is given and none is found.
    """
    with contextlib.ExitStack() as stack:
        listeners = [
            stack.enter_context(bind(options.host, options.port + offset if options.port else 0))
            for offset in range(len(options.names))
        ]
        return asyncio.run(_supervise(options, listeners))


async def _supervise(options: ServeOptions, listeners: Sequence[socket.socket]) -> int:
    stop = asyncio.Event()
    received = stop_on_signals(stop, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
    if options.until_stdin_closes:
        _watch_stdin(stop)
    with contextlib.ExitStack() as stack:
        redis = None
        redis_url = options.redis_url
        if redis_url is None:
            redis = stack.enter_context(RedisServer(max_memory_bytes=2 * options.queue_bytes + REDIS_SPARE_BYTES))
            redis_url = redis.url
        environment = environment_of_children(redis_url)
        children: list[Child] = []
        urls = {name: url_of(listener) for name, listener in zip(options.names, listeners, strict=True)}
        try:
            for name, listener in zip(options.names, listeners, strict=True):
                descriptor = listener.fileno()
                children.append(await _start("api", name, options, environment, "--fd", str(descriptor), fd=descriptor))
                children.append(await _start("worker", name, options, environment))
                listener.close()  # its API listens now; a copy here would take connections that nobody serves
            await _until_stopped(children, redis, stop, urls, announces=options.announces)
        finally:
            await _stop(children, received, GRACE_S if stop.is_set() else BROKEN_GRACE_S)
    return EXIT_INTERRUPTED if signal.SIGINT in received else 0


async def _start(
    role: str, name: str, options: ServeOptions, environment: dict[str, str], *arguments: str, fd: int | None = None
) -> Child:
    command = [sys.executable, "-m", "services", role, name, "--announce", "--parent", str(os.getpid()), *arguments]
    if options.log_file is not None:
        command += ["--log-file", str(options.log_file)]
    if not options.announces:
        command.append("--verbose")
    process = await asyncio.create_subprocess_exec(
        *command,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        pass_fds=() if fd is None else (fd,),
        start_new_session=True,  # Ctrl-C is for the supervisor, which stops the children in order
    )
    return Child(f"{role} {name}", process)


async def _until_stopped(
    children: Sequence[Child], redis: RedisServer | None, stop: asyncio.Event, urls: dict[str, str], *, announces: bool
) -> None:
    """Announce when all are ready; return when told to stop.

    Raises:
        StartError: a child died, or was not ready in time.
    """
    exits = {asyncio.create_task(child.process.wait()): child for child in children}
    stopped = asyncio.create_task(stop.wait())
    ready = asyncio.create_task(_all_ready(children))
    redis_died = asyncio.create_task(_wait_for_redis(redis))
    watched: set[asyncio.Task[Any]] = {*exits, stopped, redis_died}
    tasks: set[asyncio.Task[Any]] = {ready, *watched}
    try:
        done, _ = await asyncio.wait(tasks, timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise StartError(f"the services were not ready after {START_S:g} s: see the log")
        if ready in done and not done & watched:
            ready.result()
            logger.info("ready: %s", urls)
            if announces:
                announce({"rewards": urls})
            done, _ = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        if stopped in done:
            return
        if redis_died in done:
            raise StartError("the embedded Redis died: see the log, or set REDIS_URL")
        child = next(exits[task] for task in exits if task in done)
        await _drain_error(child)
        code = child.process.returncode
        raise StartError(f"{child.label}: {child.error or f'died with exit code {code}: see the log'}")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _all_ready(children: Sequence[Child]) -> None:
    await asyncio.gather(*(child.ready() for child in children))


async def _drain_error(child: Child) -> None:
    """Read an error that a dying child announced after it had been ready."""
    if child.error is None and child.process.stdout is not None:
        with contextlib.suppress(TimeoutError, ValueError, RuntimeError):
            async with asyncio.timeout(1.0):
                rest = await child.process.stdout.read()
                lines = [json.loads(line) for line in rest.splitlines() if line.strip()]
                child.error = next((line["error"] for line in lines if "error" in line), None)


async def _wait_for_redis(redis: RedisServer | None) -> None:
    """Return when our own Redis has died; never, if there is none."""
    if redis is None or redis.process is None:
        await asyncio.Event().wait()
        return
    while redis.process.poll() is None:  # noqa: ASYNC110 - a Popen has no event to wait for
        await asyncio.sleep(REDIS_POLL_S)


async def _stop(children: Sequence[Child], received: list[int], grace_s: float) -> None:
    """Stop the APIs, which still need the workers to finish, and then the workers; each role has `grace_s`."""
    for role in ("api", "worker"):
        group = [child for child in children if child.label.startswith(role)]
        for child in group:
            with contextlib.suppress(ProcessLookupError):
                child.process.terminate()
        waits = asyncio.gather(*(child.process.wait() for child in group))
        signals = len(received)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while not waits.done() and len(received) == signals:  # a further signal means: at once
                    await asyncio.wait([waits], timeout=0.05)
        for child in group:
            with contextlib.suppress(ProcessLookupError):
                child.process.kill()
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
