"""How the client sends a batch: in pieces within the service's limits, a few at once, scored by one model."""

import asyncio
from collections.abc import Awaitable, Callable

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services import protocol
from services.client import RewardAnswerInvalid, RewardClient, RewardRefused
from services.client.bodies import ENCODERS, images_at_once
from services.images import decode_batch
from tests.services.conftest import random_images
from tests.services.fake_service import (
    URL,
    FakeService,
    batch_of,
    content,
    info,
    problem,
    scored,
    socket_service,
)

pytestmark = pytest.mark.anyio

IMAGES = random_images(10, 4, 4, 3)
SCORES = [content(image_HWC) for image_HWC in IMAGES]
MEDIA = st.sampled_from([protocol.MEDIA_SAFETENSORS, protocol.MEDIA_JSON])
PROMPT = st.text(st.characters(codec="utf-8"), max_size=100)


def limited(service: FakeService) -> Callable[[httpx.Request], httpx.Response]:
    """Scores what keeps the limits that the service tells, in a body that it accepts; refuses the rest."""

    def on_score(request: httpx.Request) -> httpx.Response:
        media = request.headers["content-type"]
        if media not in service.told.bodies:
            return problem(415)
        if len(batch_of(request).images_HWC) > service.told.limits.max_images:
            return problem(413)
        return scored(request, version=service.told.version)

    return on_score


def starts(service: FakeService) -> list[int]:
    """Where each piece began, by its request id, in order of arrival."""
    return [int(request_id.rpartition("-")[2]) for request_id in service.headers(protocol.HEADER_REQUEST_ID)]


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 40),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    max_images=st.integers(1, 50),
    max_body_bytes=st.integers(1025, 20_000),
    media=MEDIA,
    concurrency=st.integers(1, 5),
    data=st.data(),
)
def test_pieces_keep_the_limits_and_scores_their_order(
    count: int,
    size: tuple[int, int],
    max_images: int,
    max_body_bytes: int,
    media: str,
    concurrency: int,
    data: st.DataObject,
) -> None:
    """Whatever the batch and the limits: each image once, with its own score and prompt, in the order it was given."""
    images_BHWC = random_images(count, *size, 3, seed=count)
    prompts = data.draw(st.none() | st.lists(PROMPT, min_size=count, max_size=count))
    service = FakeService(told=info(bodies=[media], max_images=max_images, max_body_bytes=max_body_bytes))

    async def late(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0.0005 * (len(service.posts) % 3))
        return scored(request)

    service.on_score = late

    async def run() -> list[float]:
        async with RewardClient(URL, transport=service.transport, concurrency=concurrency) as client:
            scores: list[float] = (await client.score(images_BHWC, prompts)).scores.tolist()
            return scores

    assert asyncio.run(run()) == [content(image_HWC) for image_HWC in images_BHWC]
    batches = [batch_of(request) for request in service.posts]
    sent = [len(batch.images_HWC) for batch in batches]
    assert sum(sent) == count
    in_order = sorted(zip(starts(service), batches, strict=True), key=lambda pair: pair[0])
    assert [prompt for _, batch in in_order for prompt in batch.prompts or ()] == (prompts or [])
    for images, request in zip(sent, service.posts, strict=True):
        assert images <= max_images
        assert images == 1 or len(request.content) <= max_body_bytes
    assert len(set(service.headers(protocol.HEADER_IDEMPOTENCY_KEY))) == len(sent)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 20),
    size=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    noise=st.booleans(),
    media=MEDIA,
    prompt=st.none() | PROMPT | st.just('\U0001f5bc"\\\0' * 25),
    max_body_bytes=st.integers(1025, 400_000),
)
def test_a_body_is_no_larger_than_reckoned(
    count: int, size: tuple[int, int], noise: bool, media: str, prompt: str | None, max_body_bytes: int
) -> None:
    """Also of noise, which PNG makes larger, and of prompts that are all escapes."""
    images_BHWC = random_images(count, *size, 3) if noise else np.full((count, *size, 3), 7, np.uint8)
    prompts = None if prompt is None else [prompt] * count
    told = info(max_images=1000, max_body_bytes=max_body_bytes)
    step = images_at_once(told, media, images_BHWC, prompts)
    body = ENCODERS[media](images_BHWC[:step], prompts and prompts[:step])
    assert step == 1 or len(body) <= max_body_bytes


def test_as_many_images_go_at_once_as_the_limit_allows() -> None:
    """A body of safetensors is filled to within one image of the limit, less the room for its header."""
    images_BHWC = random_images(100, 8, 8, 3)
    told = info(max_images=1000, max_body_bytes=10 * 192 + 1024)
    assert images_at_once(told, protocol.MEDIA_SAFETENSORS, images_BHWC, None) == 10
    assert images_at_once(info(max_images=7), protocol.MEDIA_SAFETENSORS, images_BHWC, None) == 7


def test_prompts_keep_the_limit_of_the_header() -> None:
    """Very many long prompts would outgrow the header of safetensors before the body."""
    images_BHWC, prompts = random_images(20_000, 1, 1, 3), ["x" * 1000] * 20_000
    told = info(max_images=10**6, max_body_bytes=10**9, max_prompt_chars=1000)
    step = images_at_once(told, protocol.MEDIA_SAFETENSORS, images_BHWC, prompts)
    body = ENCODERS[protocol.MEDIA_SAFETENSORS](images_BHWC[:step], prompts[:step])
    assert len(decode_batch(body, told.limits).images_HWC) == step
    assert 1000 < step < 20_000


async def test_every_piece_and_every_call_has_a_key_of_its_own() -> None:
    """Else a service would answer one with the scores of another."""
    service = FakeService(told=info(max_images=4))
    async with RewardClient(URL, transport=service.transport) as client:
        for _ in range(2):
            assert (await client.score(IMAGES)).scores.tolist() == SCORES
    assert len(set(service.headers(protocol.HEADER_IDEMPOTENCY_KEY))) == len(service.posts) == 6


async def test_an_error_of_one_piece_is_raised_as_itself_with_the_place_in_the_batch() -> None:
    """Not as a group of errors, and the index counts in the caller's batch."""
    service = FakeService(told=info(max_images=4))
    service.on_score = lambda request: problem(422, index=1) if starts(service)[-1] == 8 else scored(request)
    async with RewardClient(URL, transport=service.transport, concurrency=1) as client:
        with pytest.raises(RewardRefused, match="image 9 of the batch") as caught:
            await client.score(IMAGES)
    assert caught.value.index == 9
    assert caught.value.problem.index == 1


async def test_the_first_error_stops_the_other_pieces() -> None:
    """What nobody waits for is not sent."""
    service = FakeService(lambda _: problem(500), told=info(max_images=1))
    async with RewardClient(URL, transport=service.transport, concurrency=1) as client:
        with pytest.raises(RewardRefused, match="500"):
            await client.score(IMAGES)
    assert len(service.posts) == 1


async def test_requests_in_flight_are_bounded_over_all_calls() -> None:
    """No more than `concurrency`, and as many."""
    flying, most = 0, 0

    async def on_score(request: httpx.Request) -> httpx.Response:
        nonlocal flying, most
        flying += 1
        most = max(most, flying)
        await asyncio.sleep(0.01)
        flying -= 1
        return scored(request)

    service = FakeService(on_score, told=info(max_images=1))
    async with RewardClient(URL, transport=service.transport, concurrency=3) as client:
        results = await asyncio.gather(*(client.score(IMAGES) for _ in range(3)))
    assert all(result.scores.tolist() == SCORES for result in results)
    assert most == 3
    assert service.infos == 1, "callers that begin together ask once"


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_connections_are_used_again(concurrency: int) -> None:
    """A real service accepts one connection for each request in flight, however many follow one another."""
    async with socket_service() as service, RewardClient(service.url, concurrency=concurrency) as client:
        for _ in range(4):
            assert (await client.score(IMAGES)).scores.tolist() == SCORES
        assert len(service.keys) == 20
        assert service.accepted == concurrency


async def test_the_services_limits_are_asked_once() -> None:
    """`/info` is kept for the calls that follow."""
    service = FakeService()
    async with RewardClient(URL, transport=service.transport) as client:
        for _ in range(3):
            await client.score(IMAGES)
    assert service.infos == 1


@pytest.mark.parametrize(
    "told", [info(version="2", max_images=3), info(bodies=[protocol.MEDIA_JSON])], ids=["limits", "bodies"]
)
async def test_a_service_restarted_with_other_terms_is_asked_for_them(told: protocol.Info) -> None:
    """413 or 415 after a restart: all of the batch is sent anew, as the service now wants it."""
    service = FakeService(told=info(max_images=5))
    service.on_score = limited(service)
    async with RewardClient(URL, transport=service.transport) as client:
        await client.score(IMAGES)
        service.told = told
        result = await client.score(IMAGES)
        assert result.scores.tolist() == SCORES
        assert result.version == told.version
        before = len(service.posts)
        await client.score(IMAGES)
    assert service.infos == 2
    assert all(request.headers["content-type"] == told.bodies[0] for request in service.posts[before:])


@pytest.mark.parametrize("status", [413, 415])
async def test_a_refusal_stands_where_the_terms_are_the_same(status: int) -> None:
    """Asked once more for its limits, not for scores."""
    service = FakeService(lambda _: problem(status))
    async with RewardClient(URL, transport=service.transport) as client:
        with pytest.raises(RewardRefused, match=str(status)):
            await client.score(IMAGES)
    assert service.infos == 2
    assert len(service.posts) == 1


async def test_a_refusal_of_the_new_terms_stands() -> None:
    """A service that tells other limits each time is not followed for ever."""
    service = FakeService()

    def on_score(_: httpx.Request) -> httpx.Response:
        service.told = info(max_images=service.told.limits.max_images - 1)
        return problem(413)

    service.on_score = on_score
    async with RewardClient(URL, transport=service.transport) as client:
        with pytest.raises(RewardRefused, match="413"):
            await client.score(IMAGES)
    assert service.infos == 2
    assert len(service.posts) == 2


def versions(*given: str) -> Callable[[httpx.Request], httpx.Response | Awaitable[httpx.Response]]:
    """Answer in turn by these versions, and by the last of them from then on."""
    left = list(given)
    return lambda request: scored(request, version=left.pop(0) if len(left) > 1 else left[0])


async def test_a_batch_that_meets_an_upgrade_is_scored_again_as_a_whole() -> None:
    """No result mixes two models; the second round has keys of its own and the limits of the new version."""
    service = FakeService(versions("1", "2"), told=info(max_images=5))
    async with RewardClient(URL, transport=service.transport, concurrency=1) as client:
        result = await client.score(IMAGES)
    assert result.scores.tolist() == SCORES
    assert result.version == "2"
    assert starts(service) == [0, 5, 0, 5]
    assert len(set(service.headers(protocol.HEADER_IDEMPOTENCY_KEY))) == 4
    assert service.infos == 2


async def test_versions_that_stay_mixed_are_refused() -> None:
    """One answer, one model: the second mixture is an error that names both."""
    service = FakeService(versions("1", "2", "1", "2"), told=info(max_images=5))
    async with RewardClient(URL, transport=service.transport, concurrency=1) as client:
        with pytest.raises(RewardAnswerInvalid, match="mixed the models fake 1, fake 2"):
            await client.score(IMAGES)
    assert len(service.posts) == 4
