"""What happens to a request for scores, from its first header to its answer."""

import asyncio
import contextlib
import hmac
import math
import os
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from fastapi import Request

from services import protocol
from services.batching.errors import DeadlinePassed, KeyReused, QueueAway, QueueError, QueueFull, ScoringFailed
from services.batching.jobs import Job
from services.batching.shared import Areas, Lease
from services.batching.streams import Reply
from services.batching.survey import Survey
from services.http.bodies import Body, Decoder, Prepared, decoder_of, prepare
from services.http.metrics import Metrics
from services.http.openapi import LONGEST_MS, info_of
from services.http.problems import ProblemError
from services.http.turns import Turns
from services.http.uploads import HeldBytes, Patience, read_body
from services.images import BodyError, ItemInvalid, decode_batch
from services.protocol import Readiness, ScoreAnswer, Timing
from services.rewards.base import Reward
from services.settings import Settings

CLIENT_POLL_S = 0.25
"""How often a waiting request looks whether its client is still there: uvicorn cancels nothing by itself."""
SHORT_BYTES = 2**20
"""A body up to this size, such as a single picture, is decoded together with others."""
T = TypeVar("T")


class Queue(Protocol):
    """What the application needs of the batch queue; see `services.batching.submit.SubmitQueue`."""

    async def ready(self) -> bool: ...

    async def trouble(self) -> str: ...

    async def survey(self) -> Survey: ...

    async def score(self, jobs: Sequence[Job], *, deadline_s: float, request: str) -> list[Reply]: ...

    async def once(
        self, key: str, digest: str, work: Callable[[], Awaitable[bytes]], *, deadline_s: float
    ) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Answer:
    """A successful answer.

    Attributes:
        content: a `ScoreAnswer` as JSON.
        replayed: whether it was found for an earlier request of the same idempotency key.
    """

    content: bytes
    replayed: bool


@dataclass(frozen=True, slots=True)
class Group:
    """The API processes behind one port.

    Attributes:
        processes: how many share the cores and the bounds.
        metrics_folder: where they count together; None where there is but one, which counts by itself.
    """

    processes: int = 1
    metrics_folder: Path | None = None


ALONE = Group()


class ScoreService:
    """Answers the requests of one reward through its queue."""

    def __init__(self, reward: Reward, settings: Settings, queue: Queue, group: Group = ALONE) -> None:
        """Bind reward, settings and queue.

        Args:
            reward: describes itself; its `score` is never called here.
            settings: limits, token, deadlines.
            queue: open.
            group: the API processes that this is one of.
        """
        self.settings = settings
        self.queue = queue
        self.metrics = Metrics(reward.name, reward.version, group.metrics_folder)
        self.draining = False
        self._limits = settings.limits
        self._turns = Turns(max(1, len(os.sched_getaffinity(0)) // group.processes))
        self._token = settings.token.get_secret_value().encode() if settings.token else None
        self._retry_after = {protocol.HEADER_RETRY_AFTER: str(settings.retry_after_s)}
        self._held = HeldBytes(settings.held_bytes(group.processes), headers=self._retry_after)
        self._areas = Areas(enabled=settings.shared_memory)
        self.info = info_of(reward, settings.limits)

    def authorise(self, request: Request) -> None:
        """Refuse a request that does not carry the token, in a time that tells nothing about it.

        Raises:
            ProblemError: 401.
        """
        if self._token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._token):
            detail = "the bearer token is missing or wrong: send 'Authorization: Bearer TOKEN'"
            raise ProblemError("unauthorized", detail, headers={"WWW-Authenticate": "Bearer"})

    async def readiness(self) -> Readiness:
        """Say whether requests will be scored now.

        Raises:
            ProblemError: 503, with the reason.
        """
        self._refuse_when_draining()
        try:
            ready = await self.queue.ready()
            trouble = "" if ready else await self.queue.trouble()
        except QueueAway as error:
            raise self._not_ready(f"{error}: wait until it is back") from error
        if not ready:
            detail = f"no worker for {self.info.name} {self.info.version} is ready: start one, or wait"
            raise self._not_ready(f"{detail}; {trouble}" if trouble else detail)
        return Readiness()

    async def score(self, request: Request, request_id: str) -> Answer:
        """Answer `POST /score`.

        Args:
            request: nothing of its body has been read.
            request_id: its name in the logs.

        Raises:
            ProblemError: the request cannot be answered with scores.
        """
        self._refuse_when_draining()
        decode = decoder_of(request.headers)
        key = _idempotency_key(request)
        deadline_s = self._deadline_s(request)
        patience = Patience(deadline_s, asyncio.get_running_loop().time() + deadline_s, self.settings.upload_stall_s)
        with contextlib.ExitStack() as held:
            share, lease = held.enter_context(self._held.share()), held.enter_context(self._areas.lease())
            started_s = time.monotonic()
            buffer = lease.memory if decode is decode_batch else None
            body = await read_body(request, self._held, share, self.settings.max_body_bytes, patience, buffer)
            read_s = time.monotonic()
            self.metrics.observe_phase("read", read_s - started_s)
            run = self._preparing(decode, body, lease, digests=key is not None)
            if decode is decode_batch and key is None:  # which copies nothing
                prepared = run()
            else:
                on_thread = self._turns if len(body) <= SHORT_BYTES else asyncio.to_thread
                prepared = await _while_wanted(request, patience, held, run, on_thread)
            del body, run
            if self.info.needs_prompts and not prepared.has_prompts:
                raise ProblemError("prompts-missing", self._prompts_missing())
            self.metrics.observe_phase("decode", time.monotonic() - read_s)
            self.metrics.observe_size(prepared.images)
            share.grow_to(prepared.size_bytes)
            return await self._answer(request, request_id, prepared, key, patience)

    def _preparing(self, decode: Decoder, body: Body, lease: Lease, *, digests: bool) -> Callable[[], Prepared]:
        """What decodes a body; slow, but for tensors without a digest."""
        settings = self.settings
        bounds = {"job_images": settings.images_per_job, "job_bytes": settings.bytes_per_job}

        def run() -> Prepared:
            try:
                return prepare(decode, body, self._limits, digests=digests, lease=lease, **bounds)
            except BodyError as error:
                kinds = {400: "malformed-body", 413: "batch-too-large", 422: "unreadable-item"}
                index = error.index if isinstance(error, ItemInvalid) else None
                raise ProblemError(kinds[error.status], str(error), index=index) from error

        return run

    async def _answer(
        self, request: Request, request_id: str, prepared: Prepared, key: str | None, patience: Patience
    ) -> Answer:
        """Have it scored, unless its key has an answer already."""
        replayed = True

        async def work() -> bytes:
            nonlocal replayed
            replayed = False
            return self._content(
                await self.queue.score(prepared.jobs, deadline_s=_left_s(patience), request=request_id),
                prepared.images,
            )

        left_s = _left_s(patience)
        asking = work() if key is None else self.queue.once(key, prepared.digest, work, deadline_s=left_s)
        try:
            content = await _while_connected(request, asking)
        except QueueError as error:
            raise self._problem_of(error, patience) from error
        return Answer(content, replayed)

    def _content(self, replies: Sequence[Reply], images: int) -> bytes:
        """Lay the replies end to end."""
        scores = [score for reply in replies for score in reply.scores]
        if len(scores) != images or not all(math.isfinite(score) for score in scores):
            detail = f"the worker gave {len(scores)} scores for {images} images, or one that is no finite number"
            raise ProblemError("scoring-failed", detail)
        queue_ms, score_ms = max(reply.queue_ms for reply in replies), max(reply.score_ms for reply in replies)
        self.metrics.count_images(images)
        self.metrics.observe_phase("queue", queue_ms / 1000)
        self.metrics.observe_phase("score", score_ms / 1000)
        timing = Timing(queue=queue_ms, score=score_ms)
        answer = ScoreAnswer(scores=scores, reward=self.info.name, version=self.info.version, timing_ms=timing)
        return answer.model_dump_json().encode()

    def _problem_of(self, error: QueueError, patience: Patience) -> ProblemError:
        """What an error of the queue means to the client."""
        if isinstance(error, QueueFull):
            return ProblemError("queue-full", str(error), headers=self._retry_after)
        if isinstance(error, QueueAway):
            return self._not_ready(f"{error}: try again later")
        if isinstance(error, DeadlinePassed):
            return _too_late(patience, str(error))
        if isinstance(error, KeyReused):
            return ProblemError("idempotency-key-reused", str(error))
        return ProblemError(
            "scoring-failed", str(error), index=error.index if isinstance(error, ScoringFailed) else None
        )

    def _deadline_s(self, request: Request) -> float:
        """Read the deadline header, in seconds; at most the service's own limit."""
        text = request.headers.get(protocol.HEADER_DEADLINE_MS)
        if text is None:
            return min(self.settings.default_deadline_s, self.settings.max_deadline_s)
        if not (text.isascii() and text.isdigit()) or len(text) > 20 or not 1 <= int(text) <= LONGEST_MS:
            detail = (
                f"{protocol.HEADER_DEADLINE_MS} is {text[:40]!r}, must be whole milliseconds from 1 to {LONGEST_MS}"
            )
            raise ProblemError("malformed-request", detail)
        return min(int(text) / 1000, self.settings.max_deadline_s)

    def _prompts_missing(self) -> str:
        return f"{self.info.name} compares with a prompt, and the request has none: send one for each image"

    def _refuse_when_draining(self) -> None:
        if self.draining:
            raise self._not_ready("the service is draining: use another replica")

    def _not_ready(self, detail: str) -> ProblemError:
        return ProblemError("not-ready", detail, headers=self._retry_after)


def _idempotency_key(request: Request) -> str | None:
    text = request.headers.get(protocol.HEADER_IDEMPOTENCY_KEY)
    if text is not None and not re.fullmatch(protocol.IDEMPOTENCY_KEY_PATTERN, text):
        detail = (
            f"{protocol.HEADER_IDEMPOTENCY_KEY} is {text[:40]!r} of {len(text)} characters, "
            "must be 1 to 128 printable ASCII characters without spaces: send a UUID"
        )
        raise ProblemError("malformed-request", detail)
    return text


def _left_s(patience: Patience) -> float:
    """Seconds until the deadline.

    Raises:
        ProblemError: 504, there are none.
    """
    left_s = patience.gives_up_s - asyncio.get_running_loop().time()
    if left_s <= 0:
        raise _too_late(patience, "it was over before the images could be queued: allow more time")
    return left_s


def _too_late(patience: Patience, why: str) -> ProblemError:
    return ProblemError("deadline-passed", f"no score within the deadline of {patience.deadline_s:g} s: {why}")


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """Wait for the work, and cancel it as soon as the client has left."""
    task = asyncio.ensure_future(work)
    try:
        while True:
            done, _ = await asyncio.wait([task], timeout=CLIENT_POLL_S)
            if done:
                return task.result()
            if await request.is_disconnected():
                raise ProblemError("client-gone", "the client left")
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait([task])


async def _while_wanted(
    request: Request,
    patience: Patience,
    held: contextlib.ExitStack,
    run: Callable[[], T],
    on_thread: Callable[[Callable[[], T]], Awaitable[T]],
) -> T:
    """Wait for what runs on a thread, until its client has left or its time is over.

    Nothing stops a thread: what goes on after that keeps what the request holds, memory above all, until it ends.

    Args:
        request: its body has been read.
        patience: how long to wait.
        held: what the request holds; empty afterwards if the thread goes on.
        run: to be run, unless nobody waits for it when its turn comes.
        on_thread: runs it.
    """
    is_wanted = True

    def run_if_wanted() -> T:
        if not is_wanted:
            raise RuntimeError("nobody waits for it")
        return run()

    def end(running: "asyncio.Future[T]") -> None:
        rest.close()
        if not running.cancelled():
            running.exception()  # which nobody waits for either

    running = asyncio.ensure_future(on_thread(run_if_wanted))
    try:
        while not running.done():
            left_s = patience.gives_up_s - asyncio.get_running_loop().time()
            if left_s <= 0:
                raise _too_late(patience, "the images were not decoded by then: allow more time, or send less at once")
            done, _ = await asyncio.wait([running], timeout=min(left_s, CLIENT_POLL_S))
            if not done and await request.is_disconnected():
                raise ProblemError("client-gone", "the client left")
        return running.result()
    finally:
        if running.done():
            if not running.cancelled():
                running.exception()  # which nobody waits for where the client has left meanwhile
        else:
            is_wanted = False
            rest = held.pop_all()
            running.add_done_callback(end)
