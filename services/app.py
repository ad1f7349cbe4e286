"""The HTTP face of a reward: `POST /score`, `/info`, `/healthz`, `/readyz`, `/metrics`."""

import asyncio
import contextlib
import itertools
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.routing import Route

from services import protocol
from services.batching.errors import QueueAway
from services.http.metrics import CONTENT_TYPE
from services.http.openapi import describe
from services.http.problems import ProblemError, answer_errors_as_problems
from services.http.service import ALONE, Group, Queue, ScoreService
from services.protocol import Info, Readiness
from services.rewards.base import Reward
from services.settings import Settings

logger = logging.getLogger(__name__)

REQUEST_ID_CHARS = 64
SURVEY_S = 2.0
"""How long `/metrics` waits for a Redis that hangs, of the four seconds that Prometheus waits with Compose: an API that
does not answer in time would be taken for one that is down."""
PROCESS, REQUESTS = uuid.uuid4().hex[:16], itertools.count(1)
"""What a request without a name is called by: its process and its number there."""


def create_app(
    reward: Reward,
    settings: Settings,
    open_queue: Callable[[], contextlib.AbstractAsyncContextManager[Queue]],
    group: Group = ALONE,
) -> FastAPI:
    """Create the application of one reward.

    Args:
        reward: describes itself; its `score` is never called here.
        settings: limits, token, deadlines.
        open_queue: opens the batch queue for the life of the application.
        group: the API processes that this is one of.

    Returns:
        The ASGI application; its `state.service` is the `ScoreService` while it runs.
    """
    document = describe(reward, settings)

    class App(FastAPI):
        """An application that is described by our own document: the framework's differs between its versions."""

        def openapi(self) -> dict[str, Any]:
            return document

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_queue() as queue:
            app.state.service = ScoreService(reward, settings, queue, group)
            yield

    # It would send /score/ on to whatever address the request's Host names.
    app = App(title=document["info"]["title"], version=reward.version, lifespan=lifespan, redirect_slashes=False)
    _route(app)
    answer_errors_as_problems(app)
    return app


def _route(app: FastAPI) -> None:
    """Say what answers at which path; `openapi` describes it."""

    async def score(request: Request) -> Response:
        service: ScoreService = app.state.service
        request_id = request.state.request_id = _request_id(request)
        status, started_s = 500, time.monotonic()
        try:
            service.authorise(request)
            answer = await service.score(request, request_id)
            status = 200
        except ProblemError as error:
            status = error.problem.status
            raise
        finally:
            taken_s = time.monotonic() - started_s
            service.metrics.count_request(status)
            service.metrics.observe_phase("total", taken_s)
            fields = {"request": request_id, "status": status, "ms": round(1000 * taken_s, 1)}
            logger.info("request answered", extra={"fields": fields})
        headers = {protocol.HEADER_REQUEST_ID: request_id}
        if answer.replayed:
            headers[protocol.HEADER_IDEMPOTENCY_REPLAYED] = "true"
        return Response(answer.content, 200, headers, protocol.MEDIA_JSON)

    # A plain route: it reads its request itself, and a framework that looks for parameters costs it a tenth of a
    # request with one picture.
    app.router.routes.append(Route(protocol.SCORE_PATH, score, methods=["POST"]))

    @app.get(protocol.INFO_PATH)
    async def info(request: Request) -> Info:
        service: ScoreService = app.state.service
        service.authorise(request)
        return service.info

    @app.get(protocol.HEALTH_PATH)
    async def healthz() -> Readiness:
        return Readiness()

    @app.get(protocol.READY_PATH)
    async def readyz() -> Readiness:
        service: ScoreService = app.state.service
        return await service.readiness()

    @app.get(protocol.METRICS_PATH, response_class=Response)
    async def metrics() -> Response:
        service: ScoreService = app.state.service
        survey = None
        with contextlib.suppress(QueueAway, TimeoutError):
            async with asyncio.timeout(SURVEY_S):
                survey = await service.queue.survey()
        return Response(service.metrics.text(survey), media_type=CONTENT_TYPE)


def _request_id(request: Request) -> str:
    """The name that the client gave its request, or a new one."""
    given = request.headers.get(protocol.HEADER_REQUEST_ID, "")[:REQUEST_ID_CHARS]
    return "".join(character for character in given if "!" <= character <= "~") or f"{PROCESS}-{next(REQUESTS):x}"
