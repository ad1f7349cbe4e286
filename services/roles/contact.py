"""The first contact with Redis: that it lets nobody in is told at once, that it is not there after a while."""

import asyncio
import contextlib
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError

from services.batching.streams import connect
from services.processes import StartError

RETRY_S = 0.5
REFUSALS = (AuthenticationError, NoPermissionError)


async def check_access(redis: "Redis", url: str, key: str) -> None:
    """Ask once whether Redis lets this user in.

    Args:
        redis: a client of it.
        url: where it is.
        key: one that the user may read.

    Raises:
        StartError: it does not; one line that names the variable.
        RedisError, OSError: it cannot be asked.
    """
    try:
        await redis.exists(key)
    except (RedisError, OSError) as error:
        if not any(isinstance(each, REFUSALS) for each in (error, error.__cause__)):  # the client may wrap it
            raise
        raise StartError(
            f"REDIS_URL: Redis at {_place(url)} refuses the user or the password ({_line(error)}): correct them"
        ) from error


async def reach(url: str, key: str, *, timeout_s: float, patience_s: float) -> None:
    """Wait until Redis has answered once.

    Args:
        url: where it is.
        key: one that the user may read.
        timeout_s: of one attempt.
        patience_s: of all of them.

    Raises:
        StartError: it lets this user not in, or did not answer in time; one line that names the variable.
    """
    loop = asyncio.get_running_loop()
    gives_up_s = loop.time() + patience_s
    async with contextlib.aclosing(connect(url, timeout_s=timeout_s)) as redis:
        while True:
            try:
                return await check_access(redis, url, key)
            except (RedisError, OSError) as error:
                if loop.time() >= gives_up_s:
                    raise StartError(
                        f"REDIS_URL: Redis at {_place(url)} has not answered for {patience_s:g} s ({_line(error)}): "
                        "check that it runs and REDIS_URL names it"
                    ) from error
            await asyncio.sleep(RETRY_S)


def _place(url: str) -> str:
    """Host and port, or the path of the socket; never the password."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or 6379}" if parts.hostname else parts.path


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
