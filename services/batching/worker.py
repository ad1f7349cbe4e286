"""The worker: take jobs, score them in batches across requests, reply to each once.

Shape suffixes: B images of a batch, H height and W width in pixels, C = 3 channels (RGB).
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from redis.exceptions import RedisError

from services.batching.batcher import Batcher
from services.batching.streams import QUEUE_GONE, Delivery, Reply, WorkQueue, end
from services.images import Batch, BodyError, BodyMalformed, decode_batch
from services.protocol import Limits
from services.rewards.base import Reward, UnfitImage

logger = logging.getLogger(__name__)

IDLE_BLOCK_MS = 250
"""How long an idle worker waits for a job before it looks whether it shall stop or take over."""
MOST_AT_ONCE = 16
"""Jobs taken in one step: should they be larger than those before, no more than these wait here for their turn."""
STRAGGLER_POLL_S = 0.001
"""How often a worker with an unfinished batch looks for more."""
WARN_EVERY_S = 10.0
"""How often it is said that Redis is away, while it is."""
TIMEOUT_SLICES = 20
"""The limit of a forward pass is waited for in so many pieces, so that a process that was frozen, which is no fault of
the images, wakes with most of it left."""
ANY_SIZE = Limits(max_images=2**31, max_body_bytes=2**62, max_pixels=2**62, max_prompt_chars=2**31)
"""The API has checked its requests; a worker that checked with other settings would contradict it."""


Guard = Callable[[], contextlib.AbstractContextManager[None]]


class QueueGone(RuntimeError):
    """Redis stayed away for longer than the worker's patience."""


class ScorerHung(RuntimeError):
    """A forward pass exceeded its time limit; the process must end, since its thread cannot be stopped."""


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """How a worker works.

    Attributes:
        max_batch: images in one forward pass.
        max_wait_s: seconds that the first job of a batch waits for others.
        job_images: most images that a job may be expected to have.
        lease_s: seconds of silence after which others take over.
        max_deliveries: deliveries without a reply that make a dead letter.
        score_timeout_s: longest forward pass, in seconds.
        patience_s: seconds that the worker outlives a Redis that is gone.
    """

    max_batch: int = 64
    max_wait_s: float = 0.003
    job_images: int = 16
    lease_s: float = 15.0
    max_deliveries: int = 3
    score_timeout_s: float = 30.0
    patience_s: float = 60.0


@dataclass(slots=True)
class _Work:
    """A delivered job with its images, and what became of it."""

    delivery: Delivery
    batch: Batch
    queue_ms: float
    reply: Reply | None = field(default=None)

    def images(self) -> NDArray[np.uint8]:
        """All of its images, uint8 (B, H, W, 3)."""
        whole_BHWC = self.batch.whole_BHWC
        return np.stack(self.batch.images_HWC) if whole_BHWC is None else whole_BHWC


class Worker:
    """Scores the jobs of one queue with one reward until told to stop."""

    def __init__(
        self, queue: WorkQueue, reward: Reward, limits: WorkerLimits, *, guard: Guard = contextlib.nullcontext
    ) -> None:
        """Bind queue and reward; the reward is warmed up by `warmup`.

        Args:
            queue: where jobs come from.
            reward: scores them.
            limits: how to work.
            guard: entered around each forward pass, to end a process that not even the limits can.
        """
        self._guard = guard
        self._queue = queue
        self._reward = reward
        self._limits = limits
        self._job_images = limits.job_images  # of the largest job of late: the next are taken for as large
        self._batcher: Batcher[Delivery] = Batcher(max_batch=limits.max_batch, max_wait_s=limits.max_wait_s)
        self._held: dict[bytes, Delivery] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reward")
        self._took_over_s = -math.inf
        self._warned_s = -math.inf
        self._batch_sizes: list[int] = []
        self._hung = False
        self.is_warm = False

    async def warmup(self) -> None:
        """Load the reward, on the thread that will score."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._reward.warmup)
        self.is_warm = True

    async def run(self, stop: asyncio.Event, *, on_ready: Callable[[], None] = lambda: None) -> None:
        """Work until `stop` is set; then finish the batch in hand and give back the rest.

        Args:
            stop: set by the caller.
            on_ready: called once, when the queue is reached and the worker counts as alive.

        Raises:
            QueueGone: Redis stayed away too long.
            ScorerHung: a forward pass exceeded its limit; the caller must end the process at once.
        """
        beat: asyncio.Task[None] | None = None
        away_since_s: float | None = None
        try:
            while not stop.is_set():
                try:
                    if beat is None:
                        await self._queue.ensure_group()
                        await self._queue.keep_alive()
                        beat = asyncio.create_task(self._beat())
                        on_ready()
                    await self._serve(await self._next_batch(stop))
                    away_since_s = None
                except (RedisError, *QUEUE_GONE) as error:
                    now_s = time.monotonic()
                    # Other errors, as that its memory is full, come from a Redis that is there.
                    if isinstance(error, QUEUE_GONE) and away_since_s is None:
                        away_since_s = now_s
                    await self._endure(error, 0.0 if away_since_s is None else now_s - away_since_s)
            if beat is not None:
                await end(beat)
            with contextlib.suppress(RedisError, OSError):
                await self._queue.hand_back()
        finally:  # without handing back where it ends by an error: a job that may be the cause shall count as delivered
            if beat is not None:
                await end(beat)
            if not self._hung:
                self._thread.shutdown()

    async def _endure(self, error: Exception, away_s: float) -> None:
        """Wait a moment for Redis to come back, with its data or without."""
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        if away_s > self._limits.patience_s:
            raise QueueGone(f"Redis is away for {away_s:.0f} s, limit {self._limits.patience_s:.0f} s: {line}")
        if time.monotonic() - self._warned_s > WARN_EVERY_S:
            self._warned_s = time.monotonic()
            logger.warning("the queue cannot be served: %s: check that Redis runs and REDIS_URL names it", line)
        self._batcher.clear()
        self._held.clear()
        await asyncio.sleep(min(1.0, 0.05 + away_s / 4))
        with contextlib.suppress(RedisError, OSError):
            await self._queue.ensure_group()

    async def _beat(self) -> None:
        """Three times a lease: say that we live, renew the lease of what we hold, drop what nobody waits for."""
        while True:
            await self._try("renew its leases", self._queue.renew(list(self._held.values())))
            await self._try("say that it lives", self._queue.keep_alive())
            await self._try("tidy up", self._queue.tidy())
            await asyncio.sleep(self._limits.lease_s / 3)

    @staticmethod
    async def _try(what: str, step: Awaitable[object]) -> None:
        """Do what may fail without harm, for a while, where Redis is away or full."""
        try:
            await step
        except (RedisError, OSError) as error:
            logger.warning("the worker cannot %s: %s", what, error)

    async def _next_batch(self, stop: asyncio.Event) -> list[Delivery]:
        """Wait for a batch; empty if told to stop."""
        while not stop.is_set():
            now_s = time.monotonic()
            if batch := self._batcher.pop(now_s):
                return batch
            if not len(self._batcher) and now_s - self._took_over_s >= self._limits.lease_s / 2:
                if not await self._take_over():
                    self._took_over_s = now_s
                continue
            due_s = self._batcher.due_s()
            count = max(1, min(MOST_AT_ONCE, self._batcher.room // self._job_images))
            deliveries = await self._queue.read(count, block_ms=IDLE_BLOCK_MS if due_s is None else None)
            if deliveries:
                self._job_images = max(delivery.images for delivery in deliveries)
            for delivery in deliveries:
                self._hold(delivery, alone=False)
            if due_s is not None and not deliveries:
                await asyncio.sleep(max(0.0, min(STRAGGLER_POLL_S, due_s - time.monotonic())))
        return []

    async def _take_over(self) -> bool:
        """Take one job whose worker fell silent, to be scored alone, since it may be what silenced it.

        Returns:
            Whether there was one; then there may be more.
        """
        await self._queue.renew(list(self._held.values()))  # never from ourselves, however late the beat
        delivery = await self._queue.take_over()
        if delivery is None:
            return False
        logger.warning("job taken over, delivery %d", delivery.deliveries, extra=_fields(delivery))
        if delivery.deliveries > self._limits.max_deliveries:
            reason = f"given up after {self._limits.max_deliveries} deliveries to workers that did not reply"
            await self._queue.bury(replace(delivery, deliveries=self._limits.max_deliveries), reason)
        else:
            self._hold(delivery, alone=delivery.deliveries > 1)
        return True

    def _hold(self, delivery: Delivery, *, alone: bool) -> None:
        self._held[delivery.entry] = delivery
        self._batcher.add(delivery, delivery.images, time.monotonic(), alone=alone)

    async def _serve(self, deliveries: Sequence[Delivery]) -> None:
        """Score a batch of jobs and reply to each."""
        if not deliveries:
            return
        try:
            works = await self._load(deliveries)
            for group in _group_by_shape(works):
                try:
                    await self._score(group)
                except ScorerHung as error:
                    if len(group) == 1:  # and so the culprit is known
                        await self._try("bury a job", self._queue.bury(group[0].delivery, str(error)))
                    raise
            await self._reply(works)
        finally:
            for delivery in deliveries:
                self._held.pop(delivery.entry, None)
        sizes, self._batch_sizes = self._batch_sizes, []
        if sizes:
            await self._try("count its batches", self._queue.count_batches(sizes))

    async def _reply(self, works: Sequence[_Work]) -> None:
        """Reply to all at once; where Redis fails one of them, the others are given all the same."""
        replies = [self._queue.reply(work.delivery, work.reply) for work in works if work.reply is not None]
        assert len(replies) == len(works)
        for work, settled in zip(works, await asyncio.gather(*replies, return_exceptions=True), strict=True):
            if isinstance(settled, BaseException):
                raise settled
            if not settled:
                logger.info("reply dropped: withdrawn, or answered by another", extra=_fields(work.delivery))

    async def _load(self, deliveries: Sequence[Delivery]) -> list[_Work]:
        """Fetch what there is to score; reply to the jobs that cannot be, drop those that nobody waits for."""
        works = []
        now_ms, loads = await self._queue.load(deliveries)
        for delivery, loaded in zip(deliveries, loads, strict=True):
            queue_ms = float(max(0, now_ms - delivery.submitted_ms))
            if not loaded.wanted:
                logger.info("job dropped: its API is gone", extra=_fields(delivery))
                await self._queue.drop(delivery)
            elif now_ms >= delivery.deadline_ms:
                late = f"the deadline passed after {queue_ms:.0f} ms in the queue: allow more time"
                await self._queue.reply(delivery, Reply(error=late, expired=True, queue_ms=queue_ms))
            elif loaded.payload is None:
                lost = "the images are no longer there: let Redis evict nothing (maxmemory-policy noeviction)"
                await self._queue.reply(delivery, Reply(error=lost, lost=True, queue_ms=queue_ms))
            else:
                try:
                    works.append(_Work(delivery, _images_of(delivery, loaded.payload, loaded.part), queue_ms))
                except BodyError as error:
                    await self._queue.reply(delivery, Reply(error=f"the job is damaged: {error}", queue_ms=queue_ms))
        return works

    async def _score(self, works: Sequence[_Work]) -> None:
        """Score jobs of one shape together; should that fail, each alone, so that only the culprit fails."""
        parts_BHWC = [work.images() for work in works]
        images_BHWC = parts_BHWC[0] if len(works) == 1 else np.concatenate(parts_BHWC)
        prompts = [prompt for work in works for prompt in work.batch.prompts or ()] or None
        started_s = time.perf_counter()
        try:
            scores_B = await self._forward(images_BHWC, prompts)
        except ScorerHung:
            raise
        except Exception as error:
            if len(works) > 1:
                for work in works:
                    await self._score([work])
                return
            logger.exception("job cannot be scored", extra=_fields(works[0].delivery))
            line = str(error).splitlines()[0][:200] if str(error) else "no message"
            index = error.index if isinstance(error, UnfitImage) else None
            works[0].reply = Reply(error=f"the reward failed: {type(error).__name__}: {line}", index=index)
            return
        score_ms = 1000 * (time.perf_counter() - started_s)
        self._batch_sizes.append(len(images_BHWC))
        requests = sorted({work.delivery.request for work in works})
        fields = {"images": len(images_BHWC), "jobs": len(works), "ms": round(score_ms, 2), "requests": requests}
        logger.info("batch scored", extra={"fields": fields})
        start = 0
        for work in works:
            stop = start + len(work.batch.images_HWC)
            work.reply = _reply(scores_B[start:stop], work.queue_ms, score_ms)
            start = stop

    async def _forward(self, images_BHWC: NDArray[np.uint8], prompts: Sequence[str] | None) -> NDArray[np.float64]:
        """Run the reward on its thread, for at most `score_timeout_s`; check the count of its scores."""
        loop = asyncio.get_running_loop()
        with self._guard():
            future = loop.run_in_executor(self._thread, self._call, images_BHWC, prompts)
            for _ in range(TIMEOUT_SLICES):
                done, _pending = await asyncio.wait([future], timeout=self._limits.score_timeout_s / TIMEOUT_SLICES)
                if done:
                    break
        if not done:
            self._hung = True
            raise ScorerHung(
                f"reward {self._reward.name} took longer than {self._limits.score_timeout_s:g} s "
                f"for {len(images_BHWC)} images"
            )
        given = future.result()
        scores_B = np.asarray(given)
        if scores_B.dtype.kind not in "fiu" or isinstance(given, np.ma.MaskedArray):
            raise TypeError(f"scores are {scores_B.dtype}, masked or not, expected plain real numbers")
        if scores_B.shape != (len(images_BHWC),):
            raise ValueError(f"scores have shape {scores_B.shape}, expected ({len(images_BHWC)},)")
        return scores_B.astype(np.float64)

    def _call(self, images_BHWC: NDArray[np.uint8], prompts: Sequence[str] | None) -> object:
        """Call the reward; what would end a thread or a loop, such as SystemExit, becomes an error like any other."""
        try:
            return self._reward.score(images_BHWC, prompts)
        except StopIteration as error:
            raise RuntimeError(f"StopIteration: {error}") from error
        except Exception:
            raise
        except BaseException as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error


def _images_of(delivery: Delivery, payload: bytes | memoryview, part: slice) -> Batch:
    """The images of a job.

    Raises:
        BodyError: the payload does not hold them; shared memory may hold another request by now, of other sizes.
    """
    batch = decode_batch(payload, ANY_SIZE).part(part)
    if len(batch.images_HWC) != delivery.images:
        raise BodyMalformed(f"{len(batch.images_HWC)} images where {delivery.images} were submitted")
    return batch


def _reply(scores_B: NDArray[np.float64], queue_ms: float, score_ms: float) -> Reply:
    """The reply to one job; a score that is no finite number makes it an error."""
    bad = np.flatnonzero(~np.isfinite(scores_B))
    if bad.size:
        error = f"the reward gave {scores_B[bad[0]]} for {bad.size} of {scores_B.size} images: no finite number"
        return Reply(error=error, index=int(bad[0]), queue_ms=queue_ms, score_ms=score_ms)
    return Reply(scores=tuple(scores_B.tolist()), queue_ms=queue_ms, score_ms=score_ms)


def _fields(delivery: Delivery) -> dict[str, Any]:
    """What the log says of a job, as `extra` of a record."""
    return {"fields": {"request": delivery.request, "job": delivery.uid}}


def _group_by_shape(works: Sequence[_Work]) -> list[list[_Work]]:
    """Gather jobs that one forward pass can take: images of one size, all with prompts or none."""
    groups: dict[tuple[tuple[int, ...], bool], list[_Work]] = {}
    for work in works:
        key = (work.batch.images_HWC[0].shape, work.batch.prompts is None)
        groups.setdefault(key, []).append(work)
    return list(groups.values())
