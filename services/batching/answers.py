"""Answers kept by idempotency key: a repeat of a request brings back its answer and scores nothing again."""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.batching import lua
from services.batching.errors import DeadlinePassed, KeyReused, QueueAway
from services.batching.keys import Keys
from services.batching.last_steps import LastSteps
from services.batching.streams import end

logger = logging.getLogger(__name__)

FIRST_POLL_S, LONGEST_POLL_S = 0.01, 0.25
"""How often a repeat looks whether the first of its kind has been answered."""


class Answers:
    """The answers of one reward and version, shared by all API processes.

    While a request is in work its key is held under a lease, so that a repeat waits for it, on any API; should the
    API that works at it die, a repeat takes its place after the lease.
    """

    def __init__(self, redis: "Redis", keys: Keys, *, lease_ms: int, ttl_s: float) -> None:
        """Bind the answers.

        Args:
            redis: a client of `streams.connect`.
            keys: of which queue.
            lease_ms: silence after which the API that works at a request counts as dead.
            ttl_s: how long an answer is kept, in seconds.
        """
        self._redis = redis
        self._keys = keys
        self._lease_ms = lease_ms
        self._ttl_ms = int(1000 * ttl_s)
        self._last_steps = LastSteps()
        self._claim = redis.register_script(lua.CLAIM_ANSWER)
        self._hold = redis.register_script(lua.HOLD_ANSWER)
        self._store = redis.register_script(lua.STORE_ANSWER)
        self._release = redis.register_script(lua.RELEASE_ANSWER)

    async def once(self, key: str, digest: str, work: Callable[[], Awaitable[bytes]], *, deadline_s: float) -> bytes:
        """Bring back the answer of a key, or find it.

        Args:
            key: named by the client.
            digest: of what the request asks for.
            work: finds the answer; called only if there is none yet and nobody else is at it.
            deadline_s: seconds from now after which the answer is of no use.

        Returns:
            The answer. Only an answer is kept: after an error the next request of this key tries anew.

        Raises:
            KeyReused: the key belongs to a request for something else.
            QueueAway: Redis cannot be reached.
            DeadlinePassed: another was at it until the deadline.
            Exception: whatever `work` raises.
        """
        slot, owner = self._keys.answer(key), uuid.uuid4().hex
        now_s = asyncio.get_running_loop().time
        gives_up_s, poll_s = now_s() + deadline_s, FIRST_POLL_S
        while True:
            try:
                async with asyncio.timeout_at(gives_up_s):
                    state, *rest = await self._claim(keys=[slot], args=[owner, digest, self._lease_ms])
            except TimeoutError:
                raise DeadlinePassed(f"Redis did not answer in {deadline_s:.3g} s: allow more time") from None
            except (RedisError, OSError) as error:
                raise QueueAway.of(error) from error
            if state == b"other":
                raise KeyReused("this Idempotency-Key was used for other images or prompts: make a new key")
            if state == b"done":
                answer: bytes = rest[0]
                return answer
            if state == b"mine":
                return await self._find(slot, owner, digest, work)
            if now_s() + poll_s > gives_up_s:
                raise DeadlinePassed(
                    f"a request of the same Idempotency-Key was in work for all of {deadline_s:.3g} s: allow more time"
                )
            await asyncio.sleep(poll_s)
            poll_s = min(2 * poll_s, LONGEST_POLL_S)

    async def _find(self, slot: str, owner: str, digest: str, work: Callable[[], Awaitable[bytes]]) -> bytes:
        """Find the answer under a lease, and keep it."""
        holding = asyncio.create_task(self._keep_hold(slot, owner))
        try:
            answer = await work()
        except BaseException:
            await self._last_steps.do(self._give_back(holding, slot, owner))
            raise
        await self._last_steps.do(self._keep(holding, slot, owner, digest, answer))  # if not kept, it is still right
        return answer

    async def _keep(self, holding: asyncio.Task[None], slot: str, owner: str, digest: str, answer: bytes) -> None:
        """Keep an answer, under the lease until it is kept: a repeat waits for it meanwhile, and scores nothing."""
        await self._run(self._store, slot, owner, digest, answer, self._ttl_ms)
        await end(holding)

    async def _give_back(self, holding: asyncio.Task[None], slot: str, owner: str) -> None:
        await end(holding)
        await self._run(self._release, slot, owner)

    async def _keep_hold(self, slot: str, owner: str) -> None:
        while True:
            await asyncio.sleep(self._lease_ms / 3000)
            await self._run(self._hold, slot, owner, self._lease_ms)

    async def _run(self, script: Any, slot: str, *arguments: object) -> None:
        with contextlib.suppress(RedisError, OSError):
            await script(keys=[slot], args=list(arguments))
