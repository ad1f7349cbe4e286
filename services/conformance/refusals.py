"""The checks of refusals: limits that are kept, bodies that are none, and the form of every error."""

import json
import struct

import numpy as np

from services import protocol
from services.conformance.kit import check
from services.conformance.pictures import FILE_MEDIA, KNOWN_MEDIA, Body, encode, encode_files, large_picture
from services.conformance.probe import Answer, Breach, NoAnswer, NotJudged, Probe
from services.images import HEADER_LENGTH, encode_png

REFUSED = (400, 413, 415, 422)
"""What a body that is none may be answered with."""
MOST_IMAGES = 4096
MOST_PIXELS = 2**26
MOST_BYTES = 2**27
MOST_CHARS = 10**6
"""Limits beyond these are not tried: the request itself would be a burden."""
NO_PICTURE = b"this is no picture"
NESTING = 50_000


@check()
async def unknown_path(probe: Probe) -> str:
    """MUST: a path that is not served is 404."""
    (await probe.get("/no-such-path")).expect(404)
    return "404"


@check()
async def method(probe: Probe) -> str:
    """SHOULD: GET /score is 405."""
    (await probe.get(protocol.SCORE_PATH)).expect(405)
    return "405"


@check("info")
async def max_images(probe: Probe) -> str:
    """MUST: one image more than `max_images` is 413."""
    limit = probe.info.limits.max_images
    if limit > MOST_IMAGES:
        raise NotJudged(f"the limit is {limit}, tried up to {MOST_IMAGES}")
    dots_HWC = [np.zeros((1, 1, 3), np.uint8)] * (limit + 1)
    texts = [""] * (limit + 1) if probe.info.uses_prompts else None
    (await probe.post(encode(probe.media, dots_HWC, texts), f"{limit + 1} images, limit {limit}")).expect(413)
    return f"413 for {limit + 1}"


@check("info")
async def max_pixels(probe: Probe) -> str:
    """MUST: an image of more pixels than `max_pixels` is 413 or 422."""
    limit = probe.info.limits.max_pixels
    if limit > MOST_PIXELS:
        raise NotJudged(f"the limit is {limit}, tried up to {MOST_PIXELS}")
    texts = probe.prompts[:1] if probe.info.uses_prompts else None
    if probe.media in FILE_MEDIA:
        body = encode_files(probe.media, [large_picture(limit)], texts)
    else:
        body = encode(probe.media, [np.zeros((1, limit + 1, 3), np.uint8)], texts)
    given = await probe.post(body, f"an image of more than {limit} pixels")
    given.expect(413, 422)
    return f"{given.status} beyond {limit}"


@check("info")
async def max_prompt_chars(probe: Probe) -> str:
    """MUST: a prompt of more characters than `max_prompt_chars` is 422."""
    limit = probe.info.limits.max_prompt_chars
    if limit > MOST_CHARS:
        raise NotJudged(f"the limit is {limit}, tried up to {MOST_CHARS}")
    body = encode(probe.media, probe.images_HWC[:1], ["x" * (limit + 1)])
    (await probe.post(body, f"a prompt of {limit + 1} characters, limit {limit}")).expect(422)
    return f"422 for {limit + 1}"


@check("info")
async def max_body_bytes(probe: Probe) -> str:
    """MUST: a body of more bytes than `max_body_bytes` is 413, or its connection is closed."""
    limit = probe.info.limits.max_body_bytes
    if limit > MOST_BYTES:
        raise NotJudged(f"the limit is {limit}, tried up to {MOST_BYTES}")
    body = probe.body_of([0])
    padding = b" " * (limit + 1 - len(body.content))  # which JSON may end with
    try:
        given = await probe.post(Body(body.content + padding, body.content_type), f"a body of over {limit} bytes")
    except NoAnswer as error:
        return str(error)
    given.expect(413)
    return f"413 beyond {limit}"


@check("info")
async def prompt_count(probe: Probe) -> str:
    """MUST: another number of prompts than of images is 400 or 422."""
    image = encode_png(probe.images_HWC[0])
    if probe.media not in FILE_MEDIA:
        raise NotJudged(f"{probe.media} is not tried")
    given = await probe.post(encode_files(probe.media, [image], ["one", "two"]), "2 prompts for 1 image")
    given.expect(400, 422)
    return str(given.status)


@check("info")
async def malformed(probe: Probe) -> str:
    """MUST: a body that is not what its type promises is 400, 413, 415 or 422."""
    tried = 0
    for media in (media for media in KNOWN_MEDIA if media in probe.info.bodies):
        for what, body in _malformed(media, probe).items():
            (await probe.post(body, what)).expect(*REFUSED)
            tried += 1
    return f"{tried} bodies refused"


@check("info")
async def unreadable(probe: Probe) -> str:
    """MUST: an image that cannot be read is 422, and `index` names its position, counted from 0."""
    if probe.media not in FILE_MEDIA:
        raise NotJudged(f"{probe.media} carries no files")
    if probe.info.limits.max_images < 3:
        raise NotJudged("the service takes fewer than 3 images")
    good = encode_png(probe.images_HWC[-1])
    cases = {"no picture": (NO_PICTURE, 1), "an empty file": (b"", 1), "half a picture": (good[: len(good) // 2], 2)}
    for what, (bad, index) in cases.items():
        files = [good] * 3
        files[index] = bad
        given = await probe.post(encode_files(probe.media, files, probe.prompts_of(range(3))), f"{what} at {index}")
        given.expect(422)
        if given.json().get("index") != index:
            raise Breach(f"{given}; expected index {index}")
    return f"{', '.join(cases)}: 422 with index"


@check("info")
async def media_type(probe: Probe) -> str:
    """MUST: a body of a type that /info does not list is 415."""
    images_HWC, texts = probe.images_HWC[:1], probe.prompts_of([0])
    bodies = {media: encode(media, images_HWC, texts) for media in KNOWN_MEDIA if media not in probe.info.bodies}
    bodies["text/plain"] = Body(b"hello", "text/plain")
    for media, body in bodies.items():
        (await probe.post(body, f"a body of {media}")).expect(415)
    return f"415 for {', '.join(bodies)}"


@check("info")
async def problem_details(probe: Probe) -> str:
    """MUST: every error is application/problem+json with its status, a title and a detail (RFC 9457)."""
    if not probe.errors:
        raise NotJudged("no error was seen")
    for error in probe.errors:
        _check_problem(error)
    return f"{len(probe.errors)} errors of {len({error.status for error in probe.errors})} statuses"


def _check_problem(error: Answer) -> None:
    """Check the form of one error.

    Raises:
        Breach: it is no problem detail.
    """
    if error.media != protocol.MEDIA_PROBLEM:
        raise Breach(f"{error}: Content-Type {error.media!r}; expected {protocol.MEDIA_PROBLEM}")
    problem = error.json()
    if problem.get("status") != error.status:
        raise Breach(f"{error}: its status member is {problem.get('status')!r}; expected {error.status}")
    for member in ("title", "detail"):
        if not isinstance(problem.get(member), str) or not problem[member].strip():
            raise Breach(f"{error}: its {member} is missing or empty")
    index = problem.get("index")
    if index is not None and not (type(index) is int and index >= 0):
        raise Breach(f"{error}: its index is {index!r}; expected a position from 0, or none")


def _malformed(media: str, probe: Probe) -> dict[str, Body]:
    """Bodies that are not what they claim to be, by what is wrong with them."""
    whole = probe.body_of([0], media)
    cut = {f"{media}, cut off": Body(whole.content[: len(whole.content) // 2], whole.content_type)}
    empty = {f"{media}, empty": Body(b"", whole.content_type)}
    if media == protocol.MEDIA_SAFETENSORS:
        huge = HEADER_LENGTH.pack(2**62) + whole.content[HEADER_LENGTH.size :]
        shape = json.dumps({"images": {"dtype": "U8", "shape": [2**40, 9, 9, 3], "data_offsets": [0, 3]}}).encode()
        wrong = struct.pack("<Q", len(shape)) + shape + b"abc"
        return (
            cut
            | empty
            | {
                f"{media}, {what}": Body(content, media)
                for what, content in (("a header without end", huge), ("a shape without data", wrong))
            }
        )
    if media == protocol.MEDIA_MULTIPART:
        return cut | empty | {f"{media}, no boundary": Body(whole.content, media)}
    texts: dict[str, object] = {
        "a list": [1, 2],
        "no images": {},
        "images of null": {"images": None},
        "a text for images": {"images": "abc"},
        "numbers for images": {"images": [1, 2]},
        "an empty batch": {"images": []},
        "prompts that are numbers": {**json.loads(whole.content), "prompts": [1]},
    }
    bodies = {f"{media}, {what}": Body(json.dumps(content).encode(), media) for what, content in texts.items()}
    nested = Body(b'{"images": ' + b"[" * NESTING, media)
    binary = Body(b'{"images": ["\xff\xfe"]}', media)
    text = Body(json.dumps({"images": ["!no base64!"]}).encode(), media)
    others = {f"{media}, nested": nested, f"{media}, not UTF-8": binary, f"{media}, no base64": text}
    return cut | empty | bodies | others
