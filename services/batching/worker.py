"""The worker: take jobs, score them in batches across requests, reply to each once.

While one batch is scored, the replies to the last go out and the jobs of the next come in, so that a reward on a GPU
need not wait for Redis.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from redis.exceptions import RedisError

from services.batching.batcher import Batcher
from services.batching.scoring import Guard, Scorer, ScorerHung, Work, fields_of
from services.batching.streams import QUEUE_GONE, Delivery, Reply, Taken, WorkQueue, end
from services.images import Batch, BodyError, BodyMalformed, decode_batch
from services.protocol import Limits
from services.rewards.base import Reward

logger = logging.getLogger(__name__)

IDLE_BLOCK_MS = 250
"""How long an idle worker waits for a job before it looks whether it shall stop or take over."""
MOST_AT_ONCE = 16
"""Jobs taken in one step: should they be larger than those before, no more than these wait here for their turn."""
STRAGGLER_POLL_S = 0.003
"""How often a worker with an unfinished batch looks for more."""
AHEAD_S = 0.005
"""How long before the expected end of a forward pass the next jobs are taken. What is held here another worker cannot
have, even if it becomes free first."""
ROUND_TRIP_S = 0.002
"""A forward pass that is expected to be shorter is over before the next jobs are here."""
WARN_EVERY_S = 10.0
"""How often it is said that Redis is away, while it is."""
ANY_SIZE = Limits(max_images=2**31, max_body_bytes=2**62, max_pixels=2**62, max_prompt_chars=2**31)
"""The API has checked its requests; a worker that checked with other settings would contradict it."""


class QueueGone(RuntimeError):
    """Redis stayed away for longer than the worker's patience."""


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
        self._queue = queue
        self._limits = limits
        self._scorer = Scorer(reward, timeout_s=limits.score_timeout_s, guard=guard)
        self._job_images = limits.job_images  # of the largest job of late: the next are taken for as large
        self._batcher: Batcher[Work] = Batcher(max_batch=limits.max_batch, max_wait_s=limits.max_wait_s)
        self._held: dict[bytes, Delivery] = {}  # until it is replied to
        self._scored: Sequence[Work] = ()  # and not replied to
        self._took_over_s = -math.inf
        self._away_since_s: float | None = None  # None from the moment that Redis answers
        self._warned_s = -math.inf
        self.is_warm = False

    async def warmup(self) -> None:
        """Load the reward, on the thread that will score."""
        await self._scorer.warmup()
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
        try:
            while not stop.is_set():
                try:
                    if beat is None:
                        await self._queue.ensure_group()
                        await self._queue.keep_alive()
                        beat = asyncio.create_task(self._beat())
                        on_ready()
                    works: Sequence[Work] = self._batcher.pop(time.monotonic())
                    if not works:
                        await self._reply()
                        works = await self._next_batch(stop)
                    await self._serve(works, stop)
                except (RedisError, *QUEUE_GONE) as error:
                    await self._endure(error)
            with contextlib.suppress(RedisError, OSError):
                await self._reply()
            if beat is not None:
                await end(beat)
            with contextlib.suppress(RedisError, OSError):
                await self._queue.hand_back()
        finally:  # without handing back where it ends by an error: a job that may be the cause shall count as delivered
            if beat is not None:
                await end(beat)
            self._scorer.close()

    async def _endure(self, error: Exception) -> None:
        """Wait a moment for Redis to come back, with its data or without.

        Raises:
            QueueGone: it stayed away too long.
        """
        now_s = time.monotonic()
        if not isinstance(error, QUEUE_GONE):  # but, as that its memory is full, of a Redis that is there
            self._away_since_s = None
        elif self._away_since_s is None:
            self._away_since_s = now_s
        away_s = 0.0 if self._away_since_s is None else now_s - self._away_since_s
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        if away_s > self._limits.patience_s:
            raise QueueGone(f"Redis is away for {away_s:.0f} s, limit {self._limits.patience_s:.0f} s: {line}")
        if time.monotonic() - self._warned_s > WARN_EVERY_S:
            self._warned_s = time.monotonic()
            logger.warning("the queue cannot be served: %s: check that Redis runs and REDIS_URL names it", line)
        self._batcher.clear()
        if not isinstance(error, QUEUE_GONE):  # else the scores are good still, when it comes back
            self._scored = ()
        self._held = {work.delivery.entry: work.delivery for work in self._scored}
        await asyncio.sleep(min(1.0, 0.05 + away_s / 4))
        with contextlib.suppress(RedisError, OSError):
            await self._queue.ensure_group()
            self._away_since_s = None
            await self._queue.keep_alive()  # not with the next beat: until then the APIs would not be ready

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

    async def _next_batch(self, stop: asyncio.Event) -> Sequence[Work]:
        """Wait for a batch; empty if told to stop."""
        while not stop.is_set():
            none_left = True
            if not self._shall_take_over():
                none_left = await self._take(block_ms=None if len(self._batcher) else IDLE_BLOCK_MS)
            elif not len(self._batcher) and not await self._take_over():  # else what waits goes first, and no more
                self._took_over_s = time.monotonic()
            if works := self._batcher.pop(time.monotonic()):
                return works
            if none_left and (due_s := self._batcher.due_s()) is not None:
                await asyncio.sleep(max(0.0, min(STRAGGLER_POLL_S, due_s - time.monotonic())))
        return ()

    async def _take(self, *, block_ms: int | None) -> bool:
        """Take jobs that wait, as many as there is room for; return whether no other may be left."""
        count = max(1, min(MOST_AT_ONCE, self._batcher.room // self._job_images))
        taken = await self._queue.read(count, block_ms=block_ms)
        self._away_since_s = None
        if taken:
            self._job_images = max(each.delivery.images for each in taken)
        for each in taken:
            await self._hold(each)
        return len(taken) < count

    def _shall_take_over(self) -> bool:
        return time.monotonic() - self._took_over_s >= self._limits.lease_s / 2

    async def _take_over(self) -> bool:
        """Take one job whose worker fell silent, to be scored alone, since it may be what silenced it.

        Returns:
            Whether there was one; then there may be more.
        """
        await self._queue.renew(list(self._held.values()))  # never from ourselves, however late the beat
        taken = await self._queue.take_over()
        if taken is None:
            return False
        delivery = taken.delivery
        logger.warning("job taken over, delivery %d", delivery.deliveries, extra=fields_of(delivery))
        if delivery.deliveries > self._limits.max_deliveries:
            reason = f"given up after {self._limits.max_deliveries} deliveries to workers that did not reply"
            await self._queue.bury(replace(delivery, deliveries=self._limits.max_deliveries), reason)
        else:
            await self._hold(taken)
        return True

    async def _hold(self, taken: Taken) -> None:
        """Let a job wait for its batch; reply at once to one that cannot be scored, drop one that nobody waits for."""
        delivery, queue_ms = taken.delivery, taken.queue_ms
        if not taken.wanted:
            logger.info("job dropped: its API is gone", extra=fields_of(delivery))
            await self._queue.drop(delivery)
        elif taken.payload is None:
            lost = "the images are no longer there: let Redis evict nothing (maxmemory-policy noeviction)"
            await self._queue.reply(delivery, Reply(error=lost, lost=True, queue_ms=queue_ms))
        else:
            try:
                work = Work(delivery, _images_of(delivery, taken.payload, taken.part), queue_ms, time.monotonic())
            except BodyError as error:
                await self._queue.reply(delivery, Reply(error=f"the job is damaged: {error}", queue_ms=queue_ms))
                return
            self._held[delivery.entry] = delivery
            self._batcher.add(work, delivery.images, time.monotonic(), alone=delivery.deliveries > 1)

    async def _serve(self, works: Sequence[Work], stop: asyncio.Event) -> None:
        """Score a batch, reply to the last one meanwhile, and take the next jobs shortly before the end.

        Whatever becomes of Redis meanwhile, the scores are kept.
        """
        for work in works:
            work.begin(time.monotonic())
        scoring = asyncio.create_task(self._scorer.score([work for work in works if work.reply is None]))
        try:
            await self._try("reply", self._reply())
            await self._try("take the next jobs", self._look_ahead(works, scoring, stop))
        except asyncio.CancelledError:
            scoring.cancel()
            raise
        finally:
            try:
                self._queue.note_batches(await scoring)
            except ScorerHung as error:
                if error.culprit is not None:
                    await self._try("bury a job", self._queue.bury(error.culprit, str(error)))
                raise
        self._scored = [*self._scored, *works]

    async def _look_ahead(self, works: Sequence[Work], scoring: "asyncio.Task[list[int]]", stop: asyncio.Event) -> None:
        """Take the jobs of the next batch while this one is scored.

        Not while jobs of silent workers are to be looked for, as is the case until none is found: one that may have
        killed its worker is scored with no other in hand, since each delivery counts against those that die with it.
        """
        expected_s = self._scorer.expected_s(sum(work.delivery.images for work in works))
        if expected_s < ROUND_TRIP_S:
            return
        ahead_s = max(AHEAD_S, self._limits.max_wait_s)
        await asyncio.wait([scoring], timeout=max(0.0, expected_s - ahead_s))
        while not (scoring.done() or stop.is_set()) and self._batcher.room and not self._shall_take_over():
            if await self._take(block_ms=None):
                return

    async def _reply(self) -> None:
        """Reply to all that was scored, at once; where Redis fails one of them, the others are given all the same.

        Raises:
            RedisError, OSError: the first failure; what failed may be tried again.
        """
        works, self._scored = self._scored, ()
        replies = [self._queue.reply(work.delivery, work.reply) for work in works if work.reply is not None]
        assert len(replies) == len(works)
        outcomes = await asyncio.gather(*replies, return_exceptions=True)
        errors: list[BaseException] = []
        failed: list[Work] = []
        for work, outcome in zip(works, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                errors.append(outcome)
                failed.append(work)
                continue
            self._held.pop(work.delivery.entry, None)
            if not outcome:
                logger.info("reply dropped: withdrawn, or answered by another", extra=fields_of(work.delivery))
        self._scored = failed
        if errors:
            raise errors[0]


def _images_of(delivery: Delivery, payload: bytes | memoryview, part: slice) -> Batch:
    """The images of a job.

    Raises:
        BodyError: the payload does not hold them; shared memory may hold another request by now, of other sizes.
    """
    batch = decode_batch(payload, ANY_SIZE).part(part)
    if len(batch.images_HWC) != delivery.images:
        raise BodyMalformed(f"{len(batch.images_HWC)} images where {delivery.images} were submitted")
    return batch
