"""The HTTP face of a reward: `POST /score`, `/info`, `/healthz`, `/readyz`, `/metrics`."""

import asyncio
import contextlib
import hmac
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from services import protocol
from services.batching.streams import Reply
from services.batching.submit import (
    DeadlinePassed,
    Job,
    QueueAway,
    QueueFull,
    ScoringFailed,
    split_batch,
)
from services.images import Batch, BodyError, ItemInvalid, decode_batch, decode_json
from services.protocol import Info, Limits, Problem, Readiness, ScoreAnswer, Timing
from services.rewards.base import Reward
from services.settings import Settings

logger = logging.getLogger(__name__)

DECODERS: dict[str, Callable[[bytes | bytearray, Limits], Batch]] = {
    protocol.MEDIA_SAFETENSORS: decode_batch,
    protocol.MEDIA_JSON: decode_json,
}
CLIENT_POLL_S = 0.25
"""How often a waiting request looks whether its client is still there: uvicorn cancels nothing by itself."""
CLIENT_GONE = 499
T = TypeVar("T")


class Queue(Protocol):
    """What the application needs of the batch queue; see `services.batching.submit.SubmitQueue`."""

    async def ready(self) -> bool: ...

    async def load(self) -> tuple[int, int]: ...

    async def score(self, jobs: Sequence[Job], *, deadline_s: float) -> list[Reply]: ...


class ProblemError(Exception):
    """An answer that is a problem (RFC 9457)."""

    def __init__(
        self, status: int, kind: str, detail: str, *, index: int | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        title = kind.replace("-", " ").capitalize()
        self.problem = Problem(type=f"urn:reward:{kind}", title=title, status=status, detail=detail, index=index)
        self.headers = headers or {}

    def response(self) -> Response:
        """The problem as an HTTP response."""
        body = self.problem.model_dump_json(exclude_none=True)
        return Response(body, self.problem.status, self.headers, protocol.MEDIA_PROBLEM)


class Metrics:
    """What Prometheus may read of one application."""

    def __init__(self, reward: str, version: str) -> None:
        self.registry = CollectorRegistry()
        labels = {"reward": reward, "version": version}
        self._requests = Counter("reward_requests", "Requests by status", [*labels, "status"], registry=self.registry)
        self._labels = labels
        self.images = Counter("reward_images", "Images scored", labels, registry=self.registry).labels(**labels)
        self.seconds = Histogram(
            "reward_request_seconds", "Seconds of a request for scores", labels, registry=self.registry
        ).labels(**labels)
        self.queue_images = Gauge(
            "reward_queue_images", "Images that wait or are in work, over all replicas", labels, registry=self.registry
        ).labels(**labels)

    def count(self, status: int) -> None:
        """Count one request for scores by the status of its answer."""
        self._requests.labels(**self._labels, status=str(status)).inc()


class ScoreService:
    """Answers the requests of one reward through its queue."""

    def __init__(self, reward: Reward, settings: Settings, queue: Queue) -> None:
        self.settings = settings
        self.queue = queue
        self.metrics = Metrics(reward.name, reward.version)
        self.draining = False
        self._token = settings.token.get_secret_value().encode() if settings.token else None
        self._held_bytes = 0
        self.info = Info(
            name=reward.name,
            version=reward.version,
            low=reward.low,
            high=reward.high,
            higher_is_better=reward.higher_is_better,
            uses_prompts=reward.uses_prompts,
            bodies=list(DECODERS),
            limits=settings.limits,
        )

    def authorise(self, request: Request) -> None:
        """Refuse a request that does not carry the token, in a time that tells nothing about it."""
        if self._token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._token):
            detail = "the bearer token is missing or wrong: send 'Authorization: Bearer TOKEN'"
            raise ProblemError(401, "unauthorized", detail, headers={"WWW-Authenticate": "Bearer"})

    async def readiness(self) -> Readiness:
        """Say whether requests will be scored now.

        Raises:
            ProblemError: 503, with the reason.
        """
        if self.draining:
            raise self._not_ready("the service is draining: use another replica")
        try:
            ready = await self.queue.ready()
        except QueueAway as error:
            raise self._not_ready(f"{error}: wait until it is back") from error
        if not ready:
            raise self._not_ready(f"no worker for {self.info.name} {self.info.version} is ready: start one, or wait")
        return Readiness()

    async def score(self, request: Request) -> ScoreAnswer:
        """Answer `POST /score`.

        Raises:
            ProblemError: the request cannot be answered with scores.
        """
        if self.draining:
            raise self._not_ready("the service is draining: use another replica")
        decode = _decoder(request)
        deadline_s = self._deadline_s(request)
        started_s = time.monotonic()
        length = _content_length(request, self.settings.max_body_bytes)
        held = self.settings.max_body_bytes if length is None else length
        if self._held_bytes + held > self.settings.queue_bytes:
            detail = f"{self._held_bytes} bytes are in work, limit {self.settings.queue_bytes}: try again later"
            raise self._full(detail)
        self._held_bytes += held
        try:
            body = await _read_body(request, length, self.settings.max_body_bytes, deadline_s)
            batch = await _decode(decode, body, self.settings.limits)
            del body
            jobs = split_batch(batch, job_images=self.settings.job_images, job_bytes=self.settings.job_bytes)
            left_s = max(0.001, deadline_s - (time.monotonic() - started_s))
            replies = await self._ask_queue(request, jobs, left_s)
        finally:
            self._held_bytes -= held
        return self._answer(replies, len(batch.images_HWC))

    async def _ask_queue(self, request: Request, jobs: Sequence[Job], left_s: float) -> list[Reply]:
        try:
            return await _while_connected(request, self.queue.score(jobs, deadline_s=left_s))
        except QueueFull as error:
            raise self._full(str(error)) from error
        except QueueAway as error:
            raise self._not_ready(f"{error}: try again later") from error
        except DeadlinePassed as error:
            raise ProblemError(504, "deadline-passed", str(error)) from error
        except ScoringFailed as error:
            raise ProblemError(500, "scoring-failed", str(error)) from error

    def _answer(self, replies: Sequence[Reply], images: int) -> ScoreAnswer:
        """Lay the replies end to end."""
        scores = [score for reply in replies for score in reply.scores]
        if len(scores) != images or not all(math.isfinite(score) for score in scores):
            detail = f"the worker gave {len(scores)} scores for {images} images, or one that is no finite number"
            raise ProblemError(500, "scoring-failed", detail)
        self.metrics.images.inc(images)
        timing = Timing(queue=max(reply.queue_ms for reply in replies), score=max(reply.score_ms for reply in replies))
        return ScoreAnswer(scores=scores, reward=self.info.name, version=self.info.version, timing_ms=timing)

    def _deadline_s(self, request: Request) -> float:
        """Read the deadline header, in seconds; at most the service's own limit."""
        text = request.headers.get(protocol.HEADER_DEADLINE_MS)
        if text is None:
            return self.settings.default_deadline_s
        if not (text.isascii() and text.isdigit()) or len(text) > 20 or int(text) < 1:
            detail = f"{protocol.HEADER_DEADLINE_MS} is {text[:40]!r}, must be whole milliseconds of at least 1"
            raise ProblemError(400, "malformed-request", detail)
        return min(int(text) / 1000, self.settings.max_deadline_s)

    def _not_ready(self, detail: str) -> ProblemError:
        return ProblemError(503, "not-ready", detail, headers=self._retry_after())

    def _full(self, detail: str) -> ProblemError:
        return ProblemError(429, "queue-full", detail, headers=self._retry_after())

    def _retry_after(self) -> dict[str, str]:
        return {protocol.HEADER_RETRY_AFTER: str(self.settings.retry_after_s)}


def create_app(
    reward: Reward,
    settings: Settings,
    open_queue: Callable[[], contextlib.AbstractAsyncContextManager[Queue]],
) -> FastAPI:
    """Create the application of one reward.

    Args:
        reward: describes itself; its `score` is never called here.
        settings: limits, token, deadlines.
        open_queue: opens the batch queue for the life of the application.

    Returns:
        The ASGI application; its `state.service` is the `ScoreService` while it runs.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_queue() as queue:
            app.state.service = ScoreService(reward, settings, queue)
            yield

    app = FastAPI(title=f"Reward service: {reward.name}", version=reward.version, lifespan=lifespan)
    problems: dict[int | str, dict[str, Any]] = {
        status: {"description": HTTPStatus(status).phrase, "content": {protocol.MEDIA_PROBLEM: {}}}
        for status in (400, 401, 413, 415, 422, 429, 500, 503, 504)
    }
    score_body = {
        protocol.MEDIA_SAFETENSORS: {"schema": {"type": "string", "format": "binary"}},
        protocol.MEDIA_JSON: {"schema": protocol.ScoreRequest.model_json_schema()},
    }

    @app.post(
        protocol.SCORE_PATH,
        responses=problems,
        openapi_extra={"requestBody": {"required": True, "content": score_body}},
    )
    async def score(request: Request, response: Response) -> ScoreAnswer:
        """Score a batch of images: one score for each, in order."""
        service: ScoreService = app.state.service
        request_id = request.headers.get(protocol.HEADER_REQUEST_ID, "")[:64] or uuid.uuid4().hex
        status = 500
        with service.metrics.seconds.time():
            try:
                service.authorise(request)
                answer = await service.score(request)
                status = 200
            except ProblemError as error:
                status = error.problem.status
                error.headers[protocol.HEADER_REQUEST_ID] = request_id
                raise
            finally:
                service.metrics.count(status)
                logger.info("request %s answered with %d", _printable(request_id), status)
        response.headers[protocol.HEADER_REQUEST_ID] = request_id
        return answer

    @app.get(protocol.INFO_PATH, responses={401: problems[401]})
    async def info(request: Request) -> Info:
        """Say which reward this is and what may be sent to it."""
        service: ScoreService = app.state.service
        service.authorise(request)
        return service.info

    @app.get(protocol.HEALTH_PATH)
    async def healthz() -> Readiness:
        """Say that the process lives."""
        return Readiness()

    @app.get(protocol.READY_PATH, responses={503: problems[503]})
    async def readyz() -> Readiness:
        """Say whether requests will be scored now."""
        service: ScoreService = app.state.service
        return await service.readiness()

    @app.get(protocol.METRICS_PATH, response_class=Response)
    async def metrics() -> Response:
        """Metrics in the text format of Prometheus."""
        service: ScoreService = app.state.service
        images = math.nan
        with contextlib.suppress(QueueAway):
            images, _ = await service.queue.load()
        service.metrics.queue_images.set(images)
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    _answer_errors_as_problems(app)
    return app


def _answer_errors_as_problems(app: FastAPI) -> None:
    @app.exception_handler(ProblemError)
    async def on_problem(_: Request, error: ProblemError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        detail = f"{request.method} {request.url.path[:100]}: {error.detail}; see /docs for what is served"
        kind = HTTPStatus(error.status_code).phrase.lower().replace(" ", "-")
        return ProblemError(error.status_code, kind, detail, headers=dict(error.headers or {})).response()

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> Response:
        return ProblemError(400, "malformed-request", str(error.errors()[0].get("msg", "invalid"))).response()

    @app.exception_handler(Exception)
    async def on_bug(_: Request, error: Exception) -> Response:
        return ProblemError(500, "internal-error", f"{type(error).__name__}: see the service's log").response()


def _decoder(request: Request) -> Callable[[bytes | bytearray, Limits], Batch]:
    """Choose the decoder by the media type of the body."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media not in DECODERS:
        detail = f"the body is {media[:80] or 'of no type'!r}, must be one of {', '.join(DECODERS)}: set Content-Type"
        raise ProblemError(415, "unsupported-media-type", detail)
    return DECODERS[media]


def _too_large(size: object, limit: int) -> ProblemError:
    return ProblemError(413, "body-too-large", f"the body has {size} bytes, limit {limit}: split the batch")


def _content_length(request: Request, limit: int) -> int | None:
    """The length that the request claims, or None for a chunked one."""
    text = request.headers.get("content-length")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()):
        raise ProblemError(400, "malformed-request", f"Content-Length is {text[:40]!r}, must be a number of bytes")
    if len(text) > 20 or int(text) > limit:
        raise _too_large(text[:40], limit)
    return int(text)


async def _read_body(request: Request, length: int | None, limit: int, deadline_s: float) -> bytearray:
    """Read the body into one buffer that never grows beyond its limit."""
    buffer = bytearray(length or 0)
    size = 0
    try:
        async with asyncio.timeout(deadline_s):
            async for chunk in request.stream():
                end = size + len(chunk)
                if length is None and end > limit:
                    raise _too_large(f"more than {limit}", limit)
                if length is not None and end > length:
                    raise ProblemError(400, "malformed-request", f"the body exceeds its Content-Length of {length}")
                buffer[size:end] = chunk
                size = end
    except TimeoutError:
        detail = f"the body did not arrive within the deadline of {deadline_s:g} s: allow more time"
        raise ProblemError(504, "deadline-passed", detail) from None
    except ClientDisconnect:
        raise ProblemError(CLIENT_GONE, "client-gone", "the client left") from None
    if length is not None and size != length:
        raise ProblemError(400, "malformed-request", f"{size} bytes of a Content-Length of {length} arrived")
    return buffer


async def _decode(decode: Callable[[bytes | bytearray, Limits], Batch], body: bytearray, limits: Limits) -> Batch:
    """Decode on a thread, so that pictures do not hold up other requests."""
    try:
        return await asyncio.to_thread(decode, body, limits)
    except BodyError as error:
        kinds = {400: "malformed-body", 413: "batch-too-large", 422: "unreadable-item"}
        index = error.index if isinstance(error, ItemInvalid) else None
        raise ProblemError(error.status, kinds[error.status], str(error), index=index) from error


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """Wait for the work, and cancel it as soon as the client has left."""
    task = asyncio.ensure_future(work)
    try:
        while True:
            done, _ = await asyncio.wait([task], timeout=CLIENT_POLL_S)
            if done:
                return task.result()
            if await request.is_disconnected():
                raise ProblemError(CLIENT_GONE, "client-gone", "the client left")
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait([task])


def _printable(text: str) -> str:
    return "".join(character for character in text if character.isprintable())
