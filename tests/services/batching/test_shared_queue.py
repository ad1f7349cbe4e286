"""Jobs whose images lie in shared memory, through a real Redis: the same answers, and the plain way where need be."""

import asyncio
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from services.batching.errors import QueueFull
from services.batching.jobs import Job
from services.batching.shared import Areas, is_supported
from services.batching.submit import SubmitQueue
from services.http.bodies import prepare
from services.images import decode_batch, encode_batch
from services.protocol import Limits
from services.rewards.brightness import Brightness
from tests.services.batching.workbench import (
    KEYS,
    LEASE_MS,
    assert_nothing_left,
    expected,
    has_jobs,
    jobs_of,
    scores,
    working,
)
from tests.services.conftest import random_images, wait_until_async

pytestmark = [
    pytest.mark.redis,
    pytest.mark.anyio,
    pytest.mark.skipif(not is_supported(), reason="needs memfd_create and /proc"),
]


@pytest.fixture
def lease_ms() -> int:
    """The API lives by a short lease here."""
    return LEASE_MS


async def test_shared_jobs_are_answered_without_a_payload_in_redis(redis: Redis, api: SubmitQueue) -> None:
    """While they wait Redis holds no pixels; afterwards nothing is left."""
    sent = encode_batch(random_images(10, 4, 4, 3))
    with Areas(enabled=True).lease() as lease:
        body = lease.memory(len(sent))
        assert body is not None
        body[:] = sent
        shared = prepare(decode_batch, body, Limits(), job_images=4, job_bytes=2**20, digests=False, lease=lease)
        asking = asyncio.create_task(api.score(shared.jobs, deadline_s=20.0))
        await wait_until_async(lambda: has_jobs(redis, 3))
        assert await redis.keys(KEYS.payload("*")) == []
        async with working(redis, Brightness()):
            assert scores(await asking) == expected(shared.jobs)
    await assert_nothing_left(redis)


async def test_what_a_worker_cannot_reach_is_sent_through_redis(redis: Redis, api: SubmitQueue) -> None:
    """As one on another host: the caller gets the same scores, and the next request takes the plain way at once."""
    jobs = [replace(job, shared='[1,0,"reward-elsewhere",100,0,4]') for job in jobs_of(8)]
    async with working(redis, Brightness()):
        assert scores(await api.score(jobs, deadline_s=20.0)) == expected(jobs)
    assert (await api.survey()).events.resubmissions == 2
    again = asyncio.create_task(api.score(jobs, deadline_s=20.0))
    await wait_until_async(lambda: has_jobs(redis, 2))
    assert len(await redis.keys(KEYS.payload("*"))) == 2
    async with working(redis, Brightness(), consumer="next"):
        assert scores(await again) == expected(jobs)
    await assert_nothing_left(redis)


async def test_a_full_queue_refuses_shared_jobs_as_well(redis: Redis, api: SubmitQueue) -> None:
    """And counts none of what it refused."""
    (job,) = jobs_of(4)
    many = [Job(job.images_BHWC, None, '[1,0,"reward-x",100,0,4]')] * 1_000
    with pytest.raises(QueueFull):
        await api.score(many, deadline_s=5.0)
    await assert_nothing_left(redis)
