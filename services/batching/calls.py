"""Calls of one script that are made at the same time, sent together: a round trip for all in place of one for each."""

import asyncio
from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import NoScriptError

AT_ONCE = 64


class Calls:
    """A script whose calls share round trips; each has its own answer, or its own error."""

    def __init__(self, redis: "Redis", script: str) -> None:
        """Bind the script.

        Args:
            redis: a client of `streams.connect`.
            script: in Lua.
        """
        self._redis = redis
        self._script = redis.register_script(script)
        self._waiting: list[tuple[list[Any], asyncio.Future[Any]]] = []
        self._sending: asyncio.Task[None] | None = None

    async def __call__(self, keys: Sequence[str], args: Sequence[str | int | bytes]) -> Any:
        """Run the script once; others that are called meanwhile go with the next round trip.

        A caller that is cancelled does not take its call back.

        Raises:
            RedisError, OSError: as any command.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append(([len(keys), *keys, *args], future))
        if self._sending is None:
            self._sending = asyncio.create_task(self._send())
        return await future

    async def _send(self) -> None:
        try:
            while self._waiting:
                calls, self._waiting = self._waiting[:AT_ONCE], self._waiting[AT_ONCE:]
                try:
                    answers = await self._run([arguments for arguments, _ in calls])
                except BaseException as error:
                    for _, future in calls:
                        if not future.done():
                            # One each: a traceback belongs to who raises it.
                            future.set_exception(_like(error))
                    if not isinstance(error, Exception):
                        raise
                    continue
                for (_, future), answer in zip(calls, answers, strict=True):
                    if future.done():
                        continue
                    if isinstance(answer, Exception):
                        future.set_exception(answer)
                    else:
                        future.set_result(answer)
        finally:
            self._sending = None
            for _, future in self._waiting:  # only where this task was cancelled
                future.cancel()

    async def _run(self, calls: Sequence[list[Any]]) -> list[Any]:
        """Send some calls; those that Redis refused because it does not know the script are sent again."""
        answers = await self._pipeline(calls)
        unknown = [number for number, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
        if unknown:
            await self._redis.script_load(self._script.script)
            again = await self._pipeline([calls[number] for number in unknown])
            for number, answer in zip(unknown, again, strict=True):
                answers[number] = answer
        return answers

    async def _pipeline(self, calls: Sequence[list[Any]]) -> list[Any]:
        pipe = self._redis.pipeline(transaction=False)
        for arguments in calls:
            pipe.execute_command("EVALSHA", self._script.sha, *arguments)
        return list(await pipe.execute(raise_on_error=False))


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
