"""Jobs whose images lie in shared memory, through a real Redis: the same answers, and the plain way where need be."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from services.batching.errors import QueueAway, QueueFull
from services.batching.jobs import Job
from services.batching.shared import Areas, is_supported
from services.batching.streams import connect
from services.batching.submit import SubmitQueue
from services.http.bodies import prepare
from services.images import decode_batch, encode_batch
from services.protocol import Limits
from services.redis_server import RedisServer
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


@contextlib.contextmanager
def frozen(server: RedisServer) -> Iterator[None]:
    """A Redis that takes what it is sent and does nothing until the end of the block."""
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.process.pid, signal.SIGCONT)


async def dropped(api: SubmitQueue) -> int:
    """Jobs that were removed unscored."""
    return (await api.survey()).events.dropped


@pytest.mark.parametrize("lease_ms", [60_000])
async def test_a_client_that_leaves_while_redis_hangs_leaves_no_job(
    redis: Redis, api: SubmitQueue, redis_server: RedisServer
) -> None:
    """Its jobs are dropped as soon as Redis has taken them, however long it took."""
    jobs = [replace(job, shared='[1,0,"reward-elsewhere",100,0,4]') for job in jobs_of(8)]
    await api.survey()
    with frozen(redis_server):
        asking = asyncio.create_task(api.score(jobs, deadline_s=20.0))
        await asyncio.sleep(0.1)
        asking.cancel()
        started_s = time.monotonic()
        await asyncio.wait([asking])
        assert time.monotonic() - started_s < 5
    await wait_until_async(lambda: dropped(api), timeout_s=5)
    await assert_nothing_left(redis)
    assert await dropped(api) == 2


async def test_what_redis_takes_of_an_api_that_has_given_up_is_dropped(redis: Redis, redis_server: RedisServer) -> None:
    """The API took it for failed, and its client may have sent it again: nobody waits for the first."""
    jobs = [replace(job, shared='[1,0,"reward-elsewhere",100,0,4]') for job in jobs_of(8)]
    impatient = connect(redis_server.url, timeout_s=1.2)
    async with SubmitQueue(impatient, KEYS, queue_images=64, queue_bytes=2**20, lease_ms=LEASE_MS) as api:
        await api.survey()
        with frozen(redis_server), pytest.raises(QueueAway):
            await api.score(jobs, deadline_s=60.0)
        await wait_until_async(lambda: dropped(api), timeout_s=5)
        await assert_nothing_left(redis)
        assert await dropped(api) == 2
    await impatient.aclose()
