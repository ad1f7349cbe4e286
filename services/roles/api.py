"""The API process: one reward over HTTP."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import AsyncIterator
from types import FrameType
from typing import Any

import uvicorn

from services.app import create_app
from services.batching.streams import Keys, connect
from services.batching.submit import SubmitQueue
from services.http.connection import patient_protocol
from services.processes import EXIT_INTERRUPTED, StartError, announce, return_freed_memory, url_of
from services.rewards import create_reward
from services.settings import Settings

logger = logging.getLogger(__name__)

API_GRACE_S = 30
"""How long a stopping API waits for the requests in hand."""
STARTED_POLL_S = 0.005


def run_api(name: str, listener: socket.socket, redis_url: str, settings: Settings, *, announces: bool) -> int:
    """Serve one reward over HTTP until a signal comes.

    Args:
        name: the reward, as `services.rewards.create_reward` knows it.
        listener: a listening socket.
        redis_url: where the queue lives.
        settings: limits, token, deadlines.
        announces: whether to print the address as JSON on stdout once requests are taken.

    Returns:
        The exit code.

    Raises:
        services.rewards.UnknownReward: there is no such reward.
        StartError: the application does not start.
    """
    return_freed_memory()
    reward = create_reward(name, settings.reward_options)

    @contextlib.asynccontextmanager
    async def open_queue() -> AsyncIterator[SubmitQueue]:
        redis = connect(redis_url, timeout_s=settings.redis_timeout_s)
        keys = Keys(reward.name, reward.version)
        queue = SubmitQueue(
            redis,
            keys,
            queue_images=settings.queue_images,
            queue_bytes=settings.queue_bytes,
            lease_ms=settings.lease_ms,
            answer_ttl_s=settings.answer_ttl_s,
        )
        try:
            async with queue:
                yield queue
        finally:
            await redis.aclose()

    app = create_app(reward, settings, open_queue)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        ws="none",
        server_header=False,
        proxy_headers=False,
        http=patient_protocol(settings.upload_stall_s),
        timeout_graceful_shutdown=API_GRACE_S,
    )

    class Server(uvicorn.Server):
        """A server whose readiness ends with the first signal."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if service := getattr(app.state, "service", None):
                service.draining = True
            super().handle_exit(sig, frame)

    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises what it received again, when it has finished
        signal.signal(number, lambda sig, _: received.append(sig))
    url = url_of(listener)  # now: uvicorn closes the socket when it stops
    ready: dict[str, Any] = {"rewards": {name: url}, "serves": f"{reward.name} {reward.version}"}
    asyncio.run(_run_server(Server(config), listener, received, ready, announces=announces))
    return EXIT_INTERRUPTED if signal.SIGINT in received else 0


async def _run_server(
    server: uvicorn.Server, listener: socket.socket, received: list[int], ready: dict[str, Any], *, announces: bool
) -> None:
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        server.should_exit = server.should_exit or bool(received)
        await asyncio.sleep(STARTED_POLL_S)
    if server.started and not server.should_exit:
        logger.info("ready: %s", ready)
        if announces:
            announce(ready)
    await serving
    if not server.started and not received:
        raise StartError("the application did not start: see the log")
