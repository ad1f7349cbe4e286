"""Decoding on threads: nobody waits beyond a deadline, and what a thread still uses belongs to its request alone."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from services import protocol
from services.batching.errors import DeadlinePassed
from services.batching.shared import is_supported
from services.http import bodies
from services.images import Batch, decode_file, encode_batch, encode_png
from services.protocol import Limits
from tests.services.conftest import random_images, wait_until_async
from tests.services.serving import IMAGES, SAFETENSORS, SETTINGS, FakeQueue, assert_problem, serving

pytestmark = pytest.mark.anyio

PNG = {"Content-Type": protocol.MEDIA_PICTURES[0]}
PICTURE = encode_png(IMAGES[0])
SOON = {protocol.HEADER_DEADLINE_MS: "300"}


class Slow:
    """A step of decoding that begins, and goes on when it is let go."""

    def __init__(self, step: Any) -> None:
        self._step = step
        self.begun = self.ended = 0
        self.lets_go = threading.Event()

    def __call__(self, *arguments: Any) -> Any:
        self.begun += 1
        assert self.lets_go.wait(10)
        result = self._step(*arguments)
        self.ended += 1
        return result


@pytest.fixture
def slow_picture(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    """Every body of one picture is slow to decode."""
    slow = Slow(decode_file)
    monkeypatch.setattr(bodies, "decode_file", slow)
    yield slow
    slow.lets_go.set()


async def score(client: httpx.AsyncClient, **headers: str) -> httpx.Response:
    return await client.post("/score", content=PICTURE, headers={**PNG, **headers})


async def test_the_deadline_ends_the_wait_for_a_picture(slow_picture: Slow) -> None:
    """In the seconds that the client gave, and without a job that nobody waits for."""
    queue = FakeQueue()
    async with serving(queue) as client:
        answer = await score(client, **SOON)
        assert_problem(answer, 504, "deadline of 0.3 s", "not decoded", "allow more time")
        slow_picture.lets_go.set()
        assert (await score(client)).status_code == 200
    assert len(queue.deadlines_s) == 1


async def test_what_nobody_waits_for_is_not_begun(slow_picture: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose time was over before its turn came."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    async with serving(FakeQueue()) as client:
        first = asyncio.create_task(score(client))
        await wait_until_async(begun(slow_picture))
        assert_problem(await score(client, **SOON), 504)
        slow_picture.lets_go.set()
        assert (await first).status_code == 200
        assert (await score(client)).status_code == 200
    assert slow_picture.begun == 2


async def test_a_client_that_leaves_ends_the_wait_for_its_picture(slow_picture: Slow) -> None:
    """Its deadline is two minutes; it is noticed as fast as when its images are in the queue."""
    queue, sent = FakeQueue(), []
    incoming = iter([{"type": "http.request", "body": PICTURE}])

    async def receive() -> dict[str, Any]:
        return next(incoming, {"type": "http.disconnect"})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"content-type", b"image/png")]
    scope = {"type": "http", "method": "POST", "path": "/score", "query_string": b"", "headers": headers}
    async with serving(queue) as client, asyncio.timeout(5):
        await client._transport.app(scope, receive, send)  # type: ignore[attr-defined]
    assert sent[0]["status"] == 499
    assert queue.deadlines_s == []


async def test_a_thread_that_goes_on_keeps_its_part_of_the_memory(slow_picture: Slow) -> None:
    """Its request is answered, and what it holds counts until it has ended."""
    tight = SETTINGS.model_copy(update={"max_body_bytes": len(PICTURE), "queue_bytes": len(PICTURE)})
    async with serving(FakeQueue(), tight) as client:
        assert_problem(await score(client, **SOON), 504)
        assert_problem(await score(client), 429, "bytes are in work")
        slow_picture.lets_go.set()

        async def has_room() -> bool:
            return (await score(client)).status_code == 200

        await wait_until_async(has_room)


@pytest.mark.skipif(not is_supported(), reason="needs memfd_create and /proc")
async def test_a_thread_that_goes_on_keeps_its_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The images of the next request are laid elsewhere, else it would read or overwrite them."""
    digests: list[str] = []

    def digest_of(batch: Batch) -> str:
        digests.append(real(batch))
        return digests[-1]

    real, slow = bodies.digest_of, Slow(digest_of)
    monkeypatch.setattr(bodies, "digest_of", slow)
    later_BHWC = random_images(*IMAGES.shape, seed=9)
    shared = SETTINGS.model_copy(update={"shared_memory": True})
    try:
        async with serving(FakeQueue(), shared) as client:
            keyed = {**SAFETENSORS, **SOON, protocol.HEADER_IDEMPOTENCY_KEY: "k"}
            assert_problem(await client.post("/score", content=encode_batch(IMAGES), headers=keyed), 504)
            answer = await client.post("/score", content=encode_batch(later_BHWC), headers=SAFETENSORS)
            assert answer.status_code == 200
            slow.lets_go.set()
            await wait_until_async(begun(slow, ended=1))
    finally:
        slow.lets_go.set()
    assert digests == [real(bodies.decode_batch(encode_batch(IMAGES), Limits()))]


async def test_a_deadline_that_the_queue_saw_pass_is_the_clients() -> None:
    """The queue knows what was left when it got the images; the client hears of what it gave."""
    queue = FakeQueue()
    queue.error = DeadlinePassed("no reply in the 0.9 s until the deadline: allow more time")
    async with serving(queue) as client:
        answer = await score(client, **{protocol.HEADER_DEADLINE_MS: "1500"})
    assert_problem(
        answer, 504, "within the deadline of 1.5 s: no reply in the 0.9 s until the deadline: allow more time"
    )


def begun(slow: Slow, *, ended: int = 0) -> Any:
    async def has_begun() -> bool:
        return slow.begun > 0 and slow.ended >= ended

    return has_begun
