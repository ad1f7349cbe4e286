"""The client against answers of every kind: an invalid one never becomes a number."""

import json
import time
from collections.abc import Callable, Iterator

import httpx
import numpy as np
import pytest
import stamina

from services import protocol
from services.client import (
    RewardAnswerInvalid,
    RewardClient,
    RewardDeadlineExceeded,
    RewardRefused,
    RewardUnavailable,
)
from services.images import decode_batch, decode_json
from services.protocol import Limits
from tests.services.conftest import random_images

pytestmark = pytest.mark.anyio

URL = "http://reward.test"
TOKEN = "of-a-test"
IMAGES = random_images(3, 4, 4, 3)
Handler = Callable[[httpx.Request], httpx.Response]


@pytest.fixture(autouse=True)
def quick_retries() -> Iterator[None]:
    """Waits between attempts, unless a service asks for them, are skipped."""
    with stamina.set_testing(True, attempts=4, cap=True):
        yield


def info(**changes: object) -> dict[str, object]:
    """An answer of `GET /info`."""
    limits = {"max_images": 100, "max_body_bytes": 10**6, "max_pixels": 10**6, "max_prompt_chars": 100}
    bodies = [protocol.MEDIA_SAFETENSORS, protocol.MEDIA_JSON]
    return {"name": "fake", "version": "1", "bodies": bodies, "limits": limits, **changes}


def answer(scores: object, **changes: object) -> dict[str, object]:
    """An answer of `POST /score`."""
    timing = {"queue": 1.0, "score": 2.0}
    return {"scores": scores, "reward": "fake", "version": "1", "timing_ms": timing, **changes}


def service(on_score: Handler, **info_changes: object) -> httpx.MockTransport:
    """A service with a given `POST /score`."""

    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path == protocol.INFO_PATH:
            return httpx.Response(200, json=info(**info_changes))
        return on_score(request)

    return httpx.MockTransport(handle)


def problem(status: int, **headers: str) -> httpx.Response:
    """An error as the services give it."""
    body = {"type": "urn:reward:x", "title": "No", "status": status, "detail": "because", "index": 2}
    return httpx.Response(status, json=body, headers={"Content-Type": protocol.MEDIA_PROBLEM, **headers})


async def test_scores_are_float64_in_order_with_name_version_and_timing() -> None:
    """The request carries token, deadline, id, images and prompts; the result is the answer's."""
    seen: list[httpx.Request] = []

    def on_score(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json=answer([0.1, 1, -2.5]))

    async with RewardClient(URL + "/", token=TOKEN, transport=service(on_score)) as client:
        result = await client.score(IMAGES, ["a", "b", "c"], deadline_s=10)
    assert result.scores.dtype == np.float64
    assert result.scores.tolist() == [0.1, 1.0, -2.5]
    assert (result.reward, result.version) == ("fake", "1")
    assert {"queue", "score", "total"} == set(result.timing_ms)
    (request,) = seen
    assert request.headers["authorization"] == f"Bearer {TOKEN}"
    assert 1 <= int(request.headers[protocol.HEADER_DEADLINE_MS]) <= 10_000
    assert request.headers[protocol.HEADER_REQUEST_ID]
    batch = decode_batch(request.content, Limits())
    assert np.array_equal(np.stack(list(batch.images_HWC)), IMAGES)
    assert batch.prompts == ["a", "b", "c"]


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(json.dumps(answer([0.1, float("nan"), 0.3])), id="NaN"),
        pytest.param(json.dumps(answer([0.1, float("inf"), 0.3])), id="infinite"),
        pytest.param(json.dumps(answer([0.1, None, 0.3])), id="null"),
        pytest.param(json.dumps(answer([0.1, "0.2", 0.3])), id="string"),
        pytest.param(json.dumps(answer([0.1, True, 0.3])), id="boolean"),
        pytest.param(json.dumps(answer([0.1, 0.2])), id="missing"),
        pytest.param(json.dumps(answer([0.1, 0.2, 0.3, 0.4])), id="extra"),
        pytest.param(json.dumps(answer([])), id="none"),
        pytest.param(json.dumps(answer([[0.1], [0.2], [0.3]])), id="nested"),
        pytest.param(json.dumps(answer([0.1, 0.2, 0.3], version=None)), id="no version"),
        pytest.param(json.dumps(answer([0.1, 0.2, 0.3], reward=7)), id="a number for a name"),
        pytest.param(json.dumps({"scores": [0.1, 0.2, 0.3]}), id="scores alone"),
        pytest.param("<html>", id="HTML"),
        pytest.param("", id="empty"),
        pytest.param("[1e999]", id="list"),
        pytest.param(" " * (9 * 2**20), id="endless"),
    ],
)
async def test_an_invalid_answer_raises_and_is_not_repeated(body: str) -> None:
    """NaN, null, a missing or an extra score is an error, never a number."""
    sent = []

    def on_score(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        return httpx.Response(200, content=body)

    async with RewardClient(URL, transport=service(on_score)) as client:
        with pytest.raises(RewardAnswerInvalid, match=URL):
            await client.score(IMAGES)
    assert len(sent) == 1


@pytest.mark.parametrize("status", [429, 502, 503, 504])
async def test_a_busy_service_is_asked_again(status: int) -> None:
    """Two failures that may pass, then the scores."""
    answers = iter([problem(status), problem(status), httpx.Response(200, json=answer([1, 2, 3]))])
    async with RewardClient(URL, transport=service(lambda _: next(answers))) as client:
        assert (await client.score(IMAGES)).scores.tolist() == [1, 2, 3]


@pytest.mark.parametrize("status", [301, 302, 400, 401, 404, 413, 415, 422, 500])
async def test_a_refusal_is_final_and_says_why(status: int) -> None:
    """No other status is repeated, and no redirect followed."""
    sent = []

    def on_score(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        return problem(status, Location="http://elsewhere.test/")

    async with RewardClient(URL, transport=service(on_score)) as client:
        with pytest.raises(RewardRefused, match=rf"{status} \(No: because\)") as caught:
            await client.score(IMAGES)
    assert caught.value.status == status
    assert caught.value.problem.index == 2
    assert len(sent) == 1


async def test_attempts_are_finite() -> None:
    """A service that stays away is reported with its last word."""

    def on_score(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    async with RewardClient(URL, transport=service(on_score), attempts=3) as client:
        with pytest.raises(RewardUnavailable, match=r"after 3 attempts \(ConnectError: refused\)"):
            await client.score(IMAGES)


async def test_retry_after_is_honoured() -> None:
    """The second attempt comes no earlier than the service asks."""
    with stamina.set_testing(False):
        answers = iter([problem(429, **{"Retry-After": "1"}), httpx.Response(200, json=answer([1, 2, 3]))])
        started_s = time.monotonic()
        async with RewardClient(URL, transport=service(lambda _: next(answers))) as client:
            await client.score(IMAGES)
        assert time.monotonic() - started_s >= 1.0


async def test_a_full_queue_does_not_use_up_the_attempts() -> None:
    """Coming back when a busy service says so is no failure; only the deadline bounds it."""
    calls = 0

    def on_score(_: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        if calls <= 6:
            return httpx.Response(429, headers={"Retry-After": "0"}, json={"title": "queue full"})
        return httpx.Response(200, json=answer([0.1, 0.2, 0.3]))

    with stamina.set_testing(False):
        async with RewardClient(URL, transport=service(on_score), attempts=2) as client:
            result = await client.score(IMAGES, deadline_s=30)
    assert result.scores.tolist() == [0.1, 0.2, 0.3]
    assert calls == 7


async def test_the_deadline_bounds_all_attempts() -> None:
    """A service that asks for an hour's patience does not get it."""
    with stamina.set_testing(False):
        started_s = time.monotonic()
        async with RewardClient(URL, transport=service(lambda _: problem(429, **{"Retry-After": "3600"}))) as client:
            with pytest.raises(RewardDeadlineExceeded, match="429"):
                await client.score(IMAGES, deadline_s=0.2)
        assert time.monotonic() - started_s < 5.0


async def test_a_large_batch_is_sent_in_pieces_and_keeps_its_order() -> None:
    """Pieces respect the service's limit; their scores are laid end to end."""
    sizes = []

    def on_score(request: httpx.Request) -> httpx.Response:
        images = decode_batch(request.content, Limits()).images_HWC
        sizes.append(len(images))
        return httpx.Response(200, json=answer([float(image[0, 0, 0]) for image in images]))

    images_BHWC = random_images(10, 4, 4, 3)
    images_BHWC[:, 0, 0, 0] = range(10)
    limits = {"max_images": 4, "max_body_bytes": 10**6, "max_pixels": 10**6, "max_prompt_chars": 100}
    async with RewardClient(URL, transport=service(on_score, limits=limits)) as client:
        result = await client.score(images_BHWC, [str(n) for n in range(10)])
    assert result.scores.tolist() == list(range(10))
    assert sorted(sizes) == [2, 4, 4]


async def test_pieces_scored_by_two_versions_are_refused() -> None:
    """One answer, one model."""
    versions = iter(["1", "2"])
    limits = {"max_images": 2, "max_body_bytes": 10**6, "max_pixels": 10**6, "max_prompt_chars": 100}

    def on_score(request: httpx.Request) -> httpx.Response:
        count = len(decode_batch(request.content, Limits()).images_HWC)
        return httpx.Response(200, json=answer([0.0] * count, version=next(versions)))

    async with RewardClient(URL, transport=service(on_score, limits=limits)) as client:
        with pytest.raises(RewardAnswerInvalid, match="mixed the models"):
            await client.score(IMAGES)


async def test_an_error_of_one_piece_is_raised_as_itself() -> None:
    """Not as a group of errors."""
    limits = {"max_images": 1, "max_body_bytes": 10**6, "max_pixels": 10**6, "max_prompt_chars": 100}
    async with RewardClient(URL, transport=service(lambda _: problem(422), limits=limits)) as client:
        with pytest.raises(RewardRefused):
            await client.score(IMAGES)


async def test_a_service_without_safetensors_gets_json() -> None:
    """The body is chosen by what `/info` accepts."""

    def on_score(request: httpx.Request) -> httpx.Response:
        assert request.headers["content-type"] == protocol.MEDIA_JSON
        batch = decode_json(request.content, Limits())
        assert np.array_equal(np.stack(list(batch.images_HWC)), IMAGES)
        return httpx.Response(200, json=answer([1, 2, 3]))

    async with RewardClient(URL, transport=service(on_score, bodies=[protocol.MEDIA_JSON])) as client:
        await client.score(IMAGES)


async def test_waiting_for_readiness_ends_with_it_or_says_what_was_missing() -> None:
    """503 until ready; a service that never is raises with its last answer."""
    answers = iter([problem(503), problem(503), httpx.Response(200, json={"status": "ok"})])
    async with RewardClient(URL, transport=httpx.MockTransport(lambda _: next(answers))) as client:
        await client.wait_ready(10)
    async with RewardClient(URL, transport=httpx.MockTransport(lambda _: problem(503))) as client:
        with pytest.raises(RewardUnavailable, match=r"not ready after 0.2 s \(503 \(No: because\)\)"):
            await client.wait_ready(0.2)


async def test_a_service_that_is_down_is_named() -> None:
    """A real refused connection: the message has the URL and the remedy."""
    async with RewardClient("http://127.0.0.1:9") as client:
        with pytest.raises(RewardUnavailable, match=r"127\.0\.0\.1:9 is not ready .* start the service"):
            await client.wait_ready(0.3)
        with pytest.raises(RewardUnavailable, match=r"127\.0\.0\.1:9 is not available"):
            await client.score(IMAGES)


@pytest.mark.parametrize("url", ["reward:80", "ftp://reward", "", "/score"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    """Before anything is sent."""
    with pytest.raises(ValueError, match="reward URL is"):
        RewardClient(url)


async def test_images_that_are_none_are_refused_before_anything_is_sent() -> None:
    """The caller's mistake is a `ValueError`."""
    async with RewardClient(URL, transport=httpx.MockTransport(lambda _: problem(500))) as client:
        with pytest.raises(ValueError, match="expected uint8"):
            await client.score(IMAGES.astype(np.float32))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="must be positive"):
            await client.score(IMAGES, deadline_s=0)
