"""What the client sends again, after which wait, and when it gives up."""

import asyncio
import time
from collections.abc import Iterator
from email.utils import formatdate

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services import protocol
from services.client import RewardClient, RewardDeadlineExceeded, RewardUnavailable
from services.client.retry import BACKOFF_LIMIT_S, asked_wait_s, backoff_s, retry_after_s
from tests.services.conftest import random_images
from tests.services.fake_service import URL, FakeService, content, problem, scored, socket_service

pytestmark = pytest.mark.anyio

IMAGES = random_images(3, 4, 4, 3)
SCORES = [content(image_HWC) for image_HWC in IMAGES]
DATE = "Sun, 06 Nov 1994 08:49:37 GMT"


@pytest.fixture
def far_from_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose clock on the wall is nine hours ahead."""
    with monkeypatch.context() as zone:
        zone.setenv("TZ", "JST-9")
        time.tzset()
        yield
    time.tzset()


def after(*failures: httpx.Response | Exception) -> FakeService:
    """A service that fails so often, and then scores."""
    left: Iterator[httpx.Response | Exception] = iter(failures)

    def on_score(request: httpx.Request) -> httpx.Response:
        failure = next(left, None)
        if isinstance(failure, Exception):
            raise failure
        return failure or scored(request)

    return FakeService(on_score)


@pytest.mark.parametrize(
    "failure",
    [
        *(pytest.param(status, id=str(status)) for status in (408, 429, 502, 503, 504)),
        *(
            pytest.param(kind("lost"), id=kind.__name__)
            for kind in (
                httpx.ConnectError,
                httpx.ConnectTimeout,
                httpx.ReadError,
                httpx.ReadTimeout,
                httpx.WriteError,
                httpx.RemoteProtocolError,
            )
        ),
    ],
)
async def test_what_may_pass_is_sent_again_unchanged(failure: int | Exception) -> None:
    """Twice a failure, then the scores; all three requests are one, by their idempotency key."""
    failures = [failure if isinstance(failure, Exception) else problem(failure) for _ in range(2)]
    service = after(*failures)
    async with RewardClient(URL, transport=service.transport) as client:
        assert (await client.score(IMAGES)).scores.tolist() == SCORES
    assert len(service.posts) == 3
    for header in (protocol.HEADER_IDEMPOTENCY_KEY, protocol.HEADER_REQUEST_ID, "content-type"):
        assert len(set(service.headers(header))) == 1, header
    assert len({request.content for request in service.posts}) == 1


async def test_an_answer_that_breaks_off_is_asked_for_again() -> None:
    """On a real connection, that ends in the middle of the answer; the key lets the service answer from memory."""
    async with socket_service() as service, RewardClient(service.url) as client:
        service.cut_answers = 1
        assert (await client.score(IMAGES[:2])).scores.tolist() == SCORES[:2]
    assert len(service.keys) == 2
    assert len(set(service.keys)) == 1
    assert service.accepted == 2


async def test_an_answer_that_drips_in_is_given_up_and_asked_for_again() -> None:
    """On a real connection, where a byte now and then passes the timeout of each reading."""
    async with socket_service() as service, RewardClient(service.url, timeout_s=0.5) as client:
        service.dripped_answers = 1
        started_s = time.monotonic()
        assert (await client.score(IMAGES[:2], deadline_s=20)).scores.tolist() == SCORES[:2]
        assert 0.5 <= time.monotonic() - started_s < 10
    assert len(service.keys) == 2


async def test_attempts_that_drip_in_are_finite() -> None:
    """Each is a failure; the error says how long one was waited for."""
    async with socket_service() as service, RewardClient(service.url, timeout_s=0.3, attempts=2) as client:
        service.dripped_answers = 9
        with pytest.raises(RewardUnavailable, match=r"after 2 attempts \(no whole answer within 0\.3 s\)"):
            await client.score(IMAGES[:2], deadline_s=20)
    assert len(service.keys) == 2


@pytest.mark.parametrize("failure", [httpx.ConnectError("refused"), problem(502, **{"Retry-After": "0"})])
async def test_attempts_are_finite(failure: httpx.Response | Exception) -> None:
    """A service that stays away is reported with its last word; a gateway that names a time is no service."""
    service = after(*[failure] * 9)
    async with RewardClient(URL, transport=service.transport, attempts=3) as client:
        with pytest.raises(RewardUnavailable, match=r"after 3 attempts \((ConnectError: refused|502 .*)\)") as caught:
            await client.score(IMAGES)
    assert len(service.posts) == 3
    assert caught.value.status == (502 if isinstance(failure, httpx.Response) else None)


async def test_a_full_queue_does_not_use_up_the_attempts() -> None:
    """Coming back when a busy service says so is no failure; only the deadline bounds it."""
    service = after(*[problem(429, **{"Retry-After": "0"}), problem(503, **{"Retry-After": "0"})] * 3)
    async with RewardClient(URL, transport=service.transport, attempts=1) as client:
        assert (await client.score(IMAGES, deadline_s=30)).scores.tolist() == SCORES
    assert len(service.posts) == 7


@pytest.mark.parametrize(
    "headers", [{"Retry-After": "1"}, {"Retry-After": "Sun, 06 Nov 1994 08:49:38 GMT", "Date": DATE}]
)
async def test_retry_after_is_honoured(headers: dict[str, str]) -> None:
    """The second attempt comes no earlier than the service asks, in seconds or by a date."""
    service = after(problem(429, **headers))
    started_s = time.monotonic()
    async with RewardClient(URL, transport=service.transport) as client:
        await client.score(IMAGES)
    assert time.monotonic() - started_s >= 1.0


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    "headers",
    [
        {"Retry-After": "3600"},
        {"Retry-After": "9" * 400},
        {"Retry-After": "Sun, 06 Nov 1994 09:49:37 GMT", "Date": DATE},
    ],
)
async def test_a_wait_beyond_the_deadline_is_not_begun(status: int, headers: dict[str, str]) -> None:
    """The caller learns at once that the scores cannot come in time."""
    service = after(*[problem(status, **headers)] * 9)
    started_s = time.monotonic()
    async with RewardClient(URL, transport=service.transport) as client:
        with pytest.raises(RewardDeadlineExceeded, match=rf"asked again in .* deadline is in .*{status}") as caught:
            await client.score(IMAGES, deadline_s=30)
    assert time.monotonic() - started_s < 10
    assert caught.value.status == status
    assert caught.value.problem is not None
    assert caught.value.problem.detail == "because"
    assert len(service.posts) == 1


async def test_a_504_by_the_deadline_is_the_deadlines() -> None:
    """The service that gives up when it was told to is not asked again."""

    async def on_score(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(int(request.headers[protocol.HEADER_DEADLINE_MS]) / 1000 - 0.03)
        return problem(504)

    service = FakeService(on_score)
    async with RewardClient(URL, transport=service.transport) as client:
        with pytest.raises(RewardDeadlineExceeded, match="504") as caught:
            await client.score(IMAGES, deadline_s=0.3)
    assert caught.value.status == 504
    assert len(service.posts) == 1


async def test_the_deadline_bounds_a_service_that_is_silent() -> None:
    """Whatever the timeout of one answer; the message names the deadline and a remedy."""

    async def on_score(_: httpx.Request) -> httpx.Response:
        await asyncio.sleep(60)
        raise AssertionError("not cancelled")

    async with RewardClient(URL, transport=FakeService(on_score).transport, timeout_s=60) as client:
        started_s = time.monotonic()
        with pytest.raises(RewardDeadlineExceeded, match=r"deadline of 0.2 s \(no answer\): allow more time"):
            await client.score(IMAGES, deadline_s=0.2)
        assert time.monotonic() - started_s < 10


async def test_a_deadline_that_passes_says_what_went_before() -> None:
    """The last failure is why it took so long: here a 503, and then silence."""

    async def on_score(_: httpx.Request) -> httpx.Response:
        if len(service.posts) > 1:
            await asyncio.sleep(60)
        return problem(503)

    service = FakeService(on_score)
    async with RewardClient(URL, transport=service.transport) as client:
        with pytest.raises(RewardDeadlineExceeded, match=r"deadline of 1 s \(503 \(No: because\)\)") as caught:
            await client.score(IMAGES, deadline_s=1)
    assert len(service.posts) == 2
    assert caught.value.status == 503


async def test_the_deadline_bounds_the_wait_for_other_calls() -> None:
    """A call that finds all slots taken does not outwait its deadline."""
    arrived, release = asyncio.Event(), asyncio.Event()

    async def on_score(request: httpx.Request) -> httpx.Response:
        arrived.set()
        await release.wait()
        return scored(request)

    service = FakeService(on_score)
    async with RewardClient(URL, transport=service.transport, concurrency=1) as client:
        first = asyncio.create_task(client.score(IMAGES, deadline_s=60))
        await asyncio.wait_for(arrived.wait(), 30)
        with pytest.raises(RewardDeadlineExceeded, match=r"deadline of 0\.1 s"):
            await client.score(IMAGES, deadline_s=0.1)
        release.set()
        assert (await first).scores.tolist() == SCORES
    assert len(service.posts) == 1


@given(st.integers(min_value=1, max_value=10_000))
def test_backoff_is_bounded_and_jittered_also_at_its_limit(failures: int) -> None:
    """Clients that failed together do not come back together."""
    waits_s = [backoff_s(failures) for _ in range(20)]
    assert all(0 < wait_s <= BACKOFF_LIMIT_S for wait_s in waits_s)
    assert len(set(waits_s)) > 1


def test_backoff_grows() -> None:
    """Each of the first waits may be twice as long as the one before it, and none is shorter than half of its own."""
    for failures in range(1, 6):
        assert all(0.05 * 2 ** (failures - 1) <= backoff_s(failures) <= 0.1 * 2 ** (failures - 1) for _ in range(50))


@given(st.floats(min_value=0, max_value=1e6))
def test_an_asked_wait_is_never_cut_short_and_always_jittered(after_s: float) -> None:
    """No fewer seconds than asked for, and little more."""
    waits_s = [asked_wait_s(after_s) for _ in range(20)]
    assert all(max(after_s, 0.1) <= wait_s <= max(after_s, 0.1) + max(0.25, 0.25 * after_s) for wait_s in waits_s)
    assert len(set(waits_s)) > 1


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        (" 7 ", 7.0),
        ("Sun, 06 Nov 1994 08:49:47 GMT", 10.0),  # the preferred form
        ("Sunday, 06-Nov-94 08:49:47 GMT", 10.0),  # RFC 850
        ("Sun Nov  6 08:49:47 1994", 10.0),  # asctime
        ("Sun, 06 Nov 1994 08:00:00 GMT", 0.0),  # is over
        ("", None),
        ("soon", None),
        ("-1", None),
        ("1.5", None),
        ("٣", None),
        ("Sun, 99 Nov 1994 08:49:47 GMT", None),
    ],
)
def test_retry_after_is_read_as_the_standard_says(text: str, seconds: float | None, far_from_utc: None) -> None:
    """Whole seconds or a date of RFC 9110, counted from the answer's own date; anything else is none."""
    assert retry_after_s({protocol.HEADER_RETRY_AFTER: text, "Date": DATE}) == seconds


def test_a_date_without_the_answers_own_counts_from_this_clock() -> None:
    """A proxy may leave Date out."""
    text = formatdate(time.time() + 100, usegmt=True)
    assert retry_after_s({protocol.HEADER_RETRY_AFTER: text}) == pytest.approx(99.5, abs=5)
    assert retry_after_s({}) is None
