"""Calls of one script that are made at the same time, sent as one: a round trip for all in place of one for each.

A client that waits for what the script adds to a stream then finds all of it at once.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis

AT_ONCE = 64
"""Calls in one run of the script: Redis does nothing else meanwhile."""

Argument = str | int | bytes


class Calls:
    """A script of `lua` that answers several calls in one run; each has its own answer."""

    def __init__(self, redis: "Redis", script: str, *, keys: Sequence[str], head: Sequence[Argument]) -> None:
        """Bind the script.

        Args:
            redis: a client of `streams.connect`.
            script: in Lua; it ends as `lua` says.
            keys: for all calls.
            head: the arguments that all calls share.
        """
        self._script = redis.register_script(script)
        self._keys = list(keys)
        self._head = list(head)
        self._waiting: list[tuple[Sequence[Argument], asyncio.Future[Any]]] = []
        self._sending: asyncio.Task[None] | None = None

    async def __call__(self, *args: Argument) -> Any:
        """Call the script with these arguments after the head; others that call meanwhile go with the next run.

        A caller that is cancelled does not take its call back.

        Raises:
            RedisError, OSError: as any command; then all calls of the run fail alike.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((args, future))
        if self._sending is None:
            self._sending = asyncio.create_task(self._send())
        return await future

    async def _send(self) -> None:
        try:
            while self._waiting:
                calls, self._waiting = self._waiting[:AT_ONCE], self._waiting[AT_ONCE:]
                args = [*self._head, *(part for call, _ in calls for part in (len(call), *call))]
                try:
                    answers = await self._script(keys=self._keys, args=args)
                except BaseException as error:
                    for _, future in calls:
                        if not future.done():
                            # One each: a traceback belongs to who raises it.
                            future.set_exception(_like(error))
                    if not isinstance(error, Exception):
                        raise
                    continue
                for (_, future), answer in zip(calls, answers, strict=True):
                    if not future.done():
                        future.set_result(answer)
        finally:
            self._sending = None
            for _, future in self._waiting:  # only where this task was cancelled
                future.cancel()


def _like(error: BaseException) -> BaseException:
    """An error of the same kind and words, with the first as its cause."""
    if not isinstance(error, Exception):
        return asyncio.CancelledError()
    try:
        copy = type(error)(*error.args)
    except TypeError:
        return error
    copy.__cause__ = error
    return copy
