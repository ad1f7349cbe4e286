"""What Redis, an API or a worker loses is done again or dropped; nothing is lost, doubled or left behind."""

import asyncio
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from services.batching import lua
from services.batching.errors import ScoringFailed
from services.batching.streams import GROUP, Reply
from services.batching.submit import SubmitQueue
from services.batching.worker import WorkerLimits
from services.rewards.brightness import Brightness
from tests.services import dummies
from tests.services.batching.workbench import (
    KEYS,
    LEASE_MS,
    LIMITS,
    assert_nothing_left,
    expected,
    has_jobs,
    jobs_of,
    scores,
    work_queue,
    working,
)
from tests.services.conftest import wait_until_async

pytestmark = [pytest.mark.redis, pytest.mark.anyio]


@pytest.fixture
def lease_ms() -> int:
    """The API, too, lives by a short lease here."""
    return LEASE_MS


async def test_what_redis_lost_is_submitted_again(redis: Redis, api: SubmitQueue) -> None:
    """Jobs that wait, and those a worker has in hand, outlive the loss of all data; each is answered once."""
    waiting = asyncio.create_task(api.score(jobs_of(40), deadline_s=20.0))
    await wait_until_async(lambda: has_jobs(redis, 10))
    zombie = work_queue(redis, "zombie")
    await zombie.ensure_group()
    stale = [taken.delivery for taken in await zombie.read(3, block_ms=2000)]
    await redis.flushall()
    await wait_until_async(lambda: has_jobs(redis, 10))
    assert not await zombie.reply(stale[0], Reply(scores=(9.0,) * 4))  # its group is gone
    async with working(redis, Brightness()):
        assert scores(await waiting) == expected(jobs_of(40))
    assert (await api.survey()).events.resubmissions == 10
    await assert_nothing_left(redis)


async def test_a_reply_that_is_on_its_way_is_no_loss(redis: Redis, api: SubmitQueue) -> None:
    """Whatever is answered while the API looks for losses is not submitted again."""
    async with working(redis, Brightness()):
        for seed in range(60):
            jobs = jobs_of(8, seed=seed)
            assert scores(await api.score(jobs, deadline_s=20.0)) == expected(jobs)
            await api._resubmit_lost()
    assert (await api.survey()).events.resubmissions == 0


async def test_evicted_images_are_uploaded_again(redis: Redis, api: SubmitQueue) -> None:
    """A Redis that evicts keys costs time, not scores."""
    waiting = asyncio.create_task(api.score(jobs_of(8), deadline_s=20.0))
    await wait_until_async(lambda: has_jobs(redis, 2))
    await redis.delete(*await redis.keys(KEYS.payload("*")))
    async with working(redis, Brightness()):
        assert scores(await waiting) == expected(jobs_of(8))
    await assert_nothing_left(redis)


async def test_the_jobs_of_a_dead_api_are_dropped_within_a_lease(redis: Redis) -> None:
    """Whether they wait or are in a worker's hands, and though nobody is left to cancel them."""
    queue = SubmitQueue(redis, KEYS, queue_images=64, queue_bytes=2**20, lease_ms=LEASE_MS)
    await queue.__aenter__()
    left = asyncio.create_task(queue.score(jobs_of(8), deadline_s=20.0))
    await wait_until_async(lambda: has_jobs(redis, 2))
    worker = work_queue(redis, "lives")
    await worker.ensure_group()
    held = [taken.delivery for taken in await worker.read(1, block_ms=2000)]
    for task in queue._tasks:  # as death by SIGKILL: no sign of life, no cleaning up
        task.cancel()
    await asyncio.sleep(LEASE_MS / 2000)
    await worker.tidy()
    assert not await worker.reply(held[0], Reply(scores=(0.5,) * 4))
    await assert_nothing_left(redis)
    assert int(await redis.hget(KEYS.events, "dropped") or 0) == 2
    left.cancel()
    await asyncio.wait([left])


async def test_a_worker_does_not_score_for_a_dead_api(redis: Redis) -> None:
    """Its jobs are dropped when a worker comes to them, should nobody have tidied up before."""
    reward = dummies.Counting()
    queue = SubmitQueue(redis, KEYS, queue_images=64, queue_bytes=2**20, lease_ms=60_000)
    async with queue:
        left = asyncio.create_task(queue.score(jobs_of(8), deadline_s=20.0))
        await wait_until_async(lambda: has_jobs(redis, 2))
        for task in queue._tasks:
            task.cancel()
        await redis.delete(queue._reply_key + lua.ALIVE)
        async with working(redis, reward):
            await wait_until_async(lambda: has_jobs(redis, 0))
        assert reward.batches == []
        left.cancel()
        await asyncio.wait([left])


async def test_an_api_that_was_taken_for_dead_submits_again(redis: Redis, api: SubmitQueue) -> None:
    """One that stood still for longer than a lease gets its scores all the same."""
    waiting = asyncio.create_task(api.score(jobs_of(8), deadline_s=20.0))
    await wait_until_async(lambda: has_jobs(redis, 2))
    await redis.delete(api._reply_key + lua.ALIVE)
    await work_queue(redis, "any").tidy()
    async with working(redis, Brightness()):
        assert scores(await waiting) == expected(jobs_of(8))


async def test_a_job_that_nobody_cancels_goes_after_its_deadline(
    redis: Redis, api: SubmitQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even while its API lives, as when the cancelling itself failed."""

    async def lost(*_: object) -> None:
        return

    for name in ("_drop", "_drop_strays"):
        monkeypatch.setattr(api, name, lost)
    with pytest.raises(Exception, match="deadline"):
        await api.score(jobs_of(8), deadline_s=0.2)
    await wait_until_async(lambda: has_jobs(redis, 0))


async def test_those_behind_a_killer_are_not_counted_with_it(redis: Redis, api: SubmitQueue) -> None:
    """Of ten jobs whose worker fell silent an heir takes one at a time: the others keep their deliveries."""
    victim, heir = work_queue(redis, "victim"), work_queue(redis, "heir")
    await victim.ensure_group()
    request = asyncio.create_task(api.score(jobs_of(40), deadline_s=20.0))
    await wait_until_async(lambda: has_jobs(redis, 10))
    assert len(await victim.read(10, block_ms=2000)) == 10
    await wait_until_async(heir.take_over)
    pending = await redis.xpending_range(KEYS.jobs, GROUP, "-", "+", 100)
    assert sorted(entry["times_delivered"] for entry in pending) == [1] * 9 + [2]
    limits = replace(LIMITS, max_deliveries=3)  # the heir has used up the second of one job
    async with working(redis, Brightness(), limits):
        assert scores(await request) == expected(jobs_of(40))
    assert await redis.xlen(KEYS.dead) == 0
    await assert_nothing_left(redis)


async def test_a_failure_names_the_image_of_the_request(redis: Redis, api: SubmitQueue) -> None:
    """A score that is no number is laid at the right door, though the request was cut into jobs."""
    async with working(redis, dummies.Nan()):
        with pytest.raises(ScoringFailed, match="nan") as caught:
            await api.score(jobs_of(12, poison=[9]), deadline_s=20.0)
    assert caught.value.index == 9


async def test_the_survey_tells_waiting_leased_and_handed_back(redis: Redis, api: SubmitQueue) -> None:
    """What a leaving worker handed back waits again; batches are counted by their size."""
    empty = await api.survey()
    assert (empty.waiting_images, empty.leased_images, empty.queued_bytes, empty.oldest_s) == (0, 0, 0, 0)
    request = asyncio.create_task(api.score(jobs_of(12), deadline_s=20.0))
    await wait_until_async(lambda: has_jobs(redis, 3))
    worker = work_queue(redis, "worker", lease_ms=60_000)
    await worker.ensure_group()
    held = (await worker.read(1, block_ms=2000))[0].delivery
    survey = await api.survey()
    assert (survey.waiting_images, survey.leased_images, survey.queued_bytes) == (8, 4, 12 * 48)
    assert await worker.renew([held]) == 1
    await worker.hand_back()
    survey = await api.survey()
    assert (survey.waiting_images, survey.leased_images) == (12, 0)
    assert 0 < survey.oldest_s < 20
    async with working(redis, Brightness(), WorkerLimits(max_wait_s=0.3, lease_s=60)):
        await request
    events = (await api.survey()).events
    assert events.renewals >= 1
    assert (events.redeliveries, events.dead_letters, events.dropped) == (0, 0, 0)
    assert events.batch_images == 12
    assert sum(events.batches) >= 1


@pytest.mark.parametrize("lease_ms", [60_000])
async def test_an_api_is_ready_as_soon_as_its_worker_is_back(redis: Redis, api: SubmitQueue) -> None:
    """A Redis that lost its data lost the worker's sign of life, too; its next is a third of a lease away."""
    async with working(redis, Brightness(), replace(LIMITS, lease_s=60.0)):
        await asyncio.sleep(0.1)  # its first beat is over
        await redis.flushall()
        await wait_until_async(api.ready, timeout_s=2)


async def test_an_idle_worker_outlives_any_number_of_short_outages(redis: Redis) -> None:
    """Only one that lasts longer than its patience ends it, not two that lie further apart than that."""
    limits = replace(LIMITS, patience_s=0.3)
    async with working(redis, Brightness(), limits):
        for _ in range(3):
            await redis.client_kill_filter(_type="normal")
            await asyncio.sleep(2 * limits.patience_s)


async def test_an_error_of_a_redis_that_is_there_is_no_absence(redis: Redis) -> None:
    """A group that is lost long after an outage is made again, and the worker goes on."""
    limits = replace(LIMITS, patience_s=0.3)
    async with working(redis, Brightness(), limits):
        await redis.client_kill_filter(_type="normal")
        await asyncio.sleep(2 * limits.patience_s)
        await redis.flushall()
        await asyncio.sleep(limits.patience_s)
