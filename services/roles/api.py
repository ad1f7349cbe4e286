"""The API process: one reward over HTTP."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Coroutine
from types import FrameType
from typing import Any

import uvicorn
import uvloop

from services.app import create_app
from services.batching.keys import Keys
from services.batching.streams import connect
from services.batching.submit import SubmitQueue
from services.http.connection import patient_protocol
from services.http.service import Group
from services.processes import EXIT_INTERRUPTED, StartError, announce, return_freed_memory, spare_what_stays, url_of
from services.rewards import create_reward
from services.roles.contact import reach
from services.settings import Settings

logger = logging.getLogger(__name__)

API_GRACE_S = 30
"""How long a stopping API waits for the requests in hand."""
STARTED_POLL_S = 0.005


def run_api(
    name: str, listener: socket.socket, redis_url: str, settings: Settings, group: Group, *, announces: bool
) -> int:
    """Serve one reward over HTTP until a signal comes.

    Args:
        name: the reward, as `services.rewards.create_reward` knows it.
        listener: a listening socket.
        redis_url: where the queue lives.
        settings: limits, token, deadlines.
        group: the API processes that this is one of.
        announces: whether to print the address as JSON on stdout once requests are taken.

    Returns:
        The exit code.

    Raises:
        services.rewards.UnknownReward: there is no such reward.
        StartError: the application does not start, or Redis was never reached or lets it not in.
    """
    return_freed_memory()
    reward = create_reward(name, settings.reward_options)
    if "torch" in sys.modules:
        logger.warning("%s brings torch into its API, which has no use for it: import it in warmup instead", name)
    keys = Keys(reward.name, reward.version)

    @contextlib.asynccontextmanager
    async def open_queue() -> AsyncIterator[SubmitQueue]:
        redis = connect(redis_url, timeout_s=settings.redis_timeout_s)
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

    app = create_app(reward, settings, open_queue, group)
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
    patience = {"timeout_s": settings.redis_timeout_s, "patience_s": settings.redis_patience_s}
    contact = reach(redis_url, keys.alive, **patience)
    uvloop.run(_run_server(Server(config), listener, received, ready, contact, announces=announces))
    return EXIT_INTERRUPTED if signal.SIGINT in received else 0


async def _run_server(
    server: uvicorn.Server,
    listener: socket.socket,
    received: list[int],
    ready: dict[str, Any],
    contact: Coroutine[Any, Any, None],
    *,
    announces: bool,
) -> None:
    """Serve until told to stop, or until it is known that Redis will not be reached; meanwhile, 503 is answered."""
    contacting = asyncio.create_task(contact)

    def stop_if_failed(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            server.should_exit = True

    contacting.add_done_callback(stop_if_failed)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        server.should_exit = server.should_exit or bool(received)
        await asyncio.sleep(STARTED_POLL_S)
    if server.started and not server.should_exit:
        spare_what_stays()
        logger.info("ready: %s", ready)
        if announces:
            announce(ready)
    await serving
    if contacting.done():
        await contacting  # raises what ended the server
    contacting.cancel()
    if not server.started and not received:
        raise StartError("the application did not start: see the log")
