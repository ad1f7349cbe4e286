"""The API's side of the queue: admission, jobs out, replies in.

Errors::

    QueueError
    ├── QueueFull      the bound on images or bytes is reached; try again later
    ├── QueueAway      Redis is gone or out of memory; try again later
    ├── DeadlinePassed no answer came in time
    └── ScoringFailed  the worker answered with an error
"""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.batching import lua
from services.batching.streams import GROUP, KEY_TTL_MS, QUEUE_GONE, Keys, Reply, end
from services.images import Batch, encode_batch

logger = logging.getLogger(__name__)

UPLOAD_TTL_MS = 60_000
READ_BLOCK_MS = 1000
RECONNECT_S = 0.1


class QueueError(Exception):
    """A request did not get its scores from the queue; see the module for the tree."""


class QueueFull(QueueError):
    """The bound on queued images or bytes is reached."""


class QueueAway(QueueError):
    """Redis cannot be reached or cannot take more."""


class DeadlinePassed(QueueError):
    """The deadline passed before the last score."""


class ScoringFailed(QueueError):
    """A worker answered with an error."""


@dataclass(frozen=True, slots=True)
class Job:
    """Consecutive images of one request, all of one size.

    Attributes:
        images_BHWC: uint8 (B, H, W, 3).
        prompts: one for each image, or None.
    """

    images_BHWC: NDArray[np.uint8]
    prompts: Sequence[str] | None


@dataclass(frozen=True, slots=True)
class _Sent:
    """A job in the stream."""

    uid: str
    entry: bytes
    images: int
    size_bytes: int


def split_batch(batch: Batch, *, job_images: int, job_bytes: int) -> list[Job]:
    """Cut a batch into jobs that keep its order.

    Args:
        batch: the images of a request, of any mix of sizes.
        job_images: most images in a job.
        job_bytes: most bytes of pixels in a job of more than one image.

    Returns:
        The jobs; laid end to end they are the batch.
    """
    jobs = []
    start = 0
    count = len(batch.images_HWC)
    while start < count:
        first = batch.images_HWC[start]
        most = max(1, min(job_images, job_bytes // first.nbytes))
        stop = start + 1
        while stop < min(count, start + most) and batch.images_HWC[stop].shape == first.shape:
            stop += 1
        prompts = None if batch.prompts is None else batch.prompts[start:stop]
        jobs.append(Job(np.stack(batch.images_HWC[start:stop]), prompts))
        start = stop
    return jobs


class SubmitQueue:
    """An API process's view of the queue of one reward and version; use as `async with`."""

    def __init__(self, redis: "Redis", keys: Keys, *, queue_images: int, queue_bytes: int) -> None:
        """Bind the queue.

        Args:
            redis: a client of `streams.connect`.
            keys: which queue.
            queue_images, queue_bytes: bounds of what may wait or be in work, over all API processes.
        """
        self._redis = redis
        self._keys = keys
        self._queue_images = queue_images
        self._queue_bytes = queue_bytes
        self._reply_key = keys.replies(uuid.uuid4().hex)
        self._waiting: dict[str, asyncio.Future[Reply]] = {}
        self._reader: asyncio.Task[None] | None = None
        self._admit = redis.register_script(lua.ADMIT)
        self._withdraw = redis.register_script(lua.WITHDRAW)
        self._enqueue = redis.register_script(lua.ENQUEUE)
        self._cancel = redis.register_script(lua.CANCEL)

    async def __aenter__(self) -> "SubmitQueue":
        """Begin to listen for replies."""
        self._reader = asyncio.create_task(self._read_replies())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop listening and remove the reply stream."""
        if self._reader is not None:
            await end(self._reader)
        with contextlib.suppress(RedisError, OSError):
            await self._redis.delete(self._reply_key)

    async def ready(self) -> bool:
        """Whether a warm worker lives.

        Raises:
            QueueAway: Redis cannot be reached.
        """
        try:
            return bool(await self._redis.exists(self._keys.alive))
        except (RedisError, OSError) as error:
            raise QueueAway(_one_line(error)) from error

    async def load(self) -> tuple[int, int]:
        """Images and bytes that are reserved, wait, or are in work.

        Raises:
            QueueAway: Redis cannot be reached.
        """
        try:
            images, size_bytes = await self._redis.hmget(self._keys.load, ["images", "bytes"])
        except (RedisError, OSError) as error:
            raise QueueAway(_one_line(error)) from error
        return int(images or 0), int(size_bytes or 0)

    async def score(self, jobs: Sequence[Job], *, deadline_s: float) -> list[Reply]:
        """Have jobs scored; whatever happens, none of them stays in the queue afterwards.

        Args:
            jobs: all jobs of one request.
            deadline_s: seconds from now after which the answer is of no use.

        Returns:
            One reply without error for each job, in order.

        Raises:
            QueueError: see the module for the tree.
        """
        sent: list[_Sent] = []
        futures: list[asyncio.Future[Reply]] = []
        gives_up_s = asyncio.get_running_loop().time() + deadline_s
        try:
            async with asyncio.timeout_at(gives_up_s):
                sent = await self._submit(jobs, gives_up_s)
            futures = [self._waiting[job.uid] for job in sent]
            return await self._collect(futures, gives_up_s)
        except TimeoutError:
            raise DeadlinePassed(f"no score within the deadline of {deadline_s:.3g} s: allow more time") from None
        except (RedisError, OSError) as error:
            raise QueueAway(_one_line(error)) from error
        finally:
            left = [job for job, future in zip(sent, futures, strict=True) if not future.done()]
            for job in sent:
                self._waiting.pop(job.uid, None)
            for future in futures:
                if not future.cancel() and not future.cancelled():
                    future.exception()  # seen, so that asyncio does not report it as lost
            if left:
                await asyncio.shield(self._drop(left))

    async def _submit(self, jobs: Sequence[Job], gives_up_s: float) -> list[_Sent]:
        """Reserve room, upload the payloads, and put all jobs into the stream at once."""
        loop = asyncio.get_running_loop()
        request = uuid.uuid4().hex
        sizes = [(len(job.images_BHWC), job.images_BHWC.nbytes) for job in jobs]
        images, size_bytes = sum(size[0] for size in sizes), sum(size[1] for size in sizes)
        member = f"{request}:{images}:{size_bytes}"
        keys = [self._keys.jobs, self._keys.uploads, self._keys.load]
        limits = [self._queue_images, self._queue_bytes, UPLOAD_TTL_MS, KEY_TTL_MS]
        admitted, queued_images, queued_bytes = await self._admit(keys=keys, args=[member, images, size_bytes, *limits])
        if not admitted:
            raise QueueFull(
                f"{queued_images} images ({queued_bytes} bytes) are queued and {images} ({size_bytes} bytes) would "
                f"exceed the limit of {self._queue_images} images or {self._queue_bytes} bytes: try again later"
            )
        uids = [f"{request}-{number}" for number in range(len(jobs))]
        enqueuing: asyncio.Task[list[_Sent]] | None = None
        try:
            for uid, job in zip(uids, jobs, strict=True):
                payload = encode_batch(job.images_BHWC, job.prompts)
                left_ms = max(1, int(1000 * (gives_up_s - loop.time())))
                await self._redis.set(self._keys.payload(uid), payload, px=left_ms)
                self._waiting[uid] = loop.create_future()
            left_ms = max(1, int(1000 * (gives_up_s - loop.time())))
            enqueuing = asyncio.create_task(self._enqueue_all(uids, sizes, member, left_ms))
            return await asyncio.shield(enqueuing)
        except BaseException:
            await asyncio.shield(self._give_up(uids, member, images, size_bytes, enqueuing))
            raise

    async def _enqueue_all(
        self, uids: Sequence[str], sizes: Sequence[tuple[int, int]], member: str, left_ms: int
    ) -> list[_Sent]:
        """Turn the reservation into entries of the stream, all in one step."""
        totals = [sum(size[0] for size in sizes), sum(size[1] for size in sizes)]
        parts = [part for uid, size in zip(uids, sizes, strict=True) for part in (uid, *size)]
        entries = await self._enqueue(
            keys=[self._keys.jobs, self._keys.uploads, self._keys.load],
            args=[member, *totals, left_ms, self._reply_key, *parts],
        )
        return [_Sent(uid, entry, *size) for uid, entry, size in zip(uids, entries, sizes, strict=True)]

    async def _collect(self, futures: Sequence[asyncio.Future[Reply]], gives_up_s: float) -> list[Reply]:
        """Wait for all replies, or for the first error."""
        left_s = gives_up_s - asyncio.get_running_loop().time()
        for finished in asyncio.as_completed(futures, timeout=max(0.0, left_s)):
            reply = await finished
            if reply.expired:
                raise DeadlinePassed(reply.error or "the deadline passed")
            if reply.error is not None:
                raise ScoringFailed(reply.error)
        return [future.result() for future in futures]

    async def _give_up(
        self,
        uids: Sequence[str],
        member: str,
        images: int,
        size_bytes: int,
        enqueuing: asyncio.Task[list[_Sent]] | None,
    ) -> None:
        """Undo a submission that was cut short; what cannot be undone now expires by itself."""
        for uid in uids:
            self._waiting.pop(uid, None)
        with contextlib.suppress(RedisError, OSError):
            if enqueuing is not None:
                await self._drop(await enqueuing)
            await self._withdraw(keys=[self._keys.uploads, self._keys.load], args=[member, images, size_bytes])
            await self._redis.unlink(*(self._keys.payload(uid) for uid in uids))

    async def _drop(self, sent: Sequence[_Sent]) -> None:
        """Take jobs that nobody waits for out of the queue; if Redis is away they expire by themselves."""
        with contextlib.suppress(RedisError, OSError):
            for job in sent:
                await self._cancel(
                    keys=[self._keys.jobs, self._keys.load, self._keys.payload(job.uid)],
                    args=[GROUP, job.entry, job.images, job.size_bytes],
                )

    async def _read_replies(self) -> None:
        """Hand replies to those who wait; while Redis is away the waiting are told so, and it is tried again."""
        last: bytes | str = "0"
        while True:
            try:
                answer: Any = await self._redis.xread({self._reply_key: last}, block=READ_BLOCK_MS)
                for _, entries in answer or ():
                    for entry, fields in entries:
                        last = entry
                        self._deliver(fields)
                    await self._redis.xdel(self._reply_key, *(entry for entry, _ in entries))
            except (RedisError, OSError) as error:
                if not isinstance(error, QUEUE_GONE):
                    logger.exception("replies cannot be read; trying again")
                for future in self._waiting.values():
                    if not future.done():
                        future.set_exception(QueueAway(_one_line(error)))
                await asyncio.sleep(RECONNECT_S)

    def _deliver(self, fields: dict[bytes, bytes]) -> None:
        """Give one reply to its waiter, if there still is one."""
        uid, reply = Reply.from_fields(fields)
        future = self._waiting.get(uid)
        if future is not None and not future.done():
            future.set_result(reply)


def _one_line(error: Exception) -> str:
    return f"Redis is not available ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
