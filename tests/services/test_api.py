"""The HTTP contract, with a queue that does as it is told."""

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import httpx
import numpy as np
import pytest

from services import protocol
from services.app import create_app
from services.batching.streams import Reply
from services.batching.submit import DeadlinePassed, Job, QueueAway, QueueError, QueueFull, ScoringFailed
from services.images import encode_batch, encode_json, encode_png
from services.rewards.brightness import Brightness
from services.settings import Settings, SettingsError, load_settings
from tests.services.conftest import random_images

pytestmark = pytest.mark.anyio

TOKEN = "of-a-test"
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
        self.deadlines_s: list[float] = []
        self.started = asyncio.Event()
        self.hold = False

    async def ready(self) -> bool:
        if isinstance(self.error, QueueAway):
            raise self.error
        return self.is_ready

    async def load(self) -> tuple[int, int]:
        return 12, 345

    async def score(self, jobs: Sequence[Job], *, deadline_s: float) -> list[Reply]:
        self.deadlines_s.append(deadline_s)
        self.started.set()
        if self.hold:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        replies = [Reply(tuple(Brightness().score(job.images_BHWC, None).tolist()), None) for job in jobs]
        return replies[self.lose :]


@contextlib.asynccontextmanager
async def serving(
    queue: FakeQueue, settings: Settings = SETTINGS, *, raises: bool = True
) -> AsyncIterator[httpx.AsyncClient]:
    """The application, without a network."""

    @contextlib.asynccontextmanager
    async def open_queue() -> AsyncIterator[FakeQueue]:
        yield queue

    app = create_app(Brightness(), settings, open_queue)
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
    for word in words:
        assert word in problem["detail"]
    return problem


@pytest.mark.parametrize(("encode", "headers"), [(encode_batch, SAFETENSORS), (encode_json, JSON)])
async def test_both_bodies_give_the_same_scores_in_order(encode: Callable[..., bytes], headers: dict[str, str]) -> None:
    """One score an image, as the reward gives it, with name, version and timing."""
    async with serving(FakeQueue()) as client:
        answer = await client.post("/score", content=encode(IMAGES, ["a", "b", "c"]), headers=headers)
    body = answer.json()
    assert answer.status_code == 200
    assert body["scores"] == Brightness().score(IMAGES, None).tolist()
    assert (body["reward"], body["version"]) == ("brightness", "1")
    assert set(body["timing_ms"]) == {"queue", "score"}


async def test_a_chunked_body_is_read_and_bounded() -> None:
    """Without a Content-Length the limit holds all the same."""

    async def chunks(body: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    async with serving(FakeQueue()) as client:
        answer = await client.post("/score", content=chunks(encode_batch(IMAGES)), headers=SAFETENSORS)
        assert answer.status_code == 200
        answer = await client.post("/score", content=chunks(bytes(2001)), headers=SAFETENSORS)
        assert_problem(answer, 413, "more than 2000 bytes", "limit 2000", "split")


@pytest.mark.parametrize(
    ("content", "headers", "status", "words"),
    [
        pytest.param(b"x", {"Content-Type": "text/plain"}, 415, "text/plain", id="media type"),
        pytest.param(b"x", {}, 415, "Content-Type", id="no media type"),
        pytest.param(bytes(2001), SAFETENSORS, 413, "2001 bytes, limit 2000", id="too large"),
        pytest.param(encode_batch(random_images(5, 2, 2, 3)), SAFETENSORS, 413, "limit 4", id="too many"),
        pytest.param(encode_batch(IMAGES)[:-1], SAFETENSORS, 400, "truncated", id="truncated"),
        pytest.param(b"{", JSON, 400, "body", id="no JSON"),
        pytest.param(
            encode_batch(IMAGES), {**SAFETENSORS, protocol.HEADER_DEADLINE_MS: "-1"}, 400, "-1", id="deadline"
        ),
        pytest.param(
            encode_batch(IMAGES), {**SAFETENSORS, protocol.HEADER_DEADLINE_MS: "9" * 30}, 400, "at least 1", id="long"
        ),
        pytest.param(
            encode_batch(IMAGES), {**SAFETENSORS, protocol.HEADER_DEADLINE_MS: "0" * 9}, 400, "at least 1", id="zero"
        ),
    ],
)
async def test_bad_requests_are_problems(content: bytes, headers: dict[str, str], status: int, words: str) -> None:
    """Value, limit and remedy, and nothing reaches the queue."""
    queue = FakeQueue()
    async with serving(queue) as client:
        assert_problem(await client.post("/score", content=content, headers=headers), status, words)
    assert queue.deadlines_s == []


async def test_a_bad_picture_is_named_by_its_index() -> None:
    """422, with the index as a member of the problem."""
    good = base64.b64encode(encode_png(IMAGES[0])).decode()
    body = json.dumps({"images": [good, good[:40], good]})
    async with serving(FakeQueue()) as client:
        problem = assert_problem(await client.post("/score", content=body, headers=JSON), 422, "image 1")
    assert problem["index"] == 1


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (QueueFull("64 images, limit 64"), 429, "7"),
        (QueueAway("Redis is not available"), 503, "7"),
        (DeadlinePassed("no score within 1 s"), 504, None),
        (ScoringFailed("the reward gave nan"), 500, None),
    ],
)
async def test_errors_of_the_queue_are_problems(error: QueueError, status: int, retry_after: str | None) -> None:
    """Those that may pass say when to come back."""
    queue = FakeQueue()
    queue.error = error
    async with serving(queue) as client:
        answer = await client.post("/score", content=encode_batch(IMAGES), headers=SAFETENSORS)
    assert_problem(answer, status, str(error))
    assert answer.headers.get("retry-after") == retry_after


async def test_a_lost_reply_is_an_error_not_a_shorter_answer() -> None:
    """The API counts the scores again before it answers."""
    queue = FakeQueue()
    queue.lose = 1
    async with serving(queue) as client:
        answer = await client.post("/score", content=encode_batch(IMAGES), headers=SAFETENSORS)
    assert_problem(answer, 500, "1 scores for 3 images")


async def test_the_deadline_header_bounds_the_queue() -> None:
    """The queue gets what is left of it; without one, the default; of one too long, the service's limit."""
    queue, longest_s = FakeQueue(), SETTINGS.max_deadline_s
    async with serving(queue) as client:
        for given in ("1500", "0001500", None, str(int(9000 * longest_s))):
            headers = SAFETENSORS if given is None else {**SAFETENSORS, protocol.HEADER_DEADLINE_MS: given}
            answer = await client.post("/score", content=encode_batch(IMAGES), headers=headers)
            assert answer.status_code == 200
    assert all(0 < deadline_s <= 1.5 for deadline_s in queue.deadlines_s[:2])
    assert 1.5 < queue.deadlines_s[2] <= SETTINGS.default_deadline_s
    assert longest_s - 1 < queue.deadlines_s[3] <= longest_s


async def test_a_token_is_demanded_where_one_is_set() -> None:
    """Missing, wrong and of another scheme are 401; probes need none."""
    settings = SETTINGS.model_copy(update={"token": Settings(token=TOKEN).token})
    async with serving(FakeQueue(), settings) as client:
        for given in ("", "Bearer wrong", f"Basic {TOKEN}", "Bearer ü".encode().decode("latin-1")):
            headers = {**SAFETENSORS, "Authorization": given.encode("latin-1")}
            answer = await client.post("/score", content=encode_batch(IMAGES), headers=headers)
            assert_problem(answer, 401, "Authorization: Bearer")
            assert answer.headers["www-authenticate"] == "Bearer"
        assert_problem(await client.get("/info"), 401)
        allowed = {"Authorization": f"Bearer {TOKEN}"}
        assert (await client.get("/info", headers=allowed)).status_code == 200
        answer = await client.post("/score", content=encode_batch(IMAGES), headers={**SAFETENSORS, **allowed})
        assert answer.status_code == 200
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).status_code == 200


async def test_info_says_what_may_be_sent() -> None:
    """Name, version, range, direction, bodies and limits."""
    async with serving(FakeQueue()) as client:
        info = protocol.Info.model_validate((await client.get("/info")).json())
    assert (info.name, info.version, info.low, info.higher_is_better) == ("brightness", "1", 0.0, True)
    assert info.bodies == [protocol.MEDIA_SAFETENSORS, protocol.MEDIA_JSON]
    assert info.limits == SETTINGS.limits


async def test_readiness_follows_the_queue() -> None:
    """503 without a worker and without Redis; alive all the while."""
    queue = FakeQueue()
    async with serving(queue) as client:
        assert (await client.get("/readyz")).json() == {"status": "ok"}
        queue.is_ready = False
        assert_problem(await client.get("/readyz"), 503, "no worker for brightness 1")
        queue.error = QueueAway("Redis is not available")
        assert_problem(await client.get("/readyz"), 503, "Redis is not available")
        assert (await client.get("/healthz")).status_code == 200


async def test_metrics_count_requests_and_images() -> None:
    """By status, in the format of Prometheus."""
    async with serving(FakeQueue()) as client:
        await client.post("/score", content=encode_batch(IMAGES), headers=SAFETENSORS)
        await client.post("/score", content=b"{", headers=JSON)
        text = (await client.get("/metrics")).text
    labels = 'reward="brightness",status="{}",version="1"'
    assert f"reward_requests_total{{{labels.format(200)}}} 1.0" in text
    assert f"reward_requests_total{{{labels.format(400)}}} 1.0" in text
    assert 'reward_images_total{reward="brightness",version="1"} 3.0' in text
    assert 'reward_queue_images{reward="brightness",version="1"} 12.0' in text


async def test_the_request_id_travels_back() -> None:
    """Given or made, with scores and with problems."""
    async with serving(FakeQueue()) as client:
        given = {**JSON, protocol.HEADER_REQUEST_ID: "mine"}
        assert (await client.post("/score", content=b"{", headers=given)).headers["x-request-id"] == "mine"
        answer = await client.post("/score", content=encode_batch(IMAGES), headers=SAFETENSORS)
        assert len(answer.headers["x-request-id"]) == 32


async def test_unknown_paths_and_bugs_are_problems() -> None:
    """Whatever goes wrong, the body has one form."""
    queue = FakeQueue()
    queue.score = None  # type: ignore[assignment, method-assign]
    async with serving(queue, raises=False) as client:
        assert_problem(await client.get("/nowhere"), 404, "/nowhere")
        assert_problem(await client.get("/score"), 405)
        answer = await client.post("/score", content=encode_batch(IMAGES), headers=SAFETENSORS)
        assert_problem(answer, 500, "TypeError")


async def test_the_contract_is_described() -> None:
    """OpenAPI lists both bodies and the problems of `POST /score`."""
    async with serving(FakeQueue()) as client:
        post = (await client.get("/openapi.json")).json()["paths"]["/score"]["post"]
    assert set(post["requestBody"]["content"]) == {protocol.MEDIA_SAFETENSORS, protocol.MEDIA_JSON}
    assert {"200", "400", "401", "413", "415", "422", "429", "503", "504"} <= set(post["responses"])


async def test_bodies_in_work_are_bounded() -> None:
    """A second large body is refused while the first is held."""
    queue = FakeQueue()
    queue.hold = True
    settings = SETTINGS.model_copy(update={"queue_bytes": 400})
    body = encode_batch(IMAGES)
    async with serving(queue, settings) as client:
        first = asyncio.create_task(client.post("/score", content=body, headers=SAFETENSORS))
        await queue.started.wait()
        assert_problem(await client.post("/score", content=body, headers=SAFETENSORS), 429, "limit 400")
        first.cancel()
        await asyncio.wait([first])


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("REWARD_MAX_BATCH", "0", "REWARD_MAX_BATCH: .*greater than or equal to 1"),
        ("REWARD_LEASE_MS", "soon", "REWARD_LEASE_MS: "),
        ("REDIS_URL", "http://redis", "REDIS_URL: "),
        ("REWARD_MAX_IMAGES", "100000", "max_images 100000 exceeds queue_images 2048"),
    ],
)
def test_a_bad_setting_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: str
) -> None:
    """The variable, the value's fault, no trace."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=words) as caught:
        load_settings()
    assert "\n" not in str(caught.value)


def test_the_images_of_the_fixtures_fit_the_limits() -> None:
    """Otherwise the tests above would test something else."""
    assert len(encode_batch(IMAGES)) < 400 < 2 * len(encode_batch(IMAGES))
    assert np.prod(IMAGES.shape[1:3]) <= SETTINGS.max_pixels
