"""Short calls that are made at the same time, run one after the other in one turn of a thread.

To wake a thread for each picture, and the event loop for each that is decoded, costs as much as some of the pictures
themselves: all of them pass one lock around, and what comes one by one then goes through the queue one by one.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

TURN_BYTES = 2**21
"""What the calls of one turn may weigh together, in bytes: the first is answered when the last is done."""


@dataclass(slots=True, eq=False)
class _Call:
    """A call, who waits for it, and what came of it."""

    function: Callable[[], Any]
    size: int
    future: asyncio.Future[Any]
    result: Any = None
    error: Exception | None = None

    def run(self) -> None:
        if self.future.cancelled():
            return
        try:
            self.result = self.function()
        except Exception as error:  # noqa: BLE001 - it is the caller's
            self.error = error

    def settle(self) -> None:
        if self.future.done():
            return
        if self.error is None:
            self.future.set_result(self.result)
        else:
            self.future.set_exception(self.error)


class Turns:
    """A few threads that take turns at short calls; each call has its own result, or its own error."""

    def __init__(self, threads: int) -> None:
        """Start with no thread.

        Args:
            threads: turns that run at a time.
        """
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="turn")
        self._idle = threads
        self._waiting: deque[_Call] = deque()

    async def __call__(self, function: Callable[[], T], size: int) -> T:
        """Call a function on one of the threads.

        Where the caller is cancelled before its turn comes, nothing is called; what runs, runs to its end.

        Args:
            function: without arguments.
            size: of what it works at, in bytes: how much of a turn it takes.

        Raises:
            Exception: whatever the function raises.
        """
        loop = asyncio.get_running_loop()
        call = _Call(function, size, loop.create_future())
        self._waiting.append(call)
        self._begin(loop)
        result: T = await call.future
        return result

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Give what waits to the threads that are idle, the same share to each."""
        while self._idle and self._waiting:
            share = -(-len(self._waiting) // self._idle)
            calls: list[_Call] = []
            size = 0
            while len(calls) < share and (not calls or size + self._waiting[0].size <= TURN_BYTES):
                calls.append(self._waiting.popleft())
                size += calls[-1].size
            self._idle -= 1
            self._pool.submit(self._run, loop, calls)

    def _run(self, loop: asyncio.AbstractEventLoop, calls: list[_Call]) -> None:
        for call in calls:
            call.run()
        loop.call_soon_threadsafe(self._end, loop, calls)

    def _end(self, loop: asyncio.AbstractEventLoop, calls: list[_Call]) -> None:
        self._idle += 1
        self._begin(loop)
        for call in calls:
            call.settle()
