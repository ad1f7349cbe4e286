"""The checks of answers: what a service says of itself, and its scores."""

import asyncio
import json
import time
import uuid
from collections.abc import Sequence

import numpy as np
from PIL import Image
from pydantic import ValidationError

from services import protocol
from services.conformance.kit import check
from services.conformance.pictures import FILE_MEDIA, KNOWN_MEDIA, encode_files, picture_file
from services.conformance.probe import OK, Answer, Breach, NotJudged, Probe, is_number, raw_scores, read_scores
from services.images import encode_png
from services.protocol import Info, ScoreAnswer

CLIENTS = 8
ROUNDS = 2
LONG_DEADLINE_MS = 60_000
FULL_BATCH_S = 5.0
"""A full batch is tried where it should not take longer than this."""


@check()
async def health(probe: Probe) -> str:
    """MUST: GET /healthz is 200, without the token, while the service lives."""
    (await probe.get(protocol.HEALTH_PATH, with_token=False)).expect(OK)
    return "200"


@check()
async def ready(probe: Probe) -> str:
    """MUST: GET /readyz is 200, without the token, while requests are scored."""
    (await probe.get(protocol.READY_PATH, with_token=False)).expect(OK)
    return "200"


@check()
async def info(probe: Probe) -> str:
    """MUST: GET /info tells name, version, range, bodies and limits, and one of the contract's bodies at least."""
    answer = await probe.get(protocol.INFO_PATH)
    answer.expect(OK)
    try:
        told = Info.model_validate_json(answer.body)
    except ValidationError as error:
        raise Breach(f"GET /info: {_first_of(error)}") from None
    if not set(told.bodies) & set(KNOWN_MEDIA):
        raise Breach(f"bodies are {', '.join(told.bodies)[:100]}; expected one of {', '.join(KNOWN_MEDIA)}")
    if told.low is not None and told.high is not None and told.low > told.high:
        raise Breach(f"low is {told.low:g}, above high, {told.high:g}")
    probe.learn(told)
    return f"{told.name} {told.version}; {', '.join(told.bodies)}"


@check("info")
async def token(probe: Probe) -> str:
    """MUST: where a token is wanted, /info and /score without it, and /score with another one, are 401."""
    if probe.token is None:
        raise NotJudged("no token was given")
    body = encode_files(protocol.MEDIA_JSON, [encode_png(probe.images_HWC[0])], None)
    answers = [
        await probe.get(protocol.INFO_PATH, with_token=False),
        await probe.post(body, "a request without the token", token=""),
        await probe.post(body, "a request with a wrong token", token=f"{probe.token}x"),
    ]
    if all(answer.status == OK for answer in answers):
        raise NotJudged("the service wants no token")
    for answer in answers:
        answer.expect(401)
    return "401 three times"


@check("info")
async def answer(probe: Probe) -> str:
    """MUST: a batch is answered 200, in JSON, with a list of scores, timings, and the reward and version of /info."""
    given = await _batch(probe)
    scores = raw_scores(given)
    try:
        model = ScoreAnswer.model_validate_json(json.dumps({**given.json(), "scores": []}))
    except ValidationError as error:
        raise Breach(f"the answer's {_first_of(error)}") from None
    told = probe.info
    if (model.reward, model.version) != (told.name, told.version):
        raise Breach(f"the answer is of {model.reward} {model.version}, /info of {told.name} {told.version}")
    if given.media != protocol.MEDIA_JSON:
        raise Breach(f"the answer's Content-Type is {given.media!r}; expected {protocol.MEDIA_JSON}")
    return f"{len(scores)} scores of {model.reward} {model.version}"


@check("answer")
async def numbers(probe: Probe) -> str:
    """MUST: each score is a finite JSON number: no text, null, NaN or Infinity."""
    for index, score in enumerate(raw_scores(await _batch(probe))):
        if not is_number(score):
            raise Breach(f"score {index} is {json.dumps(score)[:40]}; expected a finite number")
    return "finite numbers"


@check("answer")
async def count(probe: Probe) -> str:
    """MUST: there are as many scores as images, in batches of any size."""
    whole = len(probe.images_HWC)
    tried = sorted({1, (whole + 1) // 2, whole})
    for size in tried:
        positions = range(size)
        given = await probe.ask([probe.images_HWC[index] for index in positions], probe.prompts_of(positions))
        if len(raw_scores(given)) != size:
            raise Breach(f"{len(raw_scores(given))} scores for {size} images")
    return f"batches of {', '.join(map(str, tried))}"


@check("numbers", "count")
async def score_range(probe: Probe) -> str:
    """MUST: scores are within the low and high of /info, where it tells them."""
    low, high = probe.info.low, probe.info.high
    if low is None and high is None:
        raise NotJudged("/info tells no range")
    scores = await probe.alone()
    for score in scores:
        clipped = min(max(score, score if low is None else low), score if high is None else high)
        if not probe.same(score, clipped):
            raise Breach(f"a score of {score:.8g} is outside of {low} to {high}")
    return f"{min(scores):.4g} to {max(scores):.4g} within {low} to {high}"


@check("numbers", "count")
async def determinism(probe: Probe) -> str:
    """MUST: the same request gets the same scores every time."""
    positions = range(len(probe.images_HWC))
    first = await probe.scores_of(positions)
    for _ in range(2):
        _expect_same(probe, await probe.scores_of(positions), first, "a repeat")
    return "three times the same"


@check("determinism")
async def order(probe: Probe) -> str:
    """MUST: the scores come in the order of the images."""
    alone = await probe.alone()
    if len(alone) < 2 or all(probe.same(score, alone[0]) for score in alone):
        raise NotJudged("all pictures score alike" if len(alone) > 1 else "the service takes one image at a time")
    for positions in _orders(len(alone)):
        scores, expected = await probe.scores_of(positions), [alone[position] for position in positions]
        difference = probe.difference(scores, expected)
        if difference and probe.difference(sorted(scores), sorted(expected)):
            raise NotJudged("the scores of a batch are not those of its images alone: see batch-invariance")
        if difference:
            raise Breach(f"the scores are right, but in another order: {difference}")
    return "as given, reversed and mixed"


@check("determinism")
async def batch_invariance(probe: Probe) -> str:
    """MUST: an image has the same score alone and in any batch, within the tolerance."""
    alone = await probe.alone()
    largest = 0.0
    if len(alone) < 2:
        raise NotJudged("the service takes one image at a time")
    for positions in [*_orders(len(alone)), list(range(len(alone) // 2))]:
        expected = [alone[position] for position in positions]
        scores = await probe.scores_of(positions)
        # Sorted, because another order is another rule's breach.
        _expect_same(probe, sorted(scores), sorted(expected), "a batch, against its images alone")
        largest = max([largest, *np.abs(np.subtract(sorted(scores), sorted(expected))).tolist()])
    return f"differences up to {largest:.2g}"


@check("order", "batch-invariance")
async def sizes(probe: Probe) -> str:
    """MUST: pictures of several sizes in one request, which JSON and forms can carry, have their own scores."""
    if probe.media not in FILE_MEDIA:
        raise NotJudged(f"{probe.media} carries one size")
    image_HWC = probe.images_HWC[-1]
    side = len(image_HWC)
    images_HWC = [image_HWC, image_HWC[:, : max(1, side // 2)], image_HWC[: max(1, side // 3)]]
    images_HWC = images_HWC[: probe.info.limits.max_images]
    prompts = [probe.prompts[0]] * len(images_HWC) if probe.info.uses_prompts else None
    alone = [(await probe.scores([image_HWC], prompts and prompts[:1]))[0] for image_HWC in images_HWC]
    _expect_same(probe, await probe.scores(images_HWC, prompts), alone, "a batch of several sizes")
    return ", ".join(f"{image_HWC.shape[1]}×{image_HWC.shape[0]}" for image_HWC in images_HWC)


@check("order", "batch-invariance")
async def prompts(probe: Probe) -> str:
    """MUST: one prompt for each image is accepted, goes with its image, and changes no score unless /info says so."""
    told, images_HWC = probe.info, probe.images_HWC
    texts = probe.prompts[1:] + probe.prompts[:1]
    scores = await probe.scores(images_HWC, texts)
    if not told.uses_prompts:
        _expect_same(probe, scores, await probe.alone(), "with prompts, which `uses_prompts` says change nothing")
        return "accepted, without effect"
    pairs = zip(images_HWC, texts, strict=True)
    alone = [(await probe.scores([image_HWC], [text]))[0] for image_HWC, text in pairs]
    _expect_same(probe, scores, alone, "a batch with prompts, against its images alone")
    return "each with its image"


@check("order", "batch-invariance")
async def bodies(probe: Probe) -> str:
    """MUST: every body that /info lists is accepted, and the same pixels get the same scores in each."""
    listed = [media for media in probe.info.bodies if media in KNOWN_MEDIA]
    positions = range(len(probe.images_HWC))
    for media in listed:
        scores = await probe.scores_of(positions, media=media)
        _expect_same(probe, scores, await probe.alone(), f"as {media}")
    unknown = [media for media in probe.info.bodies if media not in KNOWN_MEDIA]
    return ", ".join(listed) + (f"; not tried: {', '.join(unknown)[:80]}" if unknown else "")


@check("order", "batch-invariance")
async def formats(probe: Probe) -> str:
    """SHOULD: PNG (RGB, grey, palette, transparent over white), WebP and JPEG are read as the contract has it."""
    if probe.media not in FILE_MEDIA:
        raise NotJudged(f"{probe.media} carries no files")
    picture = Image.fromarray(probe.images_HWC[-1])
    stencil = Image.new("L", picture.size, 0)
    stencil.paste(255, (0, 0, (picture.width + 1) // 2, picture.height))  # hidden or shown: half-tones are rounded
    cut = picture.convert("RGBA")
    cut.putalpha(stencil)
    grey, palette, white = picture.convert("L"), picture.quantize(16), Image.new("RGB", picture.size, "white")
    cases: dict[str, tuple[Image.Image, str, Image.Image | None]] = {
        "grey": (grey, "PNG", grey),
        "palette": (palette, "PNG", palette),
        "transparent": (cut, "PNG", Image.composite(picture, white, stencil)),
        "WebP": (picture, "WEBP", picture),
        "JPEG": (picture, "JPEG", None),  # decoders differ in the last bit
    }
    for name, (given, kind, meant) in cases.items():
        texts = probe.prompts[:1] if probe.info.uses_prompts else None
        reply = await probe.post(encode_files(probe.media, [picture_file(given, kind)], texts), f"a {name} picture")
        reply.expect(OK)
        scores = read_scores(reply, 1)
        if meant is not None:
            expected = await probe.scores([np.asarray(meant.convert("RGB"))], texts)
            _expect_same(probe, scores, expected, f"a {name} picture, against its pixels")
    return ", ".join(cases)


@check("numbers", "count")
async def full_batch(probe: Probe) -> str:
    """MUST: as many images as `max_images` are accepted in one request."""
    most = probe.info.limits.max_images
    began_s = time.monotonic()
    await probe.scores_of(range(len(probe.images_HWC)))
    needed_s = (time.monotonic() - began_s) / len(probe.images_HWC) * most
    if needed_s > FULL_BATCH_S:
        raise NotJudged(f"{most} images would take about {needed_s:.0f} s")
    texts = [probe.prompts[0]] * most if probe.info.uses_prompts else None
    await probe.scores([probe.images_HWC[0][:1, :1]] * most, texts)
    return f"{most} images"


@check("order", "batch-invariance")
async def concurrency(probe: Probe) -> str:
    """MUST: clients that ask at the same time get each its own scores."""
    alone = await probe.alone()
    whole = len(alone)

    async def ask(client: int) -> None:
        positions = [(client + step) % whole for step in range(min(whole, 1 + client % 3))]
        scores = await probe.scores_of(positions)
        _expect_same(probe, scores, [alone[position] for position in positions], f"client {client} of {CLIENTS}")

    for _ in range(ROUNDS):
        results = await asyncio.gather(*(ask(client) for client in range(CLIENTS)), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
    return f"{CLIENTS} clients, {ROUNDS} requests each"


@check("order", "batch-invariance")
async def deadline(probe: Probe) -> str:
    """MUST: X-Deadline-Ms changes no score; one that is too short is ignored or answered 504."""
    positions = range(len(probe.images_HWC))
    scores = await probe.scores_of(positions, headers={protocol.HEADER_DEADLINE_MS: str(LONG_DEADLINE_MS)})
    _expect_same(probe, scores, await probe.alone(), f"with {protocol.HEADER_DEADLINE_MS}: {LONG_DEADLINE_MS}")
    short = await probe.post(probe.body_of(positions), "a deadline of 1 ms", headers={protocol.HEADER_DEADLINE_MS: "1"})
    short.expect(OK, 504)
    return f"1 ms: {short.status}"


@check("order", "batch-invariance")
async def idempotency(probe: Probe) -> str:
    """MUST: Idempotency-Key changes no score, and never brings the scores of other images: those are scored, or 422."""
    headers = {protocol.HEADER_IDEMPOTENCY_KEY: uuid.uuid4().hex}
    alone = await probe.alone()
    positions = list(range(len(alone)))
    for _ in range(2):
        scores = await probe.scores_of(positions, headers=headers)
        _expect_same(probe, scores, alone, f"with {protocol.HEADER_IDEMPOTENCY_KEY}")
    others = positions[1:] + positions[:1] if len(positions) > 1 else []
    if not others:
        return "the same twice"
    reply = await probe.post(probe.body_of(others), "the same key with other images", headers=headers)
    reply.expect(OK, 422)
    if reply.status == OK:
        expected = [alone[position] for position in others]
        _expect_same(probe, read_scores(reply, len(others)), expected, "the same key with other images")
    return f"the same twice; with other images {reply.status}"


def _first_of(error: ValidationError) -> str:
    """The first thing that is wrong with an answer, in one line."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return f"{'.'.join(str(part) for part in first['loc']) or 'body'}: {first['msg']}"


async def _batch(probe: Probe) -> Answer:
    """The answer to all of the usual pictures."""
    return await probe.ask(probe.images_HWC, probe.prompts_of(range(len(probe.images_HWC))))


def _expect_same(probe: Probe, scores: Sequence[float], expected: Sequence[float], what: str) -> None:
    """Check that scores agree.

    Raises:
        Breach: two of them do not.
    """
    if difference := probe.difference(scores, expected):
        raise Breach(f"{what}: {difference}")


def _orders(whole: int) -> list[list[int]]:
    """The pictures as they are, reversed, and mixed."""
    positions = list(range(whole))
    return [positions, positions[::-1], positions[1::2] + positions[::2]]
