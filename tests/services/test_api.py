"""The HTTP contract, with a queue that does as it is told."""

import asyncio
import base64
import json
import re
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest

from services import protocol
from services.batching.errors import DeadlinePassed, QueueAway, QueueError, QueueFull, ScoringFailed
from services.http.bodies import MEDIA_TYPES
from services.images import encode_batch, encode_json, encode_png
from services.rewards.brightness import Brightness
from services.settings import Settings, SettingsError, load_settings
from tests.services.conftest import random_images
from tests.services.dummies import Choosy
from tests.services.serving import IMAGES, JSON, SAFETENSORS, SETTINGS, FakeQueue, assert_problem, serving

pytestmark = pytest.mark.anyio

TOKEN = "of-a-test"


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
        pytest.param(b"x", {**JSON, "Content-Encoding": "gzip"}, 415, "'gzip'", id="compressed"),
        pytest.param(bytes(2001), SAFETENSORS, 413, "2001 bytes, limit 2000", id="too large"),
        pytest.param(encode_batch(random_images(5, 2, 2, 3)), SAFETENSORS, 413, "limit 4", id="too many"),
        pytest.param(encode_batch(IMAGES)[:-1], SAFETENSORS, 400, "truncated", id="truncated"),
        pytest.param(b"{", JSON, 400, "body", id="no JSON"),
        pytest.param(
            encode_batch(IMAGES), {**SAFETENSORS, protocol.HEADER_DEADLINE_MS: "-1"}, 400, "-1", id="deadline"
        ),
        pytest.param(
            encode_batch(IMAGES), {**SAFETENSORS, protocol.HEADER_DEADLINE_MS: "9" * 30}, 400, "from 1 to", id="long"
        ),
        pytest.param(
            encode_batch(IMAGES), {**SAFETENSORS, protocol.HEADER_DEADLINE_MS: "0" * 9}, 400, "from 1 to", id="zero"
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
    ids=lambda value: type(value).__name__ if isinstance(value, QueueError) else str(value),
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
    assert info.bodies == list(MEDIA_TYPES)
    assert info.limits == SETTINGS.limits


async def test_a_reward_that_needs_prompts_gets_them() -> None:
    """/info says so; a request without is 422 before it is queued, one with them is answered."""
    queue = FakeQueue()
    async with serving(queue, reward=Choosy()) as client:
        info = protocol.Info.model_validate((await client.get("/info")).json())
        assert info.needs_prompts
        assert info.scale == "made for a test"
        answer = await client.post("/score", content=encode_batch(IMAGES), headers=SAFETENSORS)
        assert_problem(answer, 422, "choosy compares with a prompt", "send one for each image")
        assert not queue.requests
        answer = await client.post("/score", content=encode_batch(IMAGES, ["a"] * 3), headers=SAFETENSORS)
        assert answer.status_code == 200


async def test_readiness_follows_the_queue() -> None:
    """503 without a worker and without Redis; alive all the while."""
    queue = FakeQueue()
    async with serving(queue) as client:
        assert (await client.get("/readyz")).json() == {"status": "ok"}
        queue.is_ready = False
        assert_problem(await client.get("/readyz"), 503, "no worker for brightness 1")
        queue.failed_start = "the weights are missing"
        assert_problem(await client.get("/readyz"), 503, "start one, or wait; the weights are missing")
        queue.error = QueueAway("Redis is not available")
        assert_problem(await client.get("/readyz"), 503, "Redis is not available")
        assert (await client.get("/healthz")).status_code == 200


async def test_the_request_id_travels() -> None:
    """Given or made, back to the client, with scores and with problems, and on to the queue for the worker's log."""
    queue = FakeQueue()
    async with serving(queue, raises=False) as client:
        given = {**SAFETENSORS, protocol.HEADER_REQUEST_ID: "mine"}
        answer = await client.post("/score", content=encode_batch(IMAGES), headers=given)
        assert answer.headers["x-request-id"] == "mine"
        assert queue.requests == ["mine"]
        assert (await client.post("/score", content=b"{", headers=given)).headers["x-request-id"] == "mine"
        odd = {protocol.HEADER_REQUEST_ID: b"a b\xfc" + b"c" * 99}
        assert (await client.post("/score", headers=odd)).headers["x-request-id"] == "ab" + "c" * 60
        answer = await client.post("/score", content=encode_batch(IMAGES), headers=SAFETENSORS)
        made = answer.headers["x-request-id"]
        answer = await client.post("/score", content=encode_batch(IMAGES), headers=SAFETENSORS)
        assert made != answer.headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{16}-[0-9a-f]+", made)
        queue.score = None  # type: ignore[assignment, method-assign]
        answer = await client.post("/score", content=encode_batch(IMAGES), headers=given)
        assert (answer.status_code, answer.headers["x-request-id"]) == (500, "mine")


async def test_the_image_at_fault_is_named() -> None:
    """Where the worker knows which image it could not score, the problem says so."""
    queue = FakeQueue()
    queue.error = ScoringFailed("the reward gave nan", 2)
    async with serving(queue) as client:
        answer = await client.post("/score", content=encode_batch(IMAGES), headers=SAFETENSORS)
    assert assert_problem(answer, 500, "nan")["index"] == 2


async def test_a_repeat_brings_back_the_first_answer() -> None:
    """The same key and pictures, whatever the body: the same bytes, marked, and nothing is scored again."""
    queue = FakeQueue()
    key = {protocol.HEADER_IDEMPOTENCY_KEY: "!a-key~"}
    async with serving(queue) as client:
        first = await client.post("/score", content=encode_batch(IMAGES), headers={**SAFETENSORS, **key})
        repeat = await client.post("/score", content=encode_json(IMAGES), headers={**JSON, **key})
        files = [("images", ("a.png", encode_png(image_HWC), "image/png")) for image_HWC in IMAGES]
        form = await client.post("/score", files=files, headers=key)
    assert first.status_code == 200
    assert repeat.content == form.content == first.content
    marks = [answer.headers.get(protocol.HEADER_IDEMPOTENCY_REPLAYED) for answer in (first, repeat, form)]
    assert marks == [None, "true", "true"]
    assert len(queue.deadlines_s) == 1


async def test_a_repeat_waits_for_the_one_in_flight() -> None:
    """Two at once are scored once."""
    queue = FakeQueue()
    headers = {**SAFETENSORS, protocol.HEADER_IDEMPOTENCY_KEY: "k"}
    async with serving(queue) as client:
        both = await asyncio.gather(
            *(client.post("/score", content=encode_batch(IMAGES), headers=headers) for _ in range(2))
        )
    assert both[0].content == both[1].content
    assert sorted(answer.headers.get(protocol.HEADER_IDEMPOTENCY_REPLAYED, "") for answer in both) == ["", "true"]
    assert len(queue.deadlines_s) == 1


async def test_a_key_belongs_to_one_request() -> None:
    """Other pixels, another order, other prompts: 422; and without a key nothing is kept."""
    headers = {**SAFETENSORS, protocol.HEADER_IDEMPOTENCY_KEY: "k"}
    async with serving(FakeQueue()) as client:
        assert (await client.post("/score", content=encode_batch(IMAGES), headers=headers)).status_code == 200
        for body in (encode_batch(IMAGES[::-1]), encode_batch(IMAGES[:2]), encode_batch(IMAGES, ["a", "b", "c"])):
            answer = await client.post("/score", content=body, headers=headers)
            problem = assert_problem(answer, 422, "other images or prompts", "make a new key")
            assert problem["type"] == "urn:reward:idempotency-key-reused"
        assert (await client.post("/score", content=encode_batch(IMAGES[:2]), headers=SAFETENSORS)).status_code == 200


async def test_a_failure_is_not_kept() -> None:
    """After an error the same key is scored anew, with the deadline of the request that asks."""
    queue = FakeQueue()
    queue.error = QueueFull("64 images, limit 64")
    headers = {**SAFETENSORS, protocol.HEADER_IDEMPOTENCY_KEY: "k", protocol.HEADER_DEADLINE_MS: "1500"}
    async with serving(queue) as client:
        assert_problem(await client.post("/score", content=encode_batch(IMAGES), headers=headers), 429)
        queue.error = None
        answer = await client.post("/score", content=encode_batch(IMAGES), headers=headers)
    assert answer.status_code == 200
    assert protocol.HEADER_IDEMPOTENCY_REPLAYED not in answer.headers
    assert all(0 < deadline_s <= 1.5 for deadline_s in queue.deadlines_s)


@pytest.mark.parametrize("key", [b"", b"a b", b"k" * 129, b"\xfc"], ids=["empty", "space", "long", "not ASCII"])
async def test_a_bad_key_is_refused(key: bytes) -> None:
    """1 to 128 printable ASCII characters, no spaces; 128 are fine."""
    async with serving(FakeQueue()) as client:
        named = {**SAFETENSORS, protocol.HEADER_IDEMPOTENCY_KEY: key}
        answer = await client.post("/score", content=encode_batch(IMAGES), headers=named)
        assert_problem(answer, 400, "Idempotency-Key", "128 printable ASCII", "send a UUID")
        headers = {**SAFETENSORS, protocol.HEADER_IDEMPOTENCY_KEY: "k" * 128}
        assert (await client.post("/score", content=encode_batch(IMAGES), headers=headers)).status_code == 200


async def test_unknown_paths_and_bugs_are_problems() -> None:
    """Whatever goes wrong, the body has one form."""
    queue = FakeQueue()
    queue.score = None  # type: ignore[assignment, method-assign]
    async with serving(queue, raises=False) as client:
        for path in ("/nowhere", "/info/", "/healthz/"):
            assert_problem(await client.get(path), 404, path)
        assert_problem(await client.post("/score/", headers={"Host": "elsewhere.test"}), 404, "/score/")
        assert_problem(await client.get("/score"), 405, "GET /score")
        assert_problem(await client.post("/info"), 405, "POST /info")
        answer = await client.post("/score", content=encode_batch(IMAGES), headers=SAFETENSORS)
        assert_problem(answer, 500, "TypeError")


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("REWARD_MAX_BATCH", "0", "REWARD_MAX_BATCH: .*greater than or equal to 1"),
        ("REWARD_LEASE_MS", "soon", "REWARD_LEASE_MS: "),
        ("REDIS_URL", "http://redis", "REDIS_URL: "),
        ("REWARD_MAX_IMAGES", "100000", "^REWARD_MAX_IMAGES 100000 exceeds REWARD_QUEUE_IMAGES 2048: raise"),
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
