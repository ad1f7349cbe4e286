"""Whatever a reward does, and however full Redis is: an error for one request, and the worker goes on."""

import asyncio
from collections.abc import Callable

import numpy as np
import pytest
from redis.asyncio import Redis

from services.batching.errors import DeadlinePassed, ScoringFailed
from services.batching.scoring import ScorerHung
from services.batching.submit import SubmitQueue
from services.batching.worker import Worker, WorkerLimits
from services.rewards.base import UnfitImage
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


def raising(error: BaseException) -> Callable[[np.ndarray], object]:
    """A form that is none."""

    def form(_: np.ndarray) -> object:
        raise error

    return form


FORMS = {
    "memory": (raising(MemoryError("of a test")), "MemoryError"),
    "exit": (raising(SystemExit(3)), "SystemExit: 3"),
    "interrupt": (raising(KeyboardInterrupt()), "KeyboardInterrupt"),
    "stop": (raising(StopIteration(5)), "StopIteration: 5"),
    "masked": (lambda scores_B: np.ma.masked_array(scores_B, mask=[True, *[False] * (len(scores_B) - 1)]), "masked"),
    "complex": (lambda scores_B: scores_B + 1j, "complex128"),
    "text": (lambda scores_B: scores_B.astype(str), "expected plain real numbers"),
    "bool": (lambda scores_B: scores_B > 0.5, "bool"),
    "none": (lambda _: None, "expected plain real numbers"),
    "two dimensions": (lambda scores_B: scores_B[:, None], r"shape \(4, 1\)"),
}


@pytest.mark.parametrize("form", FORMS)
async def test_what_is_no_row_of_numbers_is_an_error(redis: Redis, api: SubmitQueue, form: str) -> None:
    """It reaches the request at once, becomes no number, and costs neither the worker nor a delivery."""
    make, words = FORMS[form]
    reward = dummies.Returns(make)
    async with working(redis, reward):
        with pytest.raises(ScoringFailed, match=words):
            await api.score(jobs_of(4), deadline_s=20.0)
        reward.form = lambda scores_B: scores_B
        assert scores(await api.score(jobs_of(4), deadline_s=20.0)) == expected(jobs_of(4))
    await assert_nothing_left(redis)
    assert await redis.xlen(KEYS.dead) == 0


@pytest.mark.parametrize("form", [list, np.float16, np.float32])
async def test_plain_numbers_of_any_kind_are_scores(
    redis: Redis, api: SubmitQueue, form: Callable[[np.ndarray], object]
) -> None:
    """Lists and arrays of any precision."""
    async with working(redis, dummies.Returns(form)):
        assert scores(await api.score(jobs_of(4), deadline_s=20.0)) == pytest.approx(expected(jobs_of(4)), abs=1e-3)


@pytest.mark.parametrize(
    ("given", "named"),
    [(np.argmax([0, 0, 1]), 2), (np.uint8(3), 3), (4, None), (-1, None), (np.int64(-1), None), (1.0, None)],
)
async def test_an_index_of_any_kind_is_read_and_one_out_of_range_names_no_image(
    redis: Redis, api: SubmitQueue, given: object, named: int | None
) -> None:
    """A reward takes it from numpy, or miscounts: the request learns why it failed, and the worker goes on."""
    reward = dummies.Returns(raising(UnfitImage("too dark", given)))  # type: ignore[arg-type]
    async with working(redis, reward):
        with pytest.raises(ScoringFailed, match="UnfitImage: too dark") as caught:
            await api.score(jobs_of(4), deadline_s=20.0)
        assert caught.value.index == named
        reward.form = lambda scores_B: scores_B
        assert scores(await api.score(jobs_of(4), deadline_s=20.0)) == expected(jobs_of(4))
    assert await redis.xlen(KEYS.dead) == 0


async def test_a_worker_that_fails_hands_nothing_back(redis: Redis, api: SubmitQueue) -> None:
    """What it had in hand counts as delivered, for it may be the cause."""
    worker = Worker(work_queue(redis, "fails", lease_ms=60_000), dummies.Slow(), WorkerLimits(score_timeout_s=0.05))
    jobs = jobs_of(8)  # two jobs in one batch: neither is known to be the culprit
    request = asyncio.create_task(api.score(jobs, deadline_s=20.0))
    await wait_until_async(lambda: has_jobs(redis, 2))
    with pytest.raises(ScorerHung):
        await worker.run(asyncio.Event())
    pending = await redis.xpending_range(KEYS.jobs, "workers", "-", "+", 10)
    assert [entry["times_delivered"] for entry in pending] == [1, 1]
    assert {entry["consumer"] for entry in pending} == {b"fails"}
    request.cancel()
    await asyncio.wait([request])


async def test_one_that_hangs_alone_is_given_up_at_once(redis: Redis, api: SubmitQueue) -> None:
    """The culprit is known, and its caller need not wait for further deaths."""
    worker = Worker(work_queue(redis, "hangs"), dummies.Slow(), WorkerLimits(score_timeout_s=0.05))
    request = asyncio.create_task(api.score(jobs_of(1), deadline_s=20.0))
    await wait_until_async(lambda: has_jobs(redis, 1))
    with pytest.raises(ScorerHung):
        await worker.run(asyncio.Event())
    with pytest.raises(ScoringFailed, match=r"longer than 0\.05 s"):
        await request
    assert await redis.xlen(KEYS.dead) == 1


async def test_a_full_redis_is_emptied(redis: Redis, api: SubmitQueue) -> None:
    """Workers that live and workers that come score what is there, and lose no lease."""
    async with working(redis, Brightness()):
        await api.score(jobs_of(4), deadline_s=20.0)
    waiting = asyncio.create_task(api.score(jobs_of(40), deadline_s=20.0))
    await wait_until_async(lambda: has_jobs(redis, 10))
    before = (await redis.config_get("maxmemory"))["maxmemory"]
    await redis.config_set("maxmemory", 1)
    try:
        limits = WorkerLimits(max_batch=8, lease_s=LEASE_MS / 1000, patience_s=0.01)
        async with working(redis, Brightness(), limits):
            assert scores(await waiting) == expected(jobs_of(40))
    finally:
        await redis.config_set("maxmemory", before)
    async with working(redis, Brightness(), LIMITS):
        assert scores(await api.score(jobs_of(4), deadline_s=20.0)) == expected(jobs_of(4))


async def test_a_reply_that_says_more_than_is_known_is_read(redis: Redis, api: SubmitQueue) -> None:
    """As of a newer worker; and one that is no reply at all costs nobody the next."""
    await redis.xadd(api._reply_key, {"nonsense": "x"})
    worker = work_queue(redis, "newer")
    await worker.ensure_group()
    request = asyncio.create_task(api.score(jobs_of(1), deadline_s=20.0))
    delivery = (await worker.read(1, block_ms=2000))[0].delivery
    body = '{"scores": [0.5], "error": null, "expired": false, "queue_ms": 1, "score_ms": 1, "mood": "good"}'
    await redis.xadd(api._reply_key, {"uid": delivery.uid, "body": body})
    assert scores(await request) == [0.5]


async def test_workers_that_are_long_gone_are_struck_off(redis: Redis, api: SubmitQueue) -> None:
    """Each death leaves a name in the group; those with jobs stay until the jobs are taken over."""
    lives = work_queue(redis, "lives")
    await lives.ensure_group()
    request = asyncio.create_task(api.score(jobs_of(1), deadline_s=1.0))
    await wait_until_async(lambda: has_jobs(redis, 1))
    for name in ("gone-1", "gone-2"):
        await work_queue(redis, name).read(1, block_ms=None)
    await asyncio.sleep(0.2)
    script = redis.register_script(lives._tidy.script)
    keys = [KEYS.jobs, KEYS.uploads, KEYS.load, KEYS.events]
    await script(keys=keys, args=["workers", 1000, 1000, KEYS.payload(""), 100, 60_000])
    names = {consumer["name"] for consumer in await redis.xinfo_consumers(KEYS.jobs, "workers")}
    assert names <= {b"gone-1", b"gone-2"}
    assert len(names) == 1  # it has the job
    assert 0 < await redis.pttl(KEYS.jobs) <= 60_000
    with pytest.raises(DeadlinePassed):
        await request
