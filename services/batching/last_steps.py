"""What is left to do for a request that has ended: a Redis that hangs must not hold up its answer."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from services.batching.streams import end

WAIT_S = 0.5
"""How long a request waits for each of its last steps."""


class LastSteps:
    """The last steps of requests, which go on without them."""

    def __init__(self) -> None:
        """Begin with none."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def do(self, step: Coroutine[Any, Any, None]) -> None:
        """Do it even if the caller is cancelled, and wait for it a moment."""
        task = asyncio.create_task(step)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.wait([task], timeout=WAIT_S)

    async def end(self) -> None:
        """Cancel those that are still under way."""
        for task in tuple(self._tasks):
            await end(task)
