"""The application without a network, over a queue that does as it is told."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import httpx

from services import protocol
from services.app import create_app
from services.batching.errors import KeyReused, QueueAway, QueueError
from services.batching.jobs import Job
from services.batching.streams import Reply
from services.batching.survey import Survey
from services.rewards.base import Reward
from services.rewards.brightness import Brightness
from services.settings import Settings
from tests.services.conftest import random_images

IMAGES = random_images(3, 4, 5, 3)
SAFETENSORS = {"Content-Type": protocol.MEDIA_SAFETENSORS}
JSON = {"Content-Type": protocol.MEDIA_JSON}
SETTINGS = Settings(max_images=4, max_body_bytes=2000, max_pixels=64, job_images=2, retry_after_s=7, _env_file=None)


class FakeQueue:
    """Scores at once with brightness, or fails as told."""

    def __init__(self) -> None:
        self.error: QueueError | None = None
        self.lose = 0
        self.is_ready = True
        self.failed_start = ""
        self.deadlines_s: list[float] = []
        self.requests: list[str] = []
        self.started = asyncio.Event()
        self.hold = False
        self.seen: Survey | None = None
        self._answers: dict[str, tuple[str, asyncio.Task[bytes]]] = {}

    async def ready(self) -> bool:
        if isinstance(self.error, QueueAway):
            raise self.error
        return self.is_ready

    async def trouble(self) -> str:
        return self.failed_start

    async def survey(self) -> Survey:
        if self.seen is None:
            raise QueueAway("Redis is not available")
        return self.seen

    async def score(self, jobs: Sequence[Job], *, deadline_s: float, request: str) -> list[Reply]:
        self.deadlines_s.append(deadline_s)
        self.requests.append(request)
        self.started.set()
        if self.hold:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        replies = [
            Reply(tuple(Brightness().score(job.images_BHWC, None).tolist()), None, queue_ms=20.0, score_ms=3.0)
            for job in jobs
        ]
        return replies[self.lose :]

    async def once(self, key: str, digest: str, work: Callable[[], Awaitable[bytes]], *, deadline_s: float) -> bytes:
        known, task = self._answers.get(key, (digest, None))
        if known != digest:
            raise KeyReused("this Idempotency-Key was used for other images or prompts: make a new key")
        if task is None:
            task = asyncio.ensure_future(work())
            self._answers[key] = digest, task
        try:
            return await task
        except BaseException:
            self._answers.pop(key, None)
            raise


@contextlib.asynccontextmanager
async def serving(
    queue: FakeQueue, settings: Settings = SETTINGS, *, raises: bool = True, reward: Reward | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application."""

    @contextlib.asynccontextmanager
    async def open_queue() -> AsyncIterator[FakeQueue]:
        yield queue

    app = create_app(reward or Brightness(), settings, open_queue)
    transport = httpx.ASGITransport(app, raise_app_exceptions=raises)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://reward.test") as client,
    ):
        yield client


def assert_problem(answer: httpx.Response, status: int, *words: str) -> dict[str, Any]:
    """An RFC 9457 body with this status and these words."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == protocol.MEDIA_PROBLEM
    problem: dict[str, Any] = answer.json()
    assert problem["status"] == status
    assert problem["title"]
    assert problem["type"].startswith("urn:reward:")
    for word in words:
        assert word in problem["detail"]
    return problem
