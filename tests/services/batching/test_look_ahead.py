"""A worker's next jobs come in, and its last replies go out, while it scores."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError

from services.batching.errors import DeadlinePassed
from services.batching.shared import Areas, is_supported
from services.batching.streams import GROUP, WorkQueue
from services.batching.submit import SubmitQueue
from services.batching.worker import Worker, WorkerLimits
from services.http.bodies import prepare
from services.images import decode_batch, encode_batch
from services.protocol import Limits
from tests.services import dummies
from tests.services.batching.workbench import KEYS, LEASE_MS, expected, jobs_of, scores, work_queue, working
from tests.services.conftest import random_images, wait_until_async

pytestmark = [pytest.mark.redis, pytest.mark.anyio]

FORWARD_S = 0.5
LIMITS = WorkerLimits(max_batch=4, max_wait_s=0.1, lease_s=60.0)


class Timed(dummies.Counting):
    """Takes its time, and knows when it began and ended."""

    def __init__(self) -> None:
        super().__init__()
        self.spans: list[tuple[float, float]] = []
        self.is_busy = False

    def score(self, images_BHWC: np.ndarray, prompts: Sequence[str] | None) -> np.ndarray:
        began_s, self.is_busy = time.monotonic(), True
        time.sleep(FORWARD_S)
        self.spans.append((began_s, time.monotonic()))
        self.is_busy = False
        return super().score(images_BHWC, prompts)


async def leased(redis: Redis) -> int:
    """Jobs in workers' hands."""
    return int((await redis.xpending(KEYS.jobs, GROUP))["pending"])


async def test_the_next_batch_is_in_hand_before_the_last_is_scored(redis: Redis, api: SubmitQueue) -> None:
    """But not long before: until shortly before the end another worker could have it."""
    reward = Timed()
    async with working(redis, reward, LIMITS):
        await api.score(jobs_of(4), deadline_s=20.0)  # from which it knows how long a forward pass takes
        asking = [asyncio.create_task(api.score(jobs_of(4, seed=seed), deadline_s=20.0)) for seed in (1, 2)]
        await wait_until_async(lambda: has_leased(redis, 1))
        began_s = time.monotonic()
        seen = []
        while len(reward.spans) < 2:
            seen.append((time.monotonic() - began_s, await leased(redis)))
            await asyncio.sleep(0.005)
        assert [count for when_s, count in seen if when_s < FORWARD_S / 2] == [1] * sum(
            when_s < FORWARD_S / 2 for when_s, _ in seen
        )
        assert seen[-1][1] == 2
        answers = await asyncio.gather(*asking)
    for seed, replies in enumerate(answers, start=1):
        assert scores(replies) == expected(jobs_of(4, seed=seed))
    assert reward.spans[2][0] - reward.spans[1][1] < LIMITS.max_wait_s / 2


async def has_leased(redis: Redis, count: int) -> bool:
    return await leased(redis) == count


async def test_replies_do_not_wait_for_the_next_forward_pass(redis: Redis, api: SubmitQueue) -> None:
    """They go out while it runs, and so does the count of batches."""
    reward = Timed()
    async with working(redis, reward, LIMITS):
        await api.score(jobs_of(4), deadline_s=20.0)
        asking = [asyncio.create_task(api.score(jobs_of(4, seed=seed), deadline_s=20.0)) for seed in (1, 2)]
        await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        answered_s = time.monotonic()
        await asyncio.gather(*asking)
    assert answered_s - reward.spans[1][1] < FORWARD_S / 2 < reward.spans[2][1] - answered_s
    assert (await api.survey()).events.batch_images == 12


async def test_no_job_is_taken_beside_one_that_may_have_killed_its_worker(redis: Redis, api: SubmitQueue) -> None:
    """A delivery would count against it, should the suspect kill this worker as well."""
    lost = work_queue(redis, "lost")
    await lost.ensure_group()
    suspect = asyncio.create_task(api.score(jobs_of(4), deadline_s=20.0))
    assert await lost.read(1, block_ms=2000)
    reward = Timed()
    async with working(redis, reward, WorkerLimits(max_batch=4, max_wait_s=0.1, lease_s=LEASE_MS / 1000)):
        await api.score(jobs_of(4, seed=1), deadline_s=20.0)
        other = asyncio.create_task(api.score(jobs_of(4, seed=2), deadline_s=20.0))
        most = 0
        while not (suspect.done() and other.done()):
            most = max(most, await leased(redis))
            await asyncio.sleep(0.01)
    assert most == 1
    assert scores(await suspect) == expected(jobs_of(4))
    assert scores(await other) == expected(jobs_of(4, seed=2))


async def test_a_job_that_comes_while_the_first_waits_joins_it(
    redis: Redis, api: SubmitQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that comes after the worker last looked, just before the wait is over."""
    monkeypatch.setattr("services.batching.worker.STRAGGLER_POLL_S", 0.4)
    reward = dummies.Counting()
    async with working(redis, reward, WorkerLimits(max_batch=8, max_wait_s=0.4, lease_s=60.0)):
        first = asyncio.create_task(api.score(jobs_of(4), deadline_s=20.0))
        await wait_until_async(lambda: has_leased(redis, 1))
        await asyncio.sleep(0.2)
        await asyncio.gather(first, api.score(jobs_of(3, seed=1), deadline_s=20.0))
    assert reward.batches == [7]


async def test_scores_outlive_a_redis_that_fails_meanwhile(
    redis: Redis, api: SubmitQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the second batch is scored, neither the replies to the first nor the next jobs get through at first."""
    failures = {"read": 0, "reply": 0}

    def failing(name: str) -> None:
        real = getattr(WorkQueue, name)

        async def call(self: WorkQueue, *args: Any, **kwargs: Any) -> Any:
            if len(reward.batches) == 1 and (name == "reply" or reward.is_busy) and failures[name] < 3:
                failures[name] += 1
                raise ConnectionError("away")
            return await real(self, *args, **kwargs)

        monkeypatch.setattr(WorkQueue, name, call)

    reward = Timed()
    failing("read")
    failing("reply")
    monkeypatch.setattr("services.batching.worker.ROUND_TRIP_S", -1.0)  # it looks ahead from the first
    began_s = time.monotonic()
    async with working(redis, reward, LIMITS):
        asking = [api.score(jobs_of(4, seed=seed), deadline_s=20.0) for seed in range(4)]
        answers = await asyncio.gather(*asking)
    assert time.monotonic() - began_s < 4 * FORWARD_S + 2
    for seed, replies in enumerate(answers):
        assert scores(replies) == expected(jobs_of(4, seed=seed))
    assert reward.batches == [4] * 4
    assert failures["read"] > 0
    assert failures["reply"] > 0


async def test_a_leaving_worker_takes_no_more(redis: Redis, api: SubmitQueue) -> None:
    """What waits goes to another at once, for it was never delivered."""
    reward, stop = Timed(), asyncio.Event()
    worker = Worker(work_queue(redis, "leaves", lease_ms=60_000), reward, LIMITS)
    await worker.warmup()
    running = asyncio.create_task(worker.run(stop))
    await api.score(jobs_of(4), deadline_s=20.0)
    last = asyncio.create_task(api.score(jobs_of(4, seed=1), deadline_s=20.0))
    await wait_until_async(lambda: has_leased(redis, 1))
    await asyncio.sleep(FORWARD_S / 4)
    waits = asyncio.create_task(api.score(jobs_of(4, seed=2), deadline_s=20.0))
    stop.set()
    await running
    assert await leased(redis) == 0
    assert scores(await last) == expected(jobs_of(4, seed=1))
    async with working(redis, dummies.Counting(), LIMITS, consumer="stays"):
        assert scores(await asyncio.wait_for(waits, 5)) == expected(jobs_of(4, seed=2))


async def test_a_job_whose_deadline_passed_in_hand_is_not_scored(redis: Redis, api: SubmitQueue) -> None:
    """It waited for company until nobody waited for it."""
    reward = dummies.Counting()
    async with working(redis, reward, WorkerLimits(max_batch=8, max_wait_s=0.6, lease_s=60.0)):
        with pytest.raises(DeadlinePassed):
            await api.score(jobs_of(4), deadline_s=0.3)
        await asyncio.sleep(0.6)
    assert reward.batches == []


async def test_jobs_of_a_dead_worker_are_taken_over_from_a_busy_one(redis: Redis, api: SubmitQueue) -> None:
    """Though it always has a job in hand that waits for another."""
    lost = work_queue(redis, "lost")
    await lost.ensure_group()
    orphan = asyncio.create_task(api.score(jobs_of(3), deadline_s=20.0))
    assert await lost.read(1, block_ms=2000)

    async def keep_busy(seed: int) -> None:
        while not orphan.done():
            await api.score(jobs_of(3, seed=seed), deadline_s=20.0)

    limits = WorkerLimits(max_batch=4, max_wait_s=0.05, lease_s=LEASE_MS / 1000)
    async with working(redis, dummies.Counting(), limits):
        busy = [asyncio.create_task(keep_busy(seed)) for seed in range(1, 9)]
        assert scores(await asyncio.wait_for(orphan, 5)) == expected(jobs_of(3))
        await asyncio.gather(*busy)


@pytest.mark.skipif(not is_supported(), reason="needs memfd_create and /proc")
async def test_what_is_submitted_at_once_is_found_at_once(redis: Redis, api: SubmitQueue) -> None:
    """Eight requests of one image are one batch, though nothing waits for company."""
    reward, areas = dummies.Counting(), Areas(enabled=True)
    images_BHWC = random_images(8, 4, 4, 3)

    async def ask(number: int) -> list[float]:
        sent = encode_batch(images_BHWC[number : number + 1])
        with areas.lease() as lease:
            body = lease.memory(len(sent))
            assert body is not None
            body[:] = sent
            shared = prepare(decode_batch, body, Limits(), job_images=4, job_bytes=2**20, digests=False, lease=lease)
            return scores(await api.score(shared.jobs, deadline_s=20.0))

    async with working(redis, reward, WorkerLimits(max_batch=8, max_wait_s=0.0, job_images=1)):
        found = await asyncio.gather(*map(ask, range(8)))
    assert [score for (score,) in found] == dummies.Counting().score(images_BHWC, None).tolist()
    assert reward.batches == [8]


@pytest.mark.skipif(not is_supported(), reason="needs memfd_create and /proc")
async def test_of_what_is_submitted_at_once_some_may_be_refused(redis: Redis, api: SubmitQueue) -> None:
    """Of two requests of 40 images 64 may be queued: one is admitted, the other told by how much it exceeds."""
    areas, sent = Areas(enabled=True), encode_batch(random_images(40, 4, 4, 3))
    with areas.lease() as one, areas.lease() as two:
        asking = []
        for lease in (one, two):
            body = lease.memory(len(sent))
            assert body is not None
            body[:] = sent
            jobs = prepare(
                decode_batch, body, Limits(), job_images=64, job_bytes=2**20, digests=False, lease=lease
            ).jobs
            asking.append(asyncio.create_task(api.score(jobs, deadline_s=20.0)))
        done, _ = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        assert "40 images (1920 bytes) are queued and 40 images" in str(done.pop().exception()).replace(
            "40 (", "40 images ("
        )
        async with working(redis, dummies.Counting()):
            (admitted,) = [task for task in asking if not (task.done() and task.exception())]
            assert len(scores(await admitted)) == 40
