"""Idempotency keys: the same key brings the same answer, without scoring again."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from redis.asyncio import Redis

from services.batching.answers import Answers
from services.batching.errors import DeadlinePassed, KeyReused, QueueAway
from services.batching.keys import Keys
from services.batching.streams import connect
from services.protocol import ScoreAnswer, Timing
from tests.services.batching.workbench import KEYS
from tests.services.conftest import ROOT, wait_until_async

pytestmark = [pytest.mark.redis, pytest.mark.anyio]


class Work:
    """Gives one answer after another, when it is allowed to."""

    def __init__(self) -> None:
        self.calls = 0
        self.go = asyncio.Event()

    async def __call__(self) -> bytes:
        self.calls += 1
        await self.go.wait()
        return b"answer %d" % self.calls


@pytest.fixture
def answers(redis: Redis) -> Answers:
    """The answers of one API."""
    return Answers(redis, KEYS, lease_ms=300, ttl_s=60)


async def test_a_repeat_brings_the_answer_back(redis: Redis, answers: Answers) -> None:
    """On any API of the same reward and version; another version scores for itself."""
    work = Work()
    work.go.set()
    assert await answers.once("key", "digest", work, deadline_s=5) == b"answer 1"
    other = Answers(redis, KEYS, lease_ms=300, ttl_s=60)
    assert await other.once("key", "digest", work, deadline_s=5) == b"answer 1"
    newer = Answers(redis, Keys(KEYS.reward, "2"), lease_ms=300, ttl_s=60)
    assert await newer.once("key", "digest", work, deadline_s=5) == b"answer 2"


async def test_a_repeat_of_one_in_flight_waits_for_it(answers: Answers) -> None:
    """Ten at once, for longer than a lease, are one piece of work and ten answers."""
    work = Work()
    repeats = [asyncio.create_task(answers.once("key", "digest", work, deadline_s=10)) for _ in range(10)]
    await asyncio.sleep(0.7)
    work.go.set()
    assert await asyncio.gather(*repeats) == [b"answer 1"] * 10
    assert work.calls == 1


async def test_the_key_of_another_request_is_refused(answers: Answers) -> None:
    """While the first is in flight as well as afterwards."""
    work = Work()
    first = asyncio.create_task(answers.once("key", "digest", work, deadline_s=5))
    await wait_until_async(_calls(work, 1))
    with pytest.raises(KeyReused):
        await answers.once("key", "other", work, deadline_s=5)
    work.go.set()
    await first
    with pytest.raises(KeyReused):
        await answers.once("key", "other", work, deadline_s=5)
    assert work.calls == 1


async def test_an_error_is_not_kept(answers: Answers) -> None:
    """Neither a failure nor a client that left stands in the way of a repeat."""

    async def fail() -> bytes:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await answers.once("key", "digest", fail, deadline_s=5)
    left = asyncio.create_task(answers.once("key", "digest", Work(), deadline_s=5))
    await asyncio.sleep(0.05)
    left.cancel()
    await asyncio.wait([left])
    work = Work()
    work.go.set()
    assert await answers.once("key", "digest", work, deadline_s=0.2) == b"answer 1"


async def test_a_dead_owner_is_replaced_after_its_lease(redis: Redis, answers: Answers) -> None:
    """The key of an API that was killed does not stay taken; its late answer is dropped."""
    await redis.hset(KEYS.answer("key"), mapping={"owner": "dead", "digest": "digest"})
    await redis.pexpire(KEYS.answer("key"), 300)
    work = Work()
    work.go.set()
    assert await answers.once("key", "digest", work, deadline_s=5) == b"answer 1"
    await answers._store(keys=[KEYS.answer("key")], args=["dead", "digest", b"late", 1000])
    assert await answers.once("key", "digest", work, deadline_s=5) == b"answer 1"


async def test_an_answer_outlives_the_loss_of_its_lease(redis: Redis, answers: Answers) -> None:
    """Redis lost its data meanwhile: the answer is right all the same, and is kept."""
    work = Work()
    first = asyncio.create_task(answers.once("key", "digest", work, deadline_s=5))
    await wait_until_async(_calls(work, 1))
    await redis.flushall()
    work.go.set()
    assert await first == b"answer 1"
    assert await answers.once("key", "digest", work, deadline_s=5) == b"answer 1"


@contextlib.asynccontextmanager
async def hanging(redis: Redis) -> AsyncIterator[None]:
    """Redis runs no script meanwhile."""
    await redis.execute_command("CLIENT", "PAUSE", 30_000, "WRITE")
    try:
        yield
    finally:
        await redis.execute_command("CLIENT", "UNPAUSE")


async def test_an_answer_does_not_wait_for_a_redis_that_hangs(redis: Redis) -> None:
    """It is given within a second; as soon as Redis wakes it is kept, and nothing is scored again."""
    answers, work = Answers(redis, KEYS, lease_ms=5000, ttl_s=60), Work()
    first = asyncio.create_task(answers.once("key", "digest", work, deadline_s=5))
    await wait_until_async(_calls(work, 1))
    async with hanging(redis):
        work.go.set()
        async with asyncio.timeout(2):
            assert await first == b"answer 1"
        repeat = asyncio.create_task(answers.once("key", "digest", work, deadline_s=5))
    assert await repeat == b"answer 1"
    assert work.calls == 1


async def test_an_error_does_not_wait_for_a_redis_that_hangs(redis: Redis) -> None:
    """It is told within a second; as soon as Redis wakes the key is free for a repeat."""
    answers = Answers(redis, KEYS, lease_ms=5000, ttl_s=60)
    at_it, fails = asyncio.Event(), asyncio.Event()

    async def fail() -> bytes:
        at_it.set()
        await fails.wait()
        raise DeadlinePassed

    first = asyncio.create_task(answers.once("key", "digest", fail, deadline_s=5))
    await at_it.wait()
    async with hanging(redis):
        fails.set()
        async with asyncio.timeout(2):
            with pytest.raises(DeadlinePassed):
                await first
    work = Work()
    work.go.set()
    assert await answers.once("key", "digest", work, deadline_s=2) == b"answer 1"


async def test_a_late_sign_of_life_leaves_a_kept_answer_alone(redis: Redis, answers: Answers) -> None:
    """One that was under way when the answer came: it is kept for its own time and not for a lease."""
    work = Work()
    work.go.set()
    await answers.once("key", "digest", work, deadline_s=5)
    owner = await redis.hget(KEYS.answer("key"), "owner")
    await answers._hold(keys=[KEYS.answer("key")], args=[owner, 300])
    assert await redis.pttl(KEYS.answer("key")) > 30_000


@pytest.mark.parametrize("images", [1, 16, 64, 256])
async def test_a_kept_answer_takes_no_more_than_the_page_of_settings_says(
    redis: Redis, answers: Answers, images: int
) -> None:
    """Redis needs room for all that are kept at a time: 700 bytes each, and 25 an image."""
    assert "up to 700 bytes of Redis, and 25 more for each image" in (ROOT / "docs" / "settings.md").read_text("utf-8")
    scores, timing = [-1.2345678901234567e-05] * images, Timing(queue=12345.678, score=12345.678)
    answer = ScoreAnswer(scores=scores, reward="brightness", version="1", timing_ms=timing).model_dump_json().encode()

    async def work() -> bytes:
        return answer

    key = "6d4bd1b2-7e0a-4c1f-9d8e-1f2a3b4c5d6e"
    await answers.once(key, "d" * 64, work, deadline_s=5)
    assert await redis.memory_usage(KEYS.answer(key)) <= 700 + 25 * images


async def test_waiting_ends_with_the_deadline(answers: Answers) -> None:
    """The repeat's own deadline, whatever the first one's."""
    work = Work()
    first = asyncio.create_task(answers.once("key", "digest", work, deadline_s=60))
    await wait_until_async(_calls(work, 1))
    with pytest.raises(DeadlinePassed, match=r"0\.3 s"):
        await answers.once("key", "digest", work, deadline_s=0.3)
    first.cancel()
    await asyncio.wait([first])


async def test_without_redis_nothing_is_scored_twice() -> None:
    """It is an error at once, and the work is not begun."""
    client = connect("unix:///nonexistent/redis.sock", timeout_s=1.0)
    work = Work()
    with pytest.raises(QueueAway):
        await Answers(client, KEYS, lease_ms=300, ttl_s=60).once("key", "digest", work, deadline_s=5)
    assert work.calls == 0
    await client.aclose()


def _calls(work: Work, count: int) -> Callable[[], Awaitable[bool]]:
    async def reached() -> bool:
        return work.calls == count

    return reached
