"""Shared memory that a later request has taken over, read by a worker that comes late: nobody gets another's scores."""

import asyncio
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from services.batching.errors import ScoringFailed
from services.batching.jobs import split_batch
from services.batching.shared import Area, MappedAreas, is_supported
from services.batching.streams import GROUP
from services.batching.submit import SubmitQueue
from services.images import decode_batch, encode_batch
from services.protocol import MEDIA_SAFETENSORS, Limits
from services.rewards.brightness import Brightness
from tests.services.batching.workbench import KEYS, assert_nothing_left, expected, has_jobs, jobs_of, scores, working
from tests.services.conftest import Process, random_images, wait_until, wait_until_async

pytestmark = [
    pytest.mark.redis,
    pytest.mark.skipif(not is_supported(), reason="needs memfd_create and /proc"),
]

EARLIER_BHWC, LATER_BHWC = random_images(4, 8, 8, 3, seed=1), random_images(4, 8, 8, 3, seed=2)
LATE_MS = 2000
"""How long the late worker waits for company with a job in hand, in which time it is stopped."""


def post(url: str, images_BHWC: np.ndarray) -> httpx.Response:
    """One request, without a client that would try again."""
    headers = {"Content-Type": MEDIA_SAFETENSORS}
    return httpx.post(f"{url}/score", content=encode_batch(images_BHWC), headers=headers, timeout=60, trust_env=False)


def assert_own_scores(answer: httpx.Response, images_BHWC: np.ndarray) -> None:
    """The very scores of these images."""
    assert answer.status_code == 200, answer.text
    assert answer.json()["scores"] == Brightness().score(images_BHWC, None).tolist()


def the_job(redis: "Redis") -> dict[bytes, bytes]:
    """The fields of the one job in the stream."""
    entries: Any = redis.xrange(KEYS.jobs)
    ((_, fields),) = entries
    return dict(fields)


def test_what_a_late_worker_makes_of_later_pixels_reaches_nobody(start: Callable[..., Process], redis_url: str) -> None:
    """It is stopped with a job in hand until another has answered and the memory holds the next request's images."""
    environment = {"REDIS_URL": redis_url, "REWARD_SHARED_MEMORY": "true", "REWARD_LEASE_MS": "300"}
    url = start("api", "brightness", "--port", "0", "--announce", **environment).url()
    late = start("worker", "brightness", "--announce", "--verbose", **environment, REWARD_MAX_WAIT_MS=str(LATE_MS))
    late.announced()
    with ThreadPoolExecutor(1) as pool, Redis.from_url(redis_url) as redis:
        earlier = pool.submit(post, url, EARLIER_BHWC)
        wait_until(lambda: redis.exists(KEYS.jobs) and redis.xpending(KEYS.jobs, GROUP)["pending"] == 1)  # type: ignore[index]
        late.send(signal.SIGSTOP)
        reference = the_job(redis)[b"shared"].decode()
        assert "batch scored" not in late.errors()
        timely = start("worker", "brightness", "--announce", **environment)
        assert_own_scores(earlier.result(60), EARLIER_BHWC)
        timely.send(signal.SIGSTOP)

        later = pool.submit(post, url, LATER_BHWC)
        wait_until(lambda: redis.xlen(KEYS.jobs) == 1)
        assert the_job(redis)[b"shared"].decode() == reference
        found = MappedAreas().find(reference)
        assert found is not None
        assert np.array_equal(decode_batch(found[0], Limits()).images_HWC, LATER_BHWC)
        late.send(signal.SIGCONT)
        wait_until(lambda: "reply dropped" in late.errors())
        assert "batch scored" in late.errors()
        timely.send(signal.SIGCONT)
        assert_own_scores(later.result(60), LATER_BHWC)
        assert_own_scores(post(url, EARLIER_BHWC), EARLIER_BHWC)


def fewer_images_of_as_many_bytes() -> bytes:
    """Four images of 8×8 take the bytes of one of 16×16, and the heads are as long."""
    body = encode_batch(random_images(1, 16, 16, 3))
    assert len(body) == len(encode_batch(EARLIER_BHWC))
    return body


LATER_BODIES = {
    "fewer images": fewer_images_of_as_many_bytes,
    "more bytes": lambda: encode_batch(random_images(9, 8, 8, 3)),
    "a part of a head": lambda: encode_batch(random_images(1, 16, 16, 3)).partition(b",16")[0] + b",1",
    "noise": lambda: random_images(500).tobytes(),
}


@pytest.mark.anyio
@pytest.mark.parametrize("later", LATER_BODIES)
async def test_what_no_longer_fits_its_reference_is_an_error(redis: AsyncRedis, api: SubmitQueue, later: str) -> None:
    """A job without its very images gets no score, and the worker that met it goes on."""
    sent = encode_batch(EARLIER_BHWC)
    area = Area(2**18)
    area.memory[: len(sent)] = sent
    batch = decode_batch(area.memory[: len(sent)], Limits())
    jobs = split_batch(batch, job_images=2, job_bytes=2**20, area=area, body_bytes=len(sent))
    asking = asyncio.create_task(api.score(jobs, deadline_s=20.0))
    await wait_until_async(lambda: has_jobs(redis, 2))
    body = LATER_BODIES[later]()
    area.memory[: len(body)] = body
    async with working(redis, Brightness()):
        with pytest.raises(ScoringFailed, match="the job is damaged"):
            await asking
        assert scores(await api.score(jobs_of(4), deadline_s=20.0)) == expected(jobs_of(4))
    await assert_nothing_left(redis)
    area.close()
