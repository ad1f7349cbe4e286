"""The client against answers of every kind: an invalid one never becomes a number."""

import json
import pickle
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import stamina

from services import protocol
from services.client import (
    RewardAnswerInvalid,
    RewardClient,
    RewardError,
    RewardRefused,
    RewardUnavailable,
)
from services.images import decode_batch, decode_json
from services.protocol import Limits, Problem
from tests.services.conftest import random_images
from tests.services.fake_service import URL, FakeService, answer, info, problem

pytestmark = pytest.mark.anyio

TOKEN = "of-a-test"
IMAGES = random_images(3, 4, 4, 3)


@pytest.fixture(autouse=True)
def quick_retries() -> Iterator[None]:
    """Waits between attempts are skipped."""
    with stamina.set_testing(True, attempts=4, cap=True):
        yield


async def test_scores_are_float64_in_order_with_name_version_and_timing() -> None:
    """The request carries token, deadline, id, key, images and prompts; the result is the answer's."""
    service = FakeService(lambda _: httpx.Response(200, json=answer([0.1, 1, -2.5])))
    async with RewardClient(URL + "/", token=TOKEN, transport=service.transport) as client:
        result = await client.score(IMAGES, ["a", "b", "c"], deadline_s=10)
    assert result.scores.dtype == np.float64
    assert result.scores.tolist() == [0.1, 1.0, -2.5]
    assert (result.reward, result.version) == ("fake", "1")
    assert {"queue", "score", "total"} == set(result.timing_ms)
    (request,) = service.posts
    assert request.headers["authorization"] == f"Bearer {TOKEN}"
    assert 1 <= int(request.headers[protocol.HEADER_DEADLINE_MS]) <= 10_000
    assert request.headers[protocol.HEADER_REQUEST_ID]
    assert len(request.headers[protocol.HEADER_IDEMPOTENCY_KEY]) == 32
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
    service = FakeService(lambda _: httpx.Response(200, content=body))
    async with RewardClient(URL, transport=service.transport) as client:
        with pytest.raises(RewardAnswerInvalid, match=URL) as caught:
            await client.score(IMAGES)
    assert caught.value.status == 200
    assert len(service.posts) == 1


async def test_an_answer_that_cannot_be_decoded_is_invalid() -> None:
    """What calls itself gzip and is none is not asked for again."""
    headers = {"Content-Encoding": "gzip"}

    def on_score(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=httpx.ByteStream(b"no gzip"), headers=headers)

    service = FakeService(on_score)
    async with RewardClient(URL, transport=service.transport) as client:
        with pytest.raises(RewardAnswerInvalid, match="cannot be decoded"):
            await client.score(IMAGES)
    assert len(service.posts) == 1


@pytest.mark.parametrize("status", [201, 202, 204])
async def test_another_success_is_no_answer(status: int) -> None:
    """Scores come with 200 alone."""
    service = FakeService(lambda _: httpx.Response(status))
    async with RewardClient(URL, transport=service.transport) as client:
        with pytest.raises(RewardAnswerInvalid, match=str(status)) as caught:
            await client.score(IMAGES)
    assert caught.value.status == status
    assert len(service.posts) == 1


@pytest.mark.parametrize("status", [301, 302, 400, 401, 403, 404, 409, 413, 415, 422, 425, 500, 501])
async def test_a_refusal_is_final_and_says_why(status: int) -> None:
    """No other status is repeated, and no redirect followed."""
    service = FakeService(lambda _: problem(status, Location="http://elsewhere.test/"))
    async with RewardClient(URL, transport=service.transport) as client:
        with pytest.raises(RewardRefused, match=rf"{status} \(No: because\)") as caught:
            await client.score(IMAGES)
    assert caught.value.status == status
    assert caught.value.problem.type == "urn:reward:x"
    assert caught.value.index == caught.value.problem.index == 2
    assert len(service.posts) == 1


async def test_a_refusal_may_name_no_image() -> None:
    """Nor is a position outside the request taken for one."""
    for index in (None, 3):
        service = FakeService(lambda _, index=index: problem(422, index=index))  # type: ignore[misc]
        async with RewardClient(URL, transport=service.transport) as client:
            with pytest.raises(RewardRefused) as caught:
                await client.score(IMAGES)
        assert caught.value.index is None


@pytest.mark.parametrize("kind", [RewardUnavailable, RewardRefused, RewardAnswerInvalid])
def test_an_error_crosses_processes_whole(kind: type[RewardError]) -> None:
    """With message and attributes."""
    error = kind("why", status=422, problem=Problem(detail="because"), index=7)
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - its own
    assert type(copy) is kind
    assert (str(copy), copy.status, copy.problem, copy.index) == ("why", 422, Problem(detail="because"), 7)


async def test_a_service_without_safetensors_gets_json() -> None:
    """The body is chosen by what `/info` accepts."""
    service = FakeService(told=info(bodies=[protocol.MEDIA_JSON]))
    async with RewardClient(URL, transport=service.transport) as client:
        await client.score(IMAGES, ["a", "b", "c"])
    (request,) = service.posts
    assert request.headers["content-type"] == protocol.MEDIA_JSON
    batch = decode_json(request.content, Limits())
    assert np.array_equal(np.stack(list(batch.images_HWC)), IMAGES)
    assert batch.prompts == ["a", "b", "c"]


async def test_a_service_with_no_body_in_common_is_sent_nothing() -> None:
    """The error says what each side knows."""
    service = FakeService(told=info(bodies=["image/tiff"]))
    async with RewardClient(URL, transport=service.transport) as client:
        with pytest.raises(
            RewardAnswerInvalid, match="accepts image/tiff, this client sends application/x-safetensors"
        ):
            await client.score(IMAGES)
    assert not service.posts


async def test_waiting_for_readiness_ends_with_it_or_says_what_was_missing() -> None:
    """503 until ready; a service that never is raises with its last answer."""
    answers = iter([problem(503), problem(503), httpx.Response(200, json={"status": "ok"})])
    async with RewardClient(URL, transport=httpx.MockTransport(lambda _: next(answers))) as client:
        await client.wait_ready(10)
    async with RewardClient(URL, transport=httpx.MockTransport(lambda _: problem(503))) as client:
        with pytest.raises(RewardUnavailable, match=r"not ready after 0.2 s \(503 \(No: because\)\)") as caught:
            await client.wait_ready(0.2)
    assert caught.value.status == 503


async def test_a_service_that_is_down_is_named() -> None:
    """A real refused connection: the message has the URL and the remedy."""
    async with RewardClient("http://127.0.0.1:9") as client:
        with pytest.raises(RewardUnavailable, match=r"127\.0\.0\.1:9 is not ready .* start the service"):
            await client.wait_ready(0.3)
        with pytest.raises(RewardUnavailable, match=r"127\.0\.0\.1:9 is not available") as caught:
            await client.score(IMAGES)
    assert caught.value.status is None


@pytest.mark.parametrize(
    "url", ["reward:80", "ftp://reward", "", "/score", "http://[::1", "http://r/?a=b", "http://r#a"]
)
def test_a_url_that_is_none_is_refused(url: str) -> None:
    """Before anything is sent."""
    with pytest.raises(ValueError, match="reward URL is"):
        RewardClient(url)


def test_secrets_are_not_repeated_in_errors() -> None:
    """Neither a password within the URL nor a token that no header carries."""
    with pytest.raises(ValueError, match="give a token instead") as caught:
        RewardClient("http://user:hidden@reward")
    assert "hidden" not in str(caught.value)
    for token in ("hid den", "hidden\n", "hiddén"):
        with pytest.raises(ValueError, match="visible ASCII") as caught:
            RewardClient(URL, token=token)
        assert token.strip() not in str(caught.value)


@pytest.mark.parametrize(
    "arguments", [{"timeout_s": 0.0}, {"timeout_s": float("inf")}, {"attempts": 0}, {"concurrency": 0}]
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, float]) -> None:
    """Waits and attempts are finite."""
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}.* must be|both must be"):
        RewardClient(URL, **arguments)  # type: ignore[arg-type]


async def test_images_that_are_none_are_refused_before_anything_is_sent() -> None:
    """The caller's mistake is a `ValueError`."""
    service = FakeService()
    async with RewardClient(URL, transport=service.transport) as client:
        with pytest.raises(ValueError, match="expected uint8"):
            await client.score(IMAGES.astype(np.float32))  # type: ignore[arg-type]
        for deadline_s in (0, -1, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="must be positive and finite"):
                await client.score(IMAGES, deadline_s=deadline_s)
    assert service.infos == 0
    assert not service.posts
