"""A client of a real Redis, and the API's side of a queue on it."""

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from services.batching.streams import connect
from services.batching.submit import SubmitQueue
from tests.services.batching.workbench import KEYS


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    """A client of the test's Redis."""
    client = connect(redis_url, timeout_s=5.0)
    yield client
    await client.aclose()


@pytest.fixture
def lease_ms() -> int:
    """The lease that the API lives by."""
    return 15_000


@pytest.fixture
async def api(redis: Redis, lease_ms: int) -> AsyncIterator[SubmitQueue]:
    """The API's side of the queue, bounded to 64 images."""
    async with SubmitQueue(redis, KEYS, queue_images=64, queue_bytes=2**20, lease_ms=lease_ms) as queue:
        yield queue
