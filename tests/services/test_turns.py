"""Short calls that share the turns of a few threads."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable

import pytest

from services.http.turns import TURN_BYTES, Turns

pytestmark = pytest.mark.anyio


class Held:
    """A call that occupies its thread until it is let go."""

    def __init__(self) -> None:
        self.runs, self.lets_go = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.runs.set()
        assert self.lets_go.wait(10)


@pytest.fixture
async def held() -> AsyncIterator[Held]:
    """Let go in the end, whatever happens."""
    held = Held()
    yield held
    held.lets_go.set()


async def occupy(turns: Turns, held: Held) -> "asyncio.Task[None]":
    """Keep a thread busy."""
    task = asyncio.create_task(turns(held, 1))
    await asyncio.to_thread(held.runs.wait, 10)
    return task


def divide(by: int) -> Callable[[], float]:
    return lambda: 12 / by


async def test_each_caller_has_its_own_result_or_error(held: Held) -> None:
    """Also where they share a turn."""
    turns = Turns(1)
    busy = await occupy(turns, held)
    asking = [asyncio.create_task(turns(divide(by), 1)) for by in (3, 0, 4)]
    await asyncio.sleep(0)
    held.lets_go.set()
    three, none, four = await asyncio.gather(*asking, return_exceptions=True)
    assert (three, four) == (4.0, 3.0)
    assert isinstance(none, ZeroDivisionError)
    await busy


async def test_what_waits_goes_in_turns_of_bounded_weight(held: Held) -> None:
    """One wake-up of the event loop for a turn; a call that is heavier than a turn has one of its own."""
    turns = Turns(1)
    busy = await occupy(turns, held)
    sizes = [TURN_BYTES // 4] * 6 + [2 * TURN_BYTES] + [1] * 3
    asking = [asyncio.create_task(turns(threading.get_ident, size)) for size in sizes]
    await asyncio.sleep(0)
    wakes: list[int] = []
    settled = turns._end
    turns._end = lambda loop, calls: (wakes.append(len(calls)), settled(loop, calls))  # type: ignore[method-assign, assignment, func-returns-value]
    held.lets_go.set()
    assert len(set(await asyncio.gather(*asking))) == 1
    assert wakes == [1, 4, 2, 1, 3]
    await busy


async def test_idle_threads_share_what_comes() -> None:
    """Two calls on two threads run at the same time."""
    turns, meeting = Turns(2), threading.Barrier(2, timeout=10)
    await asyncio.gather(*(turns(meeting.wait, 1) for _ in range(2)))


async def test_a_call_whose_caller_left_is_left_out(held: Held) -> None:
    """Nobody waits for it any more; those behind it get their results."""
    turns, called = Turns(1), threading.Event()
    busy = await occupy(turns, held)
    leaves = asyncio.create_task(turns(called.set, 1))
    stays = asyncio.create_task(turns(divide(2), 1))
    await asyncio.sleep(0)
    leaves.cancel()
    await asyncio.wait([leaves])
    held.lets_go.set()
    assert await stays == 6.0
    assert not called.is_set()
    await busy
