"""The queue's worker's side: take jobs under a lease, reply once, hand back.

At least once, answered once: a job is delivered to a worker, taken over by another if the first falls silent for a
lease, and replied to by whoever acknowledges it first. See `lua` for the atomic steps.
"""

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.commands.core import AsyncScript
from redis.exceptions import BusyLoadingError, ConnectionError, ResponseError, TimeoutError

from services.batching import lua
from services.batching.calls import Calls
from services.batching.keys import Keys
from services.batching.shared import MappedAreas
from services.batching.survey import BATCH_BOUNDS

logger = logging.getLogger(__name__)

GROUP = "workers"
CANCEL_AGAIN_S = 0.5
CONNECTIONS = 64
KEY_TTL_MS = 3_600_000
REPLY_TTL_MS = 600_000
OVERDUE_MS = 1000
"""How long after its deadline a job is dropped by whoever tidies up; until then its API does it."""
START_TTL_MS = 600_000
"""How long it is told how a worker's start went; longer than an orchestrator waits between two attempts."""
FORGET_MS = 600_000
"""Silence after which a worker without jobs is struck off the group."""
STREAM_TTL_MS = 7 * 24 * 3_600_000
"""How long the stream of a version that nobody runs any more is kept."""
DEAD_TTL_MS = 7 * 24 * 3_600_000
MOST_OWNERS = 16
"""APIs of which each reading asks whether they live; of another it is asked when a job of it has come."""

QUEUE_GONE = (ConnectionError, TimeoutError, BusyLoadingError, OSError)
"""What is raised while Redis is away, and may pass."""


def connect(url: str, *, timeout_s: float) -> "Redis":
    """Create a client whose every command has a timeout and a single attempt; the callers decide what to repeat.

    Commands beyond the number of connections wait for one, up to the same timeout.

    Args:
        url: `redis://`, `rediss://` or `unix://`.
        timeout_s: for one command, and to connect; longer than any blocking read.
    """
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=CONNECTIONS,
        timeout=timeout_s,
        protocol=2,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),
    )
    return Redis.from_pool(pool)


async def say_alive(redis: "Redis", key: str, ttl_ms: int) -> None:
    """Keep a sign of life; a Redis that is full lets one be prolonged, but not made."""
    if not await redis.pexpire(key, ttl_ms):
        await redis.set(key, "1", px=ttl_ms)


async def end(task: asyncio.Task[None]) -> None:
    """Cancel a task until it is done: a cancellation that meets a Redis error can be lost in it."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=CANCEL_AGAIN_S)


@dataclass(frozen=True, slots=True)
class Delivery:
    """A job in a worker's hands.

    Attributes:
        entry: id of the stream entry.
        uid: name of the job.
        images, size_bytes: what the job counts in the load.
        reply: key of the stream to reply to.
        request: the request's name in the logs.
        submitted_ms, deadline_ms: by Redis's clock, since the epoch.
        deliveries: how often it was delivered, this one included.
        shared: what its payload is found by in shared memory; empty where it lies in Redis.
    """

    entry: bytes
    uid: str
    images: int
    size_bytes: int
    reply: str
    request: str
    submitted_ms: int
    deadline_ms: int
    deliveries: int
    shared: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a worker says about one job: its scores, or the error that took their place.

    Attributes:
        scores: finite, one for each image of the job, in order; empty with an error.
        error: one line, or None.
        index: the image of the job that caused the error, where it is known.
        expired: whether the error is a passed deadline.
        lost: whether the error is that Redis no longer had the job's images; they may be submitted again.
        queue_ms, score_ms: time spent waiting and in the forward pass.
    """

    scores: tuple[float, ...] = ()
    error: str | None = None
    index: int | None = None
    expired: bool = False
    lost: bool = False
    queue_ms: float = 0.0
    score_ms: float = 0.0

    def to_json(self) -> str:
        """The reply as JSON, which holds no NaN."""
        return json.dumps({name: getattr(self, name) for name in self.__slots__}, allow_nan=False)

    @classmethod
    def from_fields(cls, fields: Mapping[bytes, bytes]) -> tuple[str, "Reply"]:
        """A job's uid and its reply, of the entry of a reply stream."""
        body = json.loads(fields[b"body"])
        known = {name: body[name] for name in cls.__slots__ if name in body}  # a newer worker may say more
        return fields[b"uid"].decode(), cls(**{**known, "scores": tuple(body["scores"])})


@dataclass(frozen=True, slots=True)
class Taken:
    """A job that was just delivered, and what has become of it meanwhile.

    Attributes:
        delivery: the job.
        payload: pixels and prompts as safetensors; None if they are gone, or cannot be read from here.
        part: which of the payload's images are the job's.
        wanted: whether the API that submitted it still lives.
        now_ms: when it was taken, by Redis's clock, since the epoch.
    """

    delivery: Delivery
    payload: bytes | memoryview | None
    part: slice
    wanted: bool
    now_ms: int

    @property
    def queue_ms(self) -> float:
        """How long it has waited."""
        return float(max(0, self.now_ms - self.delivery.submitted_ms))


async def tidy(script: AsyncScript, keys: Keys) -> None:
    """Run `lua.TIDY` on a queue; both sides of it do."""
    await script(
        keys=[keys.jobs, keys.uploads, keys.load, keys.events],
        args=[GROUP, KEY_TTL_MS, OVERDUE_MS, keys.payload(""), FORGET_MS, STREAM_TTL_MS],
    )


class WorkQueue:
    """A worker's view of the queue of one reward and version."""

    def __init__(self, redis: "Redis", keys: Keys, *, consumer: str, lease_ms: int) -> None:
        """Bind the queue.

        Args:
            redis: a client of `connect`.
            keys: which queue.
            consumer: a name that no other worker has, now or later.
            lease_ms: silence after which others may take this worker's jobs.
        """
        self._redis = redis
        self._keys = keys
        self._consumer = consumer
        self._areas = MappedAreas()
        self._uncounted: list[int] = []
        self._owners: list[str] = []  # of the jobs of late: whether they live is asked along with the next
        self._lease_ms = lease_ms
        self._finish = Calls(
            redis,
            lua.FINISH,
            keys=[keys.jobs, keys.load, keys.dead, keys.events],
            head=[GROUP, keys.payload(""), REPLY_TTL_MS, DEAD_TTL_MS],
        )
        self._renew = redis.register_script(lua.RENEW)
        self._take_over = redis.register_script(lua.TAKE_OVER)
        self._hand_back = redis.register_script(lua.HAND_BACK)
        self._tidy = redis.register_script(lua.TIDY)
        self._drop = redis.register_script(lua.DROP)

    async def ensure_group(self) -> None:
        """Create stream and group where missing; from 0, so that no earlier job is passed over."""
        try:
            await self._redis.xgroup_create(self._keys.jobs, GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP") and not await self._has_group():  # a full Redis says only that
                raise

    async def _has_group(self) -> bool:
        try:
            groups: Any = await self._redis.xinfo_groups(self._keys.jobs)
        except ResponseError:
            return False
        return any(group["name"] == GROUP.encode() for group in groups)

    async def read(self, count: int, *, block_ms: int | None) -> list[Taken]:
        """Take up to `count` new jobs, and count what was noted, in one round trip.

        Args:
            count: how many entries at most.
            block_ms: how long to wait for the first, at least 1; Redis ends a wait up to 100 ms late, so that short
                waits are better slept here. None does not wait.
        """
        pipe = self._redis.pipeline(transaction=False)
        counts = self._count_batches(pipe)
        pipe.xreadgroup(GROUP, self._consumer, {self._keys.jobs: ">"}, count=count, block=block_ms)
        pipe.time()
        owners = list(self._owners)
        for owner in owners:
            pipe.exists(owner + lua.ALIVE)
        counted, answer, time, alive = _cut(await pipe.execute(raise_on_error=False), counts, 1, 1, len(owners))
        for error in (answer[0], time[0], *alive):
            if isinstance(error, Exception):
                raise error
        for error in counted:
            if isinstance(error, Exception):  # such as a Redis that is full
                logger.warning("the worker cannot count its batches: %s", error)
                break
        found = [_delivery(entry, fields, 1) for _, entries in answer[0] or () for entry, fields in entries if fields]
        return await self._load(found, _ms(time[0]), dict(zip(owners, map(bool, alive), strict=True))) if found else []

    async def take_over(self) -> Taken | None:
        """Claim one job whose lease ran out, if there is any."""
        answer = await self._take_over(
            keys=[self._keys.jobs, self._keys.events], args=[GROUP, self._consumer, self._lease_ms]
        )
        if answer is None:
            return None
        entry, deliveries, flat = answer
        delivery = _delivery(entry, dict(zip(flat[::2], flat[1::2], strict=True)), int(deliveries))
        (taken,) = await self._load([delivery], _ms(await self._redis.time()), {})
        return taken

    async def _load(self, deliveries: Sequence[Delivery], now_ms: int, wanted: dict[str, bool]) -> list[Taken]:
        """Fetch the payloads; `wanted` tells which of the APIs live, as far as that was asked already."""
        stored = [delivery.uid for delivery in deliveries if not delivery.shared]
        owners = list(dict.fromkeys(delivery.reply for delivery in deliveries))
        payloads: dict[str, bytes | None] = {}
        if unasked := [owner for owner in owners if owner not in wanted]:
            self._owners = list(dict.fromkeys([*owners, *self._owners]))[:MOST_OWNERS]
        if stored or unasked:
            pipe = self._redis.pipeline(transaction=False)
            for uid in stored:
                pipe.get(self._keys.payload(uid))
            for owner in unasked:
                pipe.exists(owner + lua.ALIVE)
            contents, alive = _cut(await pipe.execute(), len(stored), len(unasked))
            payloads = dict(zip(stored, contents, strict=True))
            wanted = {**wanted, **dict(zip(unasked, map(bool, alive), strict=True))}
        taken = []
        for delivery in deliveries:
            payload: bytes | memoryview | None = None
            part = slice(None)
            if not delivery.shared:
                payload = payloads[delivery.uid]
            elif found := self._areas.find(delivery.shared):
                payload, part = found[0], slice(*found[1:])
            taken.append(Taken(delivery, payload, part, wanted[delivery.reply], now_ms))
        return taken

    async def renew(self, deliveries: Sequence[Delivery]) -> int:
        """Renew the lease of those jobs that are still ours; return how many."""
        if not deliveries:
            return 0
        entries = [delivery.entry for delivery in deliveries]
        return int(await self._renew(keys=[self._keys.jobs, self._keys.events], args=[GROUP, self._consumer, *entries]))

    async def reply(self, delivery: Delivery, reply: Reply) -> bool:
        """Reply to a job and remove it; False if another already did, in which case nothing happens.

        Replies that are given at the same time travel together.
        """
        return await self._settle(delivery, reply)

    async def bury(self, delivery: Delivery, reason: str) -> bool:
        """Move a job to the dead letters and tell its caller; False if another already settled it."""
        dead = {
            "uid": delivery.uid,
            "request": delivery.request,
            "reason": reason,
            "images": delivery.images,
            "deliveries": delivery.deliveries,
            "submitted": delivery.submitted_ms,
        }
        fields = [str(part) for pair in dead.items() for part in pair]
        return await self._settle(delivery, Reply(error=reason), fields)

    async def keep_alive(self) -> None:
        """Say that a warm worker lives, for one lease."""
        await say_alive(self._redis, self._keys.alive, self._lease_ms)

    async def note_start(self, trouble: str) -> None:
        """Tell the APIs that this worker has started, or why it could not."""
        note = json.dumps({"version": self._keys.version, "trouble": trouble})
        await self._redis.set(self._keys.start, note, px=START_TTL_MS)

    async def drop(self, delivery: Delivery) -> None:
        """Remove a job that nobody waits for."""
        await self._drop(
            keys=[self._keys.jobs, self._keys.load, self._keys.payload(delivery.uid), self._keys.events],
            args=[GROUP, delivery.entry, delivery.images, delivery.size_bytes],
        )

    async def tidy(self) -> None:
        """Drop the jobs that nobody waits for, and count the load anew, should it ever have drifted."""
        self._areas.forget_gone()
        await tidy(self._tidy, self._keys)

    def note_batches(self, sizes: Sequence[int]) -> None:
        """Note forward passes of these sizes, in images: they are counted with the next reading."""
        self._uncounted += sizes

    def _count_batches(self, pipe: Any) -> int:
        """Have what was noted counted; return how many commands that takes."""
        sizes, self._uncounted = self._uncounted, []
        if not sizes:
            return 0
        for size in sizes:
            bound = next((str(bound) for bound in BATCH_BOUNDS if size <= bound), "more")
            pipe.hincrby(self._keys.events, f"batches:{bound}", 1)
        pipe.hincrby(self._keys.events, "batch_images", sum(sizes))
        pipe.pexpire(self._keys.events, lua.EVENTS_TTL_MS)
        return len(sizes) + 2

    async def hand_back(self) -> None:
        """Give back all jobs in hand, for others to take when they next look for such, and leave the group."""
        await self._hand_back(keys=[self._keys.jobs], args=[GROUP, self._consumer, self._lease_ms, lua.HANDED_BACK])
        pipe = self._redis.pipeline(transaction=False)
        if self._count_batches(pipe):
            await pipe.execute()

    async def _settle(self, delivery: Delivery, reply: Reply, dead: Sequence[str] = ()) -> bool:
        job = (delivery.entry, delivery.images, delivery.size_bytes, delivery.uid)
        return bool(await self._finish(*job, delivery.reply, reply.to_json(), *dead))


def _delivery(entry: bytes, fields: Mapping[bytes, bytes], deliveries: int) -> Delivery:
    return Delivery(
        entry=entry,
        uid=fields[b"uid"].decode(),
        images=int(fields[b"images"]),
        size_bytes=int(fields[b"bytes"]),
        reply=fields[b"reply"].decode(),
        request=fields[b"request"].decode(),
        submitted_ms=int(fields[b"submitted"]),
        deadline_ms=int(fields[b"deadline"]),
        deliveries=deliveries,
        shared=fields.get(b"shared", b"").decode(),
    )


def _cut(answers: Sequence[Any], *lengths: int) -> list[Sequence[Any]]:
    """The answers of a pipeline in pieces of these lengths, which make up all of it."""
    pieces, start = [], 0
    for length in lengths:
        pieces.append(answers[start : start + length])
        start += length
    assert start == len(answers)
    return pieces


def _ms(time: tuple[int, int]) -> int:
    """What the command TIME says, in milliseconds since the epoch."""
    seconds, micros = time
    return seconds * 1000 + micros // 1000
