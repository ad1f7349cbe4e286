"""Short calls that share the turns of a few threads."""

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Callable

import pytest

from services.http.turns import Turns

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
    task = asyncio.create_task(turns(held))
    await asyncio.to_thread(held.runs.wait, 10)
    return task


def divide(by: int) -> Callable[[], float]:
    return lambda: 12 / by


async def test_each_caller_has_its_own_result_or_error(held: Held) -> None:
    """Also where they share a turn."""
    turns = Turns(1)
    busy = await occupy(turns, held)
    asking = [asyncio.create_task(turns(divide(by))) for by in (3, 0, 4)]
    await asyncio.sleep(0)
    held.lets_go.set()
    three, none, four = await asyncio.gather(*asking, return_exceptions=True)
    assert (three, four) == (4.0, 3.0)
    assert isinstance(none, ZeroDivisionError)
    await busy


@pytest.mark.parametrize(("turn_s", "sizes"), [(60.0, [1, 4]), (0.0, [1, 1, 1, 1, 1])])
async def test_a_turn_ends_when_its_time_is_over(
    held: Held, monkeypatch: pytest.MonkeyPatch, turn_s: float, sizes: list[int]
) -> None:
    """What waits is called in one turn, as far as there is time; the rest is called in the next, in order."""
    turns, order, seen = Turns(1), [], []
    busy = await occupy(turns, held)
    asking = [asyncio.create_task(turns(functools.partial(order.append, number))) for number in range(4)]
    await asyncio.sleep(0)
    monkeypatch.setattr("services.http.turns.TURN_S", turn_s)
    end = turns._end
    turns._end = lambda loop, done, rest: (seen.append(len(done)), end(loop, done, rest))  # type: ignore[method-assign, assignment, func-returns-value]
    held.lets_go.set()
    await asyncio.gather(*asking, busy)
    assert order == [0, 1, 2, 3]
    assert seen == sizes


@pytest.mark.parametrize("odd", [SystemExit, KeyboardInterrupt, StopIteration])
async def test_what_is_no_error_becomes_one(held: Held, odd: type[BaseException]) -> None:
    """It would end the thread or the event loop; its neighbours get their results, and the thread goes on."""
    turns = Turns(1)
    busy = await occupy(turns, held)

    def fails() -> None:
        raise odd("why")

    asking = [asyncio.create_task(turns(function)) for function in (fails, divide(6))]
    await asyncio.sleep(0)
    held.lets_go.set()
    failed, two = await asyncio.gather(*asking, return_exceptions=True)
    assert isinstance(failed, RuntimeError)
    assert str(failed) == f"{odd.__name__}: why"
    assert two == 2.0
    assert await turns(divide(4)) == 3.0
    await busy


async def test_idle_threads_share_what_comes() -> None:
    """Two calls on two threads run at the same time."""
    turns, meeting = Turns(2), threading.Barrier(2, timeout=10)
    await asyncio.gather(*(turns(meeting.wait) for _ in range(2)))


async def test_a_call_whose_caller_left_is_left_out(held: Held) -> None:
    """Nobody waits for it any more; those behind it get their results."""
    turns, called = Turns(1), threading.Event()
    busy = await occupy(turns, held)
    leaves = asyncio.create_task(turns(called.set))
    stays = asyncio.create_task(turns(divide(2)))
    await asyncio.sleep(0)
    leaves.cancel()
    await asyncio.wait([leaves])
    held.lets_go.set()
    assert await stays == 6.0
    assert not called.is_set()
    await busy
