"""The API's side of the queue: admission, jobs out, replies in.

What is submitted is kept until it is answered. Should Redis lose it, it is submitted again.
"""

import asyncio
import contextlib
import itertools
import json
import logging
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.batching import lua
from services.batching.answers import Answers
from services.batching.calls import Calls
from services.batching.errors import DeadlinePassed, QueueAway, QueueFull
from services.batching.jobs import Job, Submitted, collect
from services.batching.keys import Keys
from services.batching.last_steps import LastSteps
from services.batching.streams import GROUP, KEY_TTL_MS, QUEUE_GONE, Reply, end, say_alive, tidy
from services.batching.survey import Events, Survey
from services.images import encode_batch

logger = logging.getLogger(__name__)

READ_BLOCK_MS = 1000
RECONNECT_S = 0.1
SHARE_AGAIN_S = 60.0
"""How long payloads go through Redis after one that was shared could not be read."""


class SubmitQueue:
    """An API process's view of the queue of one reward and version; use as `async with`."""

    def __init__(
        self,
        redis: "Redis",
        keys: Keys,
        *,
        queue_images: int,
        queue_bytes: int,
        lease_ms: int = 15_000,
        answer_ttl_s: float = 600,
    ) -> None:
        """Bind the queue.

        Args:
            redis: a client of `streams.connect`.
            keys: which queue.
            queue_images, queue_bytes: bounds of what may wait or be in work, over all API processes.
            lease_ms: silence after which a worker's jobs are taken over, and an API's are dropped.
            answer_ttl_s: how long the answer to an idempotency key is kept, in seconds.
        """
        self._no_sharing_until_s = 0.0
        self._redis = redis
        self._keys = keys
        self._queue_images = queue_images
        self._queue_bytes = queue_bytes
        self._upload_ms = lease_ms  # what is left of an upload that was cut short is gone after a lease
        self._beat_s = lease_ms / 6000
        self._alive_ms = max(1, lease_ms // 2)
        self._name, self._requests = uuid.uuid4().hex, itertools.count()
        self._reply_key = keys.replies(self._name)
        self._answers = Answers(redis, keys, lease_ms=min(lease_ms, 5000), ttl_s=answer_ttl_s)
        self._submitted: dict[str, Submitted] = {}
        self._look_now = asyncio.Event()
        self._away: str | None = None
        self._last_steps = LastSteps()
        self._tasks: list[asyncio.Task[None]] = []
        self._admit = redis.register_script(lua.ADMIT)
        self._withdraw = redis.register_script(lua.WITHDRAW)
        self._enqueue = redis.register_script(lua.ENQUEUE)
        self._submissions = Calls(
            redis,
            lua.SUBMIT,
            keys=[keys.jobs, keys.uploads, keys.load],
            head=[queue_images, queue_bytes, KEY_TTL_MS, self._reply_key, self._alive_ms],
        )
        self._drop_job = redis.register_script(lua.DROP)
        self._own = redis.register_script(lua.OWN)
        self._tidy = redis.register_script(lua.TIDY)
        self._survey = redis.register_script(lua.SURVEY)

    async def __aenter__(self) -> "SubmitQueue":
        """Begin to listen for replies."""
        self._tasks = [asyncio.create_task(self._read_replies()), asyncio.create_task(self._beat())]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop listening and remove the reply stream."""
        for task in self._tasks:
            await end(task)
        await self._last_steps.end()
        with contextlib.suppress(RedisError, OSError):
            await self._redis.delete(self._reply_key, self._reply_key + lua.ALIVE)

    async def ready(self) -> bool:
        """Whether a warm worker lives.

        Raises:
            QueueAway: Redis cannot be reached.
        """
        try:
            return bool(await self._redis.exists(self._keys.alive))
        except (RedisError, OSError) as error:
            raise QueueAway.of(error) from error

    async def trouble(self) -> str:
        """What the last start of a worker tells about there being none; empty if nothing.

        Raises:
            QueueAway: Redis cannot be reached.
        """
        try:
            note: Any = await self._redis.get(self._keys.start)
        except (RedisError, OSError) as error:
            raise QueueAway.of(error) from error
        if note is None:
            return ""
        start = json.loads(note)
        if start["trouble"]:
            return f"the last that tried could not: {start['trouble']}"
        if start["version"] != self._keys.version:
            remedy = "give API and workers the same settings, and restart the API if its weights have changed since"
            return f"the last that started is of version {start['version']}: {remedy}"
        return ""

    async def survey(self) -> Survey:
        """What can be seen of the queue now, over all APIs and workers.

        Raises:
            QueueAway: Redis cannot be reached.
        """
        keys = [self._keys.jobs, self._keys.load, self._keys.dead, self._keys.events]
        try:
            waiting, leased, size_bytes, oldest_ms, dead, flat = await self._survey(
                keys=keys, args=[GROUP, lua.HANDED_BACK]
            )
        except (RedisError, OSError) as error:
            raise QueueAway.of(error) from error
        events = Events.from_hash(dict(zip(flat[::2], flat[1::2], strict=True)))
        return Survey(waiting, leased, size_bytes, oldest_ms / 1000, dead, events)

    async def once(self, key: str, digest: str, work: Callable[[], Awaitable[bytes]], *, deadline_s: float) -> bytes:
        """Bring back the answer of an idempotency key, or find it; see `Answers.once`."""
        return await self._answers.once(key, digest, work, deadline_s=deadline_s)

    async def score(self, jobs: Sequence[Job], *, deadline_s: float, request: str = "") -> list[Reply]:
        """Have jobs scored; whatever happens, none of them stays in the queue afterwards.

        Args:
            jobs: all jobs of one request.
            deadline_s: seconds from now after which the answer is of no use.
            request: its name in the logs.

        Returns:
            One reply without error for each job, in order.

        Raises:
            QueueError: see `services.batching.errors`.
        """
        loop = asyncio.get_running_loop()
        name, gives_up_s = f"{self._name}-{next(self._requests)}", loop.time() + deadline_s
        submitted = [
            Submitted(f"{name}-{number}", job, request, gives_up_s, loop.create_future())
            for number, job in enumerate(jobs)
        ]
        self._submitted.update((job.uid, job) for job in submitted)
        try:
            async with asyncio.timeout_at(gives_up_s):
                if all(job.content.shared for job in submitted) and loop.time() >= self._no_sharing_until_s:
                    await self._submit_shared(submitted)
                else:
                    await self._submit(name, submitted)
                return await collect(submitted)
        except TimeoutError:
            why = f" ({self._away})" if self._away else ""
            raise DeadlinePassed(
                f"no reply in the {deadline_s:.3g} s until the deadline{why}: allow more time"
            ) from None
        except (RedisError, OSError) as error:
            raise QueueAway.of(error) from error
        finally:
            for job in submitted:
                self._submitted.pop(job.uid, None)
            if left := [job for job in submitted if job.is_sent and not job.reply.done()]:
                await self._last_steps.do(self._drop(left))

    async def _submit_shared(self, submitted: Sequence[Submitted]) -> None:
        """Put all jobs into the stream at once, if there is room: what is shared needs no upload and no reservation."""
        submitting = asyncio.create_task(self._put_shared(submitted))
        for job in submitted:
            job.is_sent = job.is_shared = True
            job.on_way = submitting
        await asyncio.shield(submitting)

    async def _put_shared(self, submitted: Sequence[Submitted]) -> None:
        images, size_bytes = sum(job.images for job in submitted), sum(job.size_bytes for job in submitted)
        first = submitted[0]
        parts: list[str | int] = [images, size_bytes, first.left_ms, first.request]
        for job in submitted:
            parts += (job.uid, job.images, job.size_bytes, job.content.shared)
        admitted, *said = await self._submissions(*parts)
        if not admitted:
            for job in submitted:
                job.is_sent = False
            raise self._full(said[0], said[1], images, size_bytes)
        for job, entry in zip(submitted, said, strict=True):
            job.entry = entry

    def _full(self, queued_images: int, queued_bytes: int, images: int, size_bytes: int) -> QueueFull:
        return QueueFull(
            f"{queued_images} images ({queued_bytes} bytes) are queued and {images} ({size_bytes} bytes) would "
            f"exceed the limit of {self._queue_images} images or {self._queue_bytes} bytes: try again later"
        )

    async def _submit(self, name: str, submitted: Sequence[Submitted]) -> None:
        """Reserve room, upload the payloads, and put all jobs into the stream at once."""
        images, size_bytes = sum(job.images for job in submitted), sum(job.size_bytes for job in submitted)
        member = f"{name}:{images}:{size_bytes}"
        limits = [self._queue_images, self._queue_bytes, self._upload_ms, KEY_TTL_MS]
        admitted, queued_images, queued_bytes = await self._admit(
            keys=[self._keys.jobs, self._keys.uploads, self._keys.load], args=[member, images, size_bytes, *limits]
        )
        if not admitted:
            raise self._full(queued_images, queued_bytes, images, size_bytes)
        enqueuing: asyncio.Task[None] | None = None
        try:
            for job in submitted:
                await self._upload(job)
            enqueuing = asyncio.create_task(self._put(submitted, member))
            for job in submitted:
                job.on_way = enqueuing
            await asyncio.shield(enqueuing)
        except BaseException:
            await self._last_steps.do(self._give_up(member, images, size_bytes, enqueuing))
            raise

    async def _upload(self, job: Submitted) -> None:
        job.is_sent = True
        payload = encode_batch(job.content.images_BHWC, job.content.prompts)
        await self._redis.set(self._keys.payload(job.uid), payload, px=self._upload_ms)

    async def _put(self, submitted: Sequence[Submitted], member: str, *, again: bool = False) -> None:
        """Turn a reservation into entries of the stream, all in one step."""
        parts = [part for job in submitted for part in (job.uid, job.images, job.size_bytes)]
        totals = [sum(job.images for job in submitted), sum(job.size_bytes for job in submitted)]
        first = submitted[0]
        owner: list[str | int] = [
            first.left_ms,
            self._reply_key,
            self._alive_ms,
            first.request,
            int(again),
            self._keys.payload(""),
        ]
        entries = await self._enqueue(
            keys=[self._keys.jobs, self._keys.uploads, self._keys.load, self._keys.events],
            args=[member, *totals, *owner, *parts],
        )
        for job, entry in zip(submitted, entries, strict=True):
            job.entry, job.lost = entry, False

    async def _give_up(self, member: str, images: int, size_bytes: int, enqueuing: asyncio.Task[None] | None) -> None:
        """Give a reservation back; what cannot be undone now is dropped by whoever tidies up."""
        with contextlib.suppress(RedisError, OSError):
            if enqueuing is not None:
                await enqueuing
            await self._withdraw(keys=[self._keys.uploads, self._keys.load], args=[member, images, size_bytes])

    async def _drop(self, jobs: Sequence[Submitted]) -> None:
        """Take jobs that nobody waits for out of the queue, once they are there; `_drop_strays` does what fails."""
        if on_way := {job.on_way for job in jobs if job.on_way is not None}:
            await asyncio.wait(on_way)
        with contextlib.suppress(RedisError, OSError):
            for job in jobs:
                if job.is_sent:
                    await self._drop_entry(job.entry or b"0-0", job.uid, job.images, job.size_bytes)

    async def _drop_entry(self, entry: bytes, uid: str, images: int, size_bytes: int) -> None:
        keys = [self._keys.jobs, self._keys.load, self._keys.payload(uid), self._keys.events]
        await self._drop_job(keys=keys, args=[GROUP, entry, images, size_bytes])

    async def _drop_strays(self) -> None:
        """Drop the jobs in the stream whose callers have left.

        As where Redis took a submission for which its client had not waited, or could not be told to drop it.
        """
        for entry, uid, images, size_bytes in await self._own(keys=[self._keys.jobs], args=[self._reply_key]):
            if uid.decode() not in self._submitted:
                await self._drop_entry(entry, uid.decode(), int(images), int(size_bytes))

    async def _read_replies(self) -> None:
        """Hand replies to those who wait; while Redis is away, try again."""
        read: list[bytes] = []  # handed on, and to be deleted with the next reading
        while True:
            try:
                pipe = self._redis.pipeline(transaction=False)
                if read:
                    pipe.xdel(self._reply_key, *read)
                pipe.xread({self._reply_key: "0"}, block=READ_BLOCK_MS)
                answer: Any = (await pipe.execute())[-1]
                read = []
                for _, entries in answer or ():
                    self._deliver(fields for _, fields in entries)
                    read += [entry for entry, _ in entries]
            except Exception as error:  # without this task no request would be answered any more
                if not isinstance(error, QUEUE_GONE):
                    logger.exception("replies cannot be read; trying again")
                self._look_now.set()  # something may be lost
                await asyncio.sleep(RECONNECT_S)

    def _deliver(self, replies: Iterable[Mapping[bytes, bytes]]) -> None:
        """Give replies to their waiters, as far as there still are any."""
        for fields in replies:
            try:
                uid, reply = Reply.from_fields(fields)
            except (KeyError, ValueError, TypeError):
                logger.exception("a reply cannot be understood; is its worker of another release?")
                continue
            job = self._submitted.get(uid)
            if job is None or job.reply.done():
                continue
            if reply.lost:
                job.lost = True
                if job.is_shared:  # its worker runs elsewhere
                    self._no_sharing_until_s = asyncio.get_running_loop().time() + SHARE_AGAIN_S
                self._look_now.set()
            else:
                job.reply.set_result(reply)

    async def _beat(self) -> None:
        """Six times a lease, or at once where something may be lost: say that we live, find what is lost or left."""
        while True:
            try:
                self._look_now.clear()
                await say_alive(self._redis, self._reply_key + lua.ALIVE, self._alive_ms)
                await self._resubmit_lost()
                await self._drop_strays()
                await tidy(self._tidy, self._keys)
                self._away = None
            except Exception as error:  # noqa: BLE001 - without this task the jobs would be taken for a dead API's
                if self._away is None:
                    logger.warning("the queue cannot be looked after: %s", error)
                self._away = str(QueueAway.of(error))
                self._look_now.set()
                await asyncio.sleep(RECONNECT_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._beat_s):
                    await self._look_now.wait()

    async def _resubmit_lost(self) -> None:
        """Submit again what is neither in the stream nor replied to: Redis has lost it.

        A worker replies and deletes in one step. So what is absent from the stream, and has no reply after that was
        seen, is lost.
        """
        waiting = [(job, job.entry) for job in self._submitted.values() if job.entry is not None]
        if not waiting:
            return
        pipe = self._redis.pipeline(transaction=False)
        for _, entry in waiting:
            pipe.xrange(self._keys.jobs, entry, entry)
        entries = await pipe.execute()
        absent = [job for (job, _), found in zip(waiting, entries, strict=True) if not found]
        if not absent:
            return
        replies: Any = await self._redis.xrange(self._reply_key)
        self._deliver(fields for _, fields in replies)
        for job in absent:
            if not job.reply.done() and job.uid in self._submitted:
                await self._resubmit(job)

    async def _resubmit(self, job: Submitted) -> None:
        logger.warning("job submitted again: it or its images were lost", extra={"fields": {"request": job.request}})
        job.is_shared = False
        await self._upload(job)
        await self._put([job], f"{job.uid}:again", again=True)
        if job.uid not in self._submitted:  # its caller has left meanwhile
            await self._drop([job])
