"""Short calls that are made at the same time, run one after the other in one turn of a thread.

To wake a thread for each picture, and the event loop for each that is decoded, costs as much as some of the pictures
themselves: all of them pass one lock around, and what comes one by one then goes through the queue one by one.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

TURN_S = 0.06
"""After so many seconds a turn ends with the call in hand. What was called is answered then, and until then it is
counted nowhere how much memory the results take."""


@dataclass(slots=True, eq=False)
class _Call:
    """A call, who waits for it, and what came of it."""

    function: Callable[[], Any]
    future: asyncio.Future[Any]
    result: Any = None
    error: Exception | None = None

    def run(self) -> None:
        if self.future.cancelled():
            return
        try:
            self.result = self.function()
        except StopIteration as error:  # which no future takes
            self.error = RuntimeError(f"StopIteration: {error}")
        except Exception as error:  # noqa: BLE001 - it is the caller's
            self.error = error
        except BaseException as error:  # noqa: BLE001 - it would end the thread, or with the future the event loop
            self.error = RuntimeError(f"{type(error).__name__}: {error}")

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

    async def __call__(self, function: Callable[[], T]) -> T:
        """Call a function on one of the threads.

        Where the caller is cancelled before its turn comes, nothing is called; what runs, runs to its end.

        Raises:
            Exception: whatever the function raises; RuntimeError for what is no Exception.
        """
        loop = asyncio.get_running_loop()
        call = _Call(function, loop.create_future())
        self._waiting.append(call)
        self._begin(loop)
        result: T = await call.future
        return result

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Give what waits to the threads that are idle, the same share to each."""
        while self._idle and self._waiting:
            share = -(-len(self._waiting) // self._idle)
            self._idle -= 1
            self._pool.submit(self._run, loop, [self._waiting.popleft() for _ in range(share)])

    def _run(self, loop: asyncio.AbstractEventLoop, calls: Sequence[_Call]) -> None:
        ends_s, done = time.monotonic() + TURN_S, 0
        for call in calls:
            call.run()
            done += 1
            if time.monotonic() >= ends_s:
                break
        loop.call_soon_threadsafe(self._end, loop, calls[:done], calls[done:])

    def _end(self, loop: asyncio.AbstractEventLoop, done: Sequence[_Call], rest: Sequence[_Call]) -> None:
        self._waiting.extendleft(reversed(rest))
        self._idle += 1
        self._begin(loop)
        for call in done:
            call.settle()
