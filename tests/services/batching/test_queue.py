"""The queue on a real Redis: at least once, answered once, nothing left behind."""

import asyncio
import time
from collections.abc import Sequence

import numpy as np
import pytest
from redis.asyncio import Redis

from services.batching.errors import DeadlinePassed, QueueAway, QueueFull, ScoringFailed
from services.batching.jobs import split_batch
from services.batching.scoring import ScorerHung
from services.batching.streams import Delivery, Reply, connect
from services.batching.submit import SubmitQueue
from services.batching.worker import Worker, WorkerLimits
from services.images import Batch
from services.rewards.base import Reward
from services.rewards.brightness import Brightness
from tests.services import dummies
from tests.services.batching.workbench import (
    KEYS,
    LEASE_MS,
    assert_nothing_left,
    expected,
    has_jobs,
    jobs_of,
    queued,
    scores,
    work_queue,
    working,
)
from tests.services.conftest import random_images, wait_until_async

pytestmark = [pytest.mark.redis, pytest.mark.anyio]


async def test_scores_come_back_in_order_across_jobs_sizes_and_requests(redis: Redis, api: SubmitQueue) -> None:
    """Concurrent requests of several sizes each get exactly their own scores."""
    batches = [
        Batch([*random_images(5, 4, 4, 3, seed=seed), *random_images(2, 3, 6, 3, seed=seed)], None) for seed in range(6)
    ]
    requests = [split_batch(batch, job_images=2, job_bytes=2**20) for batch in batches]
    assert [len(job.images_BHWC) for job in requests[0]] == [2, 2, 1, 2]
    async with working(redis, Brightness()):
        answers = await asyncio.gather(*(api.score(jobs, deadline_s=20.0) for jobs in requests))
    for jobs, replies in zip(requests, answers, strict=True):
        assert scores(replies) == expected(jobs)
    await assert_nothing_left(redis)


async def test_jobs_of_several_requests_share_a_forward_pass(redis: Redis, api: SubmitQueue) -> None:
    """Four requests of 4 images are one batch of 16; one of 48 is cut at `max_batch`."""
    reward = dummies.Counting()
    limits = WorkerLimits(max_batch=32, max_wait_s=0.5, lease_s=5.0)
    async with working(redis, reward, limits):
        await asyncio.gather(*(api.score(jobs_of(4, seed=seed), deadline_s=20.0) for seed in range(4)))
        await api.score(jobs_of(48), deadline_s=20.0)
    assert reward.batches == [16, 32, 16]


async def test_a_lease_is_renewed_as_long_as_its_job_is_scored(redis: Redis, api: SubmitQueue) -> None:
    """A forward pass of four leases is not taken over by the idle worker beside it."""

    class SlowAndCounting(dummies.Counting):
        def score(self, images_BHWC: np.ndarray, prompts: Sequence[str] | None) -> np.ndarray:
            time.sleep(4 * LEASE_MS / 1000)
            return super().score(images_BHWC, prompts)

    first, second = SlowAndCounting(), SlowAndCounting()
    jobs = jobs_of(4)
    async with working(redis, first, consumer="first"), working(redis, second, consumer="second"):
        assert scores(await api.score(jobs, deadline_s=20.0)) == expected(jobs)
    assert first.batches + second.batches == [4]
    await assert_nothing_left(redis)


@pytest.mark.parametrize(("reward", "words"), [(dummies.Nan(), "nan for 1 of 4"), (dummies.Picky(), "poison")])
async def test_a_bad_image_fails_its_own_request_only(
    redis: Redis, api: SubmitQueue, reward: Reward, words: str
) -> None:
    """A non-finite score or an exception never reaches a neighbour in the batch, and is never a number."""
    good, bad = jobs_of(8, seed=1), jobs_of(8, seed=2, poison=[5])
    async with working(redis, reward):
        outcomes = await asyncio.gather(
            api.score(good, deadline_s=20.0), api.score(bad, deadline_s=20.0), return_exceptions=True
        )
    assert not isinstance(outcomes[0], BaseException)
    assert scores(outcomes[0]) == expected(good)
    assert isinstance(outcomes[1], ScoringFailed)
    assert words in str(outcomes[1])
    await assert_nothing_left(redis)


async def test_a_reward_may_name_the_image_at_fault(redis: Redis, api: SubmitQueue) -> None:
    """Its index counts within the request, over all its jobs."""
    async with working(redis, dummies.Oblong()):
        with pytest.raises(ScoringFailed, match="this one is at fault: leave it out") as caught:
            await api.score(jobs_of(1) + jobs_of(4), deadline_s=20.0)
    assert caught.value.index == 2
    await assert_nothing_left(redis)


async def test_a_wrong_count_of_scores_fails_the_request(redis: Redis, api: SubmitQueue) -> None:
    """One score too few is an error for all of them."""
    async with working(redis, dummies.Short()):
        with pytest.raises(ScoringFailed, match=r"shape \(3,\), expected \(4,\)"):
            await api.score(jobs_of(4), deadline_s=20.0)


async def test_a_passed_deadline_leaves_nothing_in_the_queue(redis: Redis, api: SubmitQueue) -> None:
    """Without a worker the caller gets its error in time, and its jobs are gone."""
    with pytest.raises(DeadlinePassed):
        await api.score(jobs_of(8), deadline_s=0.1)
    await assert_nothing_left(redis)


async def test_a_cancelled_request_leaves_nothing_in_the_queue(redis: Redis, api: SubmitQueue) -> None:
    """A client that leaves takes its jobs along."""
    request = asyncio.create_task(api.score(jobs_of(8), deadline_s=20.0))
    await wait_until_async(lambda: has_jobs(redis, 2))
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    await assert_nothing_left(redis)


async def test_the_bound_holds_over_all_requests_and_is_given_back(redis: Redis, api: SubmitQueue) -> None:
    """Of 64 images that may be queued 60 are: 5 more are refused, 4 are not; afterwards there is room again."""
    waiting = asyncio.create_task(api.score(jobs_of(60), deadline_s=20.0))
    await wait_until_async(lambda: has_jobs(redis, 15))
    assert await queued(api) == (60, 60 * 48)
    with pytest.raises(QueueFull, match="60 images"):
        await api.score(jobs_of(5), deadline_s=5.0)
    four = asyncio.create_task(api.score(jobs_of(4, seed=3), deadline_s=20.0))
    async with working(redis, Brightness()):
        assert scores(await waiting) == expected(jobs_of(60))
        assert scores(await four) == expected(jobs_of(4, seed=3))
    await assert_nothing_left(redis)


async def test_the_bound_on_bytes_holds(redis: Redis) -> None:
    """Two images of 48 bytes exceed a bound of 95."""
    async with SubmitQueue(redis, KEYS, queue_images=64, queue_bytes=95) as api:
        with pytest.raises(QueueFull, match="95 bytes"):
            await api.score(jobs_of(2), deadline_s=5.0)


async def test_a_lost_load_is_counted_anew(redis: Redis, api: SubmitQueue) -> None:
    """Should the counter vanish, the next admission counts what is there."""
    waiting = asyncio.create_task(api.score(jobs_of(60), deadline_s=20.0))
    await wait_until_async(lambda: has_jobs(redis, 15))
    await redis.delete(KEYS.load)
    with pytest.raises(QueueFull, match="60 images"):
        await api.score(jobs_of(5), deadline_s=5.0)
    await redis.hset(KEYS.load, mapping={"images": 999, "bytes": 1})
    await work_queue(redis, "any").tidy()
    assert await queued(api) == (60, 60 * 48)
    waiting.cancel()
    await asyncio.wait([waiting])


async def test_a_silent_workers_job_is_taken_over_and_its_late_reply_dropped(redis: Redis, api: SubmitQueue) -> None:
    """The caller gets one answer, of the worker that was first."""
    zombie, heir = work_queue(redis, "zombie"), work_queue(redis, "heir")
    await heir.ensure_group()
    request = asyncio.create_task(api.score(jobs_of(1), deadline_s=20.0))
    stale = (await zombie.read(1, block_ms=2000))[0].delivery
    assert await heir.take_over() is None
    taken: list[Delivery] = []

    async def takes_over() -> bool:
        if found := await heir.take_over():
            taken.append(found.delivery)
        return bool(taken)

    await wait_until_async(takes_over)
    assert taken[0].deliveries == 2
    assert await zombie.renew([stale]) == 0
    assert await heir.renew(taken) == 1
    assert await heir.reply(taken[0], Reply(scores=(0.25,)))
    assert not await zombie.reply(stale, Reply(scores=(0.75,)))
    assert scores(await request) == [0.25]
    await assert_nothing_left(redis)


async def test_a_renewed_lease_is_not_taken_over(redis: Redis, api: SubmitQueue) -> None:
    """Four leases long a worker renews; nobody else gets its job."""
    owner, other = work_queue(redis, "owner"), work_queue(redis, "other")
    await owner.ensure_group()
    request = asyncio.create_task(api.score(jobs_of(1), deadline_s=20.0))
    held = [taken.delivery for taken in await owner.read(1, block_ms=2000)]
    for _ in range(12):
        assert await owner.renew(held) == 1
        assert await other.take_over() is None
        await asyncio.sleep(LEASE_MS / 3000)
    await owner.reply(held[0], Reply(scores=(0.5,)))
    assert scores(await request) == [0.5]


async def test_a_leaving_worker_hands_back_without_a_mark(redis: Redis, api: SubmitQueue) -> None:
    """Others may take its job at once, and its delivery does not count."""
    leaving, other = work_queue(redis, "leaving", lease_ms=60_000), work_queue(redis, "other", lease_ms=60_000)
    await leaving.ensure_group()
    request = asyncio.create_task(api.score(jobs_of(1), deadline_s=20.0))
    await leaving.read(1, block_ms=2000)
    assert await other.take_over() is None
    await leaving.hand_back()
    taken = await other.take_over()
    assert taken is not None
    assert taken.delivery.deliveries == 1
    await other.reply(taken.delivery, Reply(scores=(0.5,)))
    assert scores(await request) == [0.5]


async def test_a_job_that_silences_its_workers_becomes_a_dead_letter(redis: Redis, api: SubmitQueue) -> None:
    """After two deliveries without a reply its caller gets an error; its neighbours get their scores."""
    victim = work_queue(redis, "victim")
    await victim.ensure_group()
    poison = asyncio.create_task(api.score(jobs_of(1), deadline_s=20.0))
    assert await victim.read(1, block_ms=2000)
    await wait_until_async(victim.take_over)
    async with working(redis, Brightness()):
        good = jobs_of(8, seed=4)
        assert scores(await api.score(good, deadline_s=20.0)) == expected(good)
        with pytest.raises(ScoringFailed, match="2 deliveries"):
            await poison
    ((_, letter),) = await redis.xrange(KEYS.dead)
    assert letter[b"deliveries"] == b"2"
    assert letter[b"images"] == b"1"
    await assert_nothing_left(redis)


async def test_a_redelivered_job_is_scored_alone(redis: Redis, api: SubmitQueue) -> None:
    """It may be what killed the last worker, so it shares its batch with no other."""
    lost = work_queue(redis, "lost")
    await lost.ensure_group()
    suspect = asyncio.create_task(api.score(jobs_of(3), deadline_s=20.0))
    await lost.read(1, block_ms=2000)
    reward = dummies.Counting()
    async with working(redis, reward, WorkerLimits(max_batch=32, max_wait_s=0.3, lease_s=LEASE_MS / 1000)):
        while not suspect.done():
            await api.score(jobs_of(2), deadline_s=20.0)
    assert scores(await suspect) == expected(jobs_of(3))
    assert set(reward.batches) == {2, 3}


async def test_the_worker_survives_a_redis_that_lost_its_data(redis: Redis, api: SubmitQueue) -> None:
    """Stream and group are made again."""
    async with working(redis, Brightness()):
        await api.score(jobs_of(4), deadline_s=20.0)
        await redis.flushall()
        assert scores(await api.score(jobs_of(4), deadline_s=20.0)) == expected(jobs_of(4))


async def test_a_hung_scorer_ends_its_worker(redis: Redis, api: SubmitQueue) -> None:
    """The lease is no longer renewed, and whoever runs the worker is told to end the process."""
    limits = WorkerLimits(lease_s=5.0, score_timeout_s=0.05)
    worker = Worker(work_queue(redis, "hangs", lease_ms=5000), dummies.Slow(), limits)
    running = asyncio.create_task(worker.run(asyncio.Event()))
    request = asyncio.create_task(api.score(jobs_of(1), deadline_s=20.0))
    with pytest.raises(ScorerHung, match=r"slow took longer than 0\.05 s"):
        await running
    request.cancel()
    await asyncio.wait([request])


async def test_readiness_ends_with_the_last_worker(redis: Redis, api: SubmitQueue) -> None:
    """One lease after the last sign of life the queue is not ready."""
    assert not await api.ready()
    async with working(redis, Brightness(), WorkerLimits(lease_s=0.1)):
        await wait_until_async(api.ready)

    async def is_over() -> bool:
        return not await api.ready()

    await wait_until_async(is_over)


async def test_a_redis_that_is_gone_is_an_error_at_once() -> None:
    """Nobody waits for their deadline."""
    client = connect("unix:///nonexistent/redis.sock", timeout_s=1.0)
    async with SubmitQueue(client, KEYS, queue_images=64, queue_bytes=2**20) as api:
        with pytest.raises(QueueAway):
            await api.score(jobs_of(1), deadline_s=20.0)
        with pytest.raises(QueueAway):
            await api.ready()
    await client.aclose()


async def test_a_split_batch_is_the_batch(redis: Redis) -> None:
    """Jobs keep order and prompts, and respect both bounds."""
    images = [*random_images(5, 4, 4, 3), *random_images(2, 8, 4, 3), *random_images(1, 4, 4, 3)]
    jobs = split_batch(Batch(images, [str(n) for n in range(8)]), job_images=3, job_bytes=100)
    assert [len(job.images_BHWC) for job in jobs] == [2, 2, 1, 1, 1, 1]
    flat = [image for job in jobs for image in job.images_BHWC]
    assert all(np.array_equal(one, other) for one, other in zip(flat, images, strict=True))
    assert [prompt for job in jobs for prompt in job.prompts or ()] == [str(n) for n in range(8)]
    del redis
