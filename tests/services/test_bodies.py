"""Uploads and forms: what arrives is bounded in size, in time and in memory, and means the same in any body."""

import asyncio
import contextlib
import itertools
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterable, Sequence

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services import protocol
from services.http.bodies import digest_of
from services.http.multipart import decode_multipart
from services.images import (
    Batch,
    BodyError,
    BodyMalformed,
    BodyTooLarge,
    ItemInvalid,
    decode_batch,
    decode_json,
    encode_batch,
    encode_json,
    encode_png,
)
from services.protocol import Limits
from services.rewards.brightness import Brightness
from tests.services.conftest import random_images
from tests.services.serving import IMAGES, SAFETENSORS, SETTINGS, FakeQueue, assert_problem, serving

LIMITS = Limits(max_images=4, max_body_bytes=100_000, max_pixels=64 * 64, max_prompt_chars=50)
BOUNDARY = "frontier"
FORM = {"boundary": BOUNDARY}
BODY = encode_batch(IMAGES)
A, B = (encode_png(image_HWC) for image_HWC in IMAGES[:2])


def announced(size: int) -> dict[str, str]:
    """The headers of a safetensors body of so many bytes."""
    return {**SAFETENSORS, "Content-Length": str(size)}


async def pieces(body: bytes, size: int, pause_s: float = 0.0) -> AsyncIterator[bytes]:
    """A body in pieces, with a pause before each."""
    for start in range(0, len(body), size):
        await asyncio.sleep(pause_s)
        yield body[start : start + size]


class Stalling:
    """A body that sends its first bytes and then waits to be told to go on."""

    def __init__(self, body: bytes, first: int) -> None:
        self._body = body
        self._first = first
        self.waits = asyncio.Event()
        self.goes_on = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self._first:
            yield self._body[: self._first]
        self.waits.set()
        await self.goes_on.wait()
        yield self._body[self._first :]


def part(disposition: str, content: bytes, *more: str) -> bytes:
    """One part of a form, with the delimiter before it."""
    headers = "\r\n".join([f"Content-Disposition: form-data; {disposition}", *more])
    return f"--{BOUNDARY}\r\n{headers}\r\n\r\n".encode() + content + b"\r\n"


def image_part(content: bytes, *more: str) -> bytes:
    return part('name="images"; filename="a.png"', content, "Content-Type: image/png", *more)


def prompt_part(text: bytes) -> bytes:
    return part('name="prompts"', text)


def form(*parts: bytes) -> bytes:
    """A whole form."""
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def decode_form(body: bytes, limits: Limits = LIMITS) -> Batch:
    return decode_multipart(bytearray(body), limits, FORM)


@pytest.mark.anyio
async def test_who_announces_much_and_sends_nothing_takes_no_room() -> None:
    """Ten uploads that announce 64 MiB each cost next to no memory and leave the bound to others."""
    size = 64 * 2**20
    generous = SETTINGS.model_copy(update={"max_body_bytes": size, "queue_bytes": size})
    silent = [Stalling(b"", 0) for _ in range(10)]
    async with serving(FakeQueue(), generous) as client:
        tracemalloc.start()
        try:
            tasks = [
                asyncio.create_task(client.post("/score", content=body, headers=announced(size))) for body in silent
            ]
            await asyncio.gather(*(body.waits.wait() for body in silent))
            answer = await client.post("/score", content=BODY, headers=SAFETENSORS)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert answer.status_code == 200
        assert peak < 8 * 2**20
        for body in silent:
            body.goes_on.set()
        for answer in await asyncio.gather(*tasks):
            assert_problem(answer, 400, f"0 bytes of a Content-Length of {size}")


@pytest.mark.anyio
async def test_what_has_arrived_is_booked_until_it_is_answered() -> None:
    """With 250 of 400 bytes here a second body is refused, by what it announces and by what it sends; then there is
    room again."""
    tight = SETTINGS.model_copy(update={"queue_bytes": 400, "max_body_bytes": 400})
    first = Stalling(BODY, 250)
    async with serving(FakeQueue(), tight) as client:
        upload = asyncio.create_task(client.post("/score", content=first, headers=announced(len(BODY))))
        await first.waits.wait()
        answer = await client.post("/score", content=BODY, headers=SAFETENSORS)
        assert_problem(answer, 429, "250 bytes are in work", "limit of 400", "later")
        assert answer.headers["retry-after"] == "7"
        assert_problem(await client.post("/score", content=pieces(BODY, 60), headers=SAFETENSORS), 429, "limit of 400")
        first.goes_on.set()
        assert (await upload).status_code == 200
        assert (await client.post("/score", content=BODY, headers=SAFETENSORS)).status_code == 200


@pytest.mark.anyio
async def test_decoded_pixels_are_booked_too() -> None:
    """Small files of large pictures are refused while another request holds the room."""
    queue = FakeQueue()
    queue.hold = True
    tight = SETTINGS.model_copy(update={"max_body_bytes": 16_000, "max_pixels": 1024, "queue_bytes": 16_000})
    flat = np.zeros((4, 32, 32, 3), np.uint8)
    files = [("images", ("a.png", encode_png(image_HWC), "image/png")) for image_HWC in flat]
    async with serving(queue, tight) as client:
        held = asyncio.create_task(client.post("/score", content=encode_batch(flat), headers=SAFETENSORS))
        await queue.started.wait()
        answer = await client.post("/score", files=files)
        sent = int(answer.request.headers["content-length"])
        assert sent + len(encode_batch(flat)) < 16_000
        assert_problem(answer, 429, f"{flat.nbytes - sent} more exceed the limit of 16000")
        held.cancel()
        await asyncio.wait([held])


@pytest.mark.anyio
@pytest.mark.parametrize("first", [0, 100])
async def test_a_silent_upload_is_ended(first: int) -> None:
    """408 after `upload_stall_s`, long before the deadline, and the connection with it; its room is given back."""
    impatient = SETTINGS.model_copy(update={"upload_stall_s": 0.05, "queue_bytes": 400, "max_body_bytes": 400})
    body = Stalling(BODY, first)
    async with serving(FakeQueue(), impatient) as client:
        answer = await client.post("/score", content=body, headers=announced(len(BODY)))
        assert_problem(answer, 408, "0.05 s", f"after {first} bytes", "without pauses")
        assert answer.headers["connection"] == "close"
        assert (await client.post("/score", content=BODY, headers=SAFETENSORS)).status_code == 200


@pytest.mark.anyio
async def test_a_slow_upload_that_never_pauses_long_is_read() -> None:
    """What counts is the longest silence, not the time of the whole upload."""
    impatient = SETTINGS.model_copy(update={"upload_stall_s": 0.4})
    started_s = time.monotonic()
    async with serving(FakeQueue(), impatient) as client:
        answer = await client.post("/score", content=pieces(BODY, 10, pause_s=0.03), headers=announced(len(BODY)))
    assert answer.status_code == 200
    assert time.monotonic() - started_s > impatient.upload_stall_s


@pytest.mark.anyio
async def test_an_upload_that_drips_is_ended_by_its_deadline() -> None:
    """No pause is long, but all together are."""
    headers = {**announced(len(BODY)), protocol.HEADER_DEADLINE_MS: "200"}
    started_s = time.monotonic()
    async with serving(FakeQueue()) as client:
        answer = await client.post("/score", content=pieces(BODY, 1, pause_s=0.02), headers=headers)
    assert_problem(answer, 504, "deadline of 0.2 s", "allow more time")
    assert time.monotonic() - started_s < 0.02 * len(BODY)


@pytest.mark.anyio
async def test_a_body_that_comes_byte_by_byte_is_read_and_holds_up_nobody() -> None:
    """60 000 pieces of one byte are scored, and the event loop is free all the while."""
    images_BHWC = random_images(4, 70, 71, 3)
    wide = SETTINGS.model_copy(update={"max_body_bytes": 100_000, "max_pixels": 5000})
    gaps: list[float] = []

    async def tick() -> None:
        while True:
            started_s = time.monotonic()
            await asyncio.sleep(0.001)
            gaps.append(time.monotonic() - started_s)

    async with serving(FakeQueue(), wide) as client:
        ticking = asyncio.create_task(tick())
        body = encode_batch(images_BHWC)
        answer = await client.post("/score", content=pieces(body, 1), headers=announced(len(body)))
        ticking.cancel()
    assert answer.json()["scores"] == Brightness().score(images_BHWC, None).tolist()
    assert len(gaps) > 100
    assert max(gaps) < 1.0


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("body", "size", "words"),
    [(BODY, len(BODY) - 1, "exceeds its Content-Length"), (BODY, len(BODY) + 1, f"{len(BODY)} bytes of a Content")],
)
async def test_a_body_is_as_long_as_it_says(body: bytes, size: int, words: str) -> None:
    """Neither longer nor shorter."""
    async with serving(FakeQueue()) as client:
        assert_problem(await client.post("/score", content=pieces(body, 50), headers=announced(size)), 400, words)


@pytest.mark.anyio
@pytest.mark.parametrize("kinds", list(itertools.permutations(["images", "images", "prompts", "prompts"]))[::5])
async def test_a_form_gives_the_scores_of_its_files_in_order(kinds: Sequence[str]) -> None:
    """Files and prompts each count in the order of their parts, however they are mixed."""
    texts, files = iter("ab"), iter([A, B])
    parts: list[bytes] = [
        image_part(next(files)) if kind == "images" else prompt_part(next(texts).encode()) for kind in kinds
    ]
    async with serving(FakeQueue()) as client:
        headers = {"Content-Type": f"{protocol.MEDIA_MULTIPART}; boundary={BOUNDARY}"}
        answer = await client.post("/score", content=form(*parts), headers=headers)
    assert answer.json()["scores"] == Brightness().score(IMAGES[:2], None).tolist()
    assert decode_form(form(*parts)).prompts == ["a", "b"]


@pytest.mark.anyio
async def test_what_a_common_client_sends_is_read() -> None:
    """httpx's own form, with a quoted boundary, upper-case media type and names outside ASCII."""
    files = [("images", (f"bild-ä{number}.png", data, "image/png")) for number, data in enumerate([A, B])]
    async with serving(FakeQueue()) as client:
        request = client.build_request("POST", "/score", files=files, data={"prompts": ["ü", "two\r\nlines"]})
        boundary = request.headers["content-type"].partition("boundary=")[2]
        body = bytearray(await request.aread())
        request.headers["content-type"] = f'Multipart/Form-Data; charset=utf-8; boundary="{boundary}"'
        answer = await client.send(request)
        assert answer.json()["scores"] == Brightness().score(IMAGES[:2], None).tolist()
    batch = decode_multipart(body, LIMITS, {"boundary": boundary})
    assert batch.prompts == ["ü", "two\r\nlines"]


@pytest.mark.anyio
@pytest.mark.parametrize("media", protocol.MEDIA_PICTURES)
async def test_one_file_is_a_body_by_itself(media: str) -> None:
    """What `curl --data-binary @a.png` sends; which of the three the file is, it says itself."""
    async with serving(FakeQueue()) as client:
        answer = await client.post("/score", content=A, headers={"Content-Type": media})
        assert answer.json()["scores"] == Brightness().score(IMAGES[:1], None).tolist()
        for wrong in (b"", A[:-20], b"no picture"):
            answer = await client.post("/score", content=wrong, headers={"Content-Type": media})
            assert (answer.status_code, answer.json()["index"]) == (422, 0)


@settings(deadline=None)
@given(data=st.data())
def test_a_form_round_trips(data: st.DataObject) -> None:
    """Pixels and prompts survive, whatever the texts hold."""
    count = data.draw(st.integers(1, 4))
    images_BHWC = random_images(count, 3, 5, 3, seed=data.draw(st.integers(0, 99)))
    texts = st.text(max_size=20).filter(lambda text: f"\r\n--{BOUNDARY}" not in f"\r\n{text}")
    prompts = data.draw(st.just([]) | st.lists(texts, min_size=count, max_size=count))
    batch = decode_form(
        form(*map(image_part, map(encode_png, images_BHWC)), *(prompt_part(p.encode()) for p in prompts))
    )
    assert np.array_equal(np.stack(list(batch.images_HWC)), images_BHWC)
    assert batch.prompts == (prompts or None)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_mutated_form_is_refused_or_read_but_never_crashes(data: st.DataObject) -> None:
    """Whatever the bytes, the only error is a `BodyError`."""
    whole = bytearray(form(image_part(A), image_part(B), prompt_part(b"a"), prompt_part(b"b")))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    body = whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole
    try:
        batch = decode_multipart(body, LIMITS, FORM)
    except BodyError:
        return
    assert all(image.dtype == np.uint8 and image.ndim == 3 for image in batch.images_HWC)


def test_every_prefix_of_a_form_is_refused() -> None:
    """A form counts when its last boundary is there."""
    whole = form(image_part(A), prompt_part(b"a"))
    for end in range(len(whole) - len("\r\n")):
        with pytest.raises(BodyMalformed):
            decode_form(whole[:end])
    assert decode_form(whole).prompts == ["a"]


@pytest.mark.parametrize(
    ("body", "error", "words"),
    [
        pytest.param(b"", BodyMalformed, "before its last boundary", id="empty"),
        pytest.param(b"no form", BodyMalformed, "cannot be read", id="junk"),
        pytest.param(form(), BodyMalformed, "no file named 'images'", id="no part"),
        pytest.param(form(prompt_part(b"a")), BodyMalformed, "no file named 'images'", id="no file"),
        pytest.param(form(part('name="images"', A)), BodyMalformed, "part 0 .* text named 'images'", id="no filename"),
        pytest.param(
            form(image_part(A), part('name="prompts"; filename="p"', b"a")), BodyMalformed, "part 1 .*a file", id="file"
        ),
        pytest.param(form(part('name="image"; filename="a"', A)), BodyMalformed, "'image': send files", id="name"),
        pytest.param(form(part("filename=a.png", A)), BodyMalformed, "a file named ''", id="no name"),
        pytest.param(
            form(image_part(A), prompt_part(b"a"), prompt_part(b"b")), BodyMalformed, "2 prompts for 1", id="two"
        ),
        pytest.param(form(image_part(A), prompt_part(b"\xff")), BodyMalformed, "prompt 0 is not UTF-8", id="UTF-8"),
        pytest.param(
            form(image_part(A, "Content-Transfer-Encoding: base64")), BodyMalformed, "Transfer-Encoding", id="base64"
        ),
        pytest.param(form(*[image_part(A)] * 5), BodyTooLarge, "5 images in one request, limit 4", id="many"),
        pytest.param(form(*[prompt_part(b"a")] * 9), BodyTooLarge, "more than 8 parts", id="parts"),
        pytest.param(form(image_part(A, *["X: y"] * 9)), BodyMalformed, "header count", id="headers"),
        pytest.param(form(image_part(A, "X: " + "y" * 3000)), BodyMalformed, "header size", id="long header"),
        pytest.param(form(image_part(A, "X" * 3000 + ": y")), BodyMalformed, "header size", id="long name"),
        pytest.param(form(image_part(A), image_part(A[:60])), ItemInvalid, "image 1", id="cut off"),
        pytest.param(form(image_part(A), image_part(b"")), ItemInvalid, "image 1", id="empty file"),
        pytest.param(form(image_part(A), prompt_part(b"a" * 51)), ItemInvalid, "51 characters, limit 50", id="prompt"),
    ],
)
def test_a_bad_form_is_refused_in_words(body: bytes, error: type[BodyError], words: str) -> None:
    """The message says what is wrong and what to send."""
    with pytest.raises(error, match=words):
        decode_form(body)


@pytest.mark.parametrize("boundary", ["", "b" * 71, "ü"])
@pytest.mark.anyio
async def test_a_form_needs_a_boundary(boundary: str) -> None:
    """Of 1 to 70 ASCII characters."""
    async with serving(FakeQueue()) as client:
        media = f"{protocol.MEDIA_MULTIPART}; boundary={boundary}".encode("latin-1")
        headers = httpx.Headers([(b"Content-Type", media)])
        assert_problem(await client.post("/score", content=form(image_part(A)), headers=headers), 400, "1 to 70")


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"\r\n" * 500_000, id="line ends"),
        pytest.param(image_part(b"\r\n--frontie" * 90_000), id="almost boundaries"),
        pytest.param(image_part(b"\r\n--frontierX" * 80_000), id="boundaries that go on"),
        pytest.param(form(image_part(A)) + b"x" * 1_000_000, id="after the end"),
        pytest.param(f"--{BOUNDARY}\r\n".encode() + b"x" * 1_000_000, id="header"),
        pytest.param(f"--{BOUNDARY}\r\n".encode() + b"x: y\r\n" * 150_000, id="headers"),
    ],
)
def test_no_form_of_a_megabyte_takes_long(body: bytes) -> None:
    """The time of a hostile form is bounded like that of any other."""
    started_s = time.process_time()
    with contextlib.suppress(BodyError):
        decode_form(body, LIMITS.model_copy(update={"max_body_bytes": 2**21}))
    assert time.process_time() - started_s < 2.0


def test_the_same_pictures_have_the_same_digest_in_any_body() -> None:
    """An idempotency key stands for pictures and prompts, not for the bytes that carry them."""
    prompts = ["a", "b", "ü"]
    parts = [image_part(encode_png(image_HWC)) for image_HWC in IMAGES]
    texts = [prompt_part(prompt.encode()) for prompt in prompts]
    batches = [
        decode_batch(encode_batch(IMAGES, prompts), LIMITS),
        decode_json(encode_json(IMAGES, prompts), LIMITS),
        decode_form(form(*parts, *texts)),
    ]
    (digest,) = {digest_of(batch) for batch in batches}
    assert len(digest) == 64
    others: Iterable[Batch] = [
        Batch(list(IMAGES), None),
        Batch(list(IMAGES), ["a", "b", "x"]),
        Batch(list(IMAGES), ["ab", "", "ü"]),
        Batch(list(IMAGES[::-1]), prompts),
        Batch([IMAGES[0], IMAGES[1], IMAGES[2] ^ 1], prompts),
        Batch(list(IMAGES.reshape(3, 5, 4, 3)), prompts),
        Batch([IMAGES.reshape(12, 5, 3)], prompts),
    ]
    digests = [digest_of(batch) for batch in others]
    assert len({digest, *digests}) == 1 + len(digests)
