"""One queue, workers in this process, and what is left of their work."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from redis.asyncio import Redis

from services.batching.jobs import Job, split_batch
from services.batching.keys import Keys
from services.batching.streams import GROUP, Reply, WorkQueue
from services.batching.submit import SubmitQueue
from services.batching.worker import Worker, WorkerLimits
from services.images import Batch
from services.rewards.base import Reward
from services.rewards.brightness import Brightness
from tests.services import dummies
from tests.services.conftest import random_images

KEYS = Keys("brightness", "1")
LEASE_MS = 300
LIMITS = WorkerLimits(max_batch=32, max_wait_s=0.02, lease_s=LEASE_MS / 1000, max_deliveries=2, patience_s=5.0)


def work_queue(redis: Redis, consumer: str, *, lease_ms: int = LEASE_MS) -> WorkQueue:
    """A worker's side of the queue."""
    return WorkQueue(redis, KEYS, consumer=consumer, lease_ms=lease_ms)


@contextlib.asynccontextmanager
async def working(
    redis: Redis, reward: Reward, limits: WorkerLimits = LIMITS, *, consumer: str = "worker"
) -> AsyncIterator[None]:
    """A worker in this process."""
    stop, ready = asyncio.Event(), asyncio.Event()
    worker = Worker(work_queue(redis, consumer), reward, limits)
    await worker.warmup()
    task = asyncio.create_task(worker.run(stop, on_ready=ready.set))
    await ready.wait()
    try:
        yield
    finally:
        stop.set()
        await task


def jobs_of(count: int, *, seed: int = 0, job_images: int = 4, poison: Sequence[int] = ()) -> list[Job]:
    """Noise as jobs; `poison` names images that a dummy reward chokes on."""
    images_BHWC = random_images(count, 4, 4, 3, seed=seed)
    images_BHWC[:, 0, 0, 0] = 0
    images_BHWC[list(poison), 0, 0, 0] = dummies.POISON
    return split_batch(Batch(list(images_BHWC), None), job_images=job_images, job_bytes=2**20)


def expected(jobs: Sequence[Job]) -> list[float]:
    """What brightness gives, straight from the reward."""
    return [score for job in jobs for score in Brightness().score(job.images_BHWC, None).tolist()]


def scores(replies: Sequence[Reply]) -> list[float]:
    """Replies laid end to end."""
    return [score for reply in replies for score in reply.scores]


async def has_jobs(redis: Redis, count: int) -> bool:
    """Whether the stream holds this many jobs."""
    return await redis.xlen(KEYS.jobs) == count


async def queued(api: SubmitQueue) -> tuple[int, int]:
    """Images and bytes that wait or are in work."""
    survey = await api.survey()
    return survey.waiting_images + survey.leased_images, survey.queued_bytes


async def assert_nothing_left(redis: Redis) -> None:
    """No job, no lease, no payload, no load."""
    assert await redis.xlen(KEYS.jobs) == 0
    if await redis.exists(KEYS.jobs) and await redis.xinfo_groups(KEYS.jobs):
        assert (await redis.xpending(KEYS.jobs, GROUP))["pending"] == 0
    assert await redis.keys(KEYS.payload("*")) == []
    load = await redis.hgetall(KEYS.load)
    assert {int(value) for value in load.values()} <= {0}
    assert await redis.zcard(KEYS.uploads) == 0
