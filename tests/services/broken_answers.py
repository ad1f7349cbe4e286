"""Services that break one rule about answers each, and the check that must find it."""

import asyncio
from typing import Any

import httpx

from services import protocol
from services.images import Batch
from tests.services.keeper import Images, Keeper, Prompts, Refusal, entering

BREAKERS: list[tuple[str, type[Keeper]]] = []
breaks = entering(BREAKERS)


class Routed(Keeper):
    """Does not serve one path."""

    path, status = "", 404

    async def route(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == self.path:
            raise Refusal(self.status, "not here")
        return await super().route(request)


@breaks("health")
class NoHealth(Routed):
    path, status = protocol.HEALTH_PATH, 404


@breaks("ready")
class NeverReady(Routed):
    path, status = protocol.READY_PATH, 500


@breaks("info")
class NoLimits(Keeper):
    def told(self) -> dict[str, Any]:
        return {name: value for name, value in super().told().items() if name != "limits"}


@breaks("info")
class ForeignBody(Keeper):
    bodies = ("application/x-pickle",)


@breaks("info")
class UpsideDown(Keeper):
    low, high = 1.0, 0.0


@breaks("token")
class OpenScore(Keeper):
    token = "of-a-test"

    def authorise(self, request: httpx.Request) -> None:
        if request.url.path != protocol.SCORE_PATH:
            super().authorise(request)


@breaks("token")
class AnyToken(Keeper):
    token = "of-a-test"

    def authorise(self, request: httpx.Request) -> None:
        if "Authorization" not in request.headers:
            super().authorise(request)


@breaks("answer")
class OtherVersion(Keeper):
    def reply(self, scores: list[Any]) -> dict[str, Any]:
        return {**super().reply(scores), "version": "2"}


@breaks("answer")
class NoTimings(Keeper):
    def reply(self, scores: list[Any]) -> dict[str, Any]:
        return {**super().reply(scores), "timing_ms": None}


@breaks("answer")
class NoList(Keeper):
    def reply(self, scores: list[Any]) -> dict[str, Any]:
        return {**super().reply(scores), "scores": dict(enumerate(scores))}


@breaks("answer")
class AlwaysDown(Keeper):
    async def score(self, images_HWC: Images, prompts: Prompts) -> list[Any]:
        raise Refusal(500, "the model is gone")


class Changed(Keeper):
    """Gives other scores than it has."""

    async def score(self, images_HWC: Images, prompts: Prompts) -> list[Any]:
        return self.change(await super().score(images_HWC, prompts))

    def change(self, scores: list[Any]) -> list[Any]:
        return scores


@breaks("numbers")
class Nan(Changed):
    def change(self, scores: list[Any]) -> list[Any]:
        return [*scores[:-1], float("nan")]


@breaks("numbers")
class Infinite(Changed):
    def change(self, scores: list[Any]) -> list[Any]:
        return [float("inf"), *scores[1:]]


@breaks("numbers")
class Huge(Changed):
    def change(self, scores: list[Any]) -> list[Any]:
        return [10**400, *scores[1:]]


@breaks("numbers")
class Texts(Changed):
    def change(self, scores: list[Any]) -> list[Any]:
        return [str(score) for score in scores]


@breaks("numbers")
class Nulls(Changed):
    def change(self, scores: list[Any]) -> list[Any]:
        return [None, *scores[1:]]


@breaks("numbers")
class Verdicts(Changed):
    def change(self, scores: list[Any]) -> list[Any]:
        return [score > 0.5 for score in scores]


@breaks("count")
class OneMissing(Changed):
    def change(self, scores: list[Any]) -> list[Any]:
        return scores[: max(1, len(scores) - 1)]


@breaks("count")
class OneMore(Changed):
    def change(self, scores: list[Any]) -> list[Any]:
        return [*scores, scores[0]]


@breaks("score-range")
class BeyondHigh(Keeper):
    low, high = 0.0, 0.25


@breaks("score-range")
class BelowLow(Keeper):
    low = 0.25


@breaks("determinism")
class Noisy(Changed):
    """Adds a little more at each request."""

    noise = 0.0

    def change(self, scores: list[Any]) -> list[Any]:
        self.noise += 1e-3
        return [score + self.noise for score in scores]


@breaks("order")
class Reversed(Changed):
    def change(self, scores: list[Any]) -> list[Any]:
        return scores[::-1]


@breaks("order")
class Sorted(Changed):
    def change(self, scores: list[Any]) -> list[Any]:
        return sorted(scores)


@breaks("batch-invariance")
class Centred(Changed):
    """Takes the mean of the batch into account, as a batch norm in train mode does."""

    def change(self, scores: list[Any]) -> list[Any]:
        return [score + 1e-3 * sum(scores) / len(scores) for score in scores]


@breaks("sizes")
class OneSize(Keeper):
    """Crops every picture to the smallest of the batch."""

    async def score(self, images_HWC: Images, prompts: Prompts) -> list[Any]:
        height, width = (min(image_HWC.shape[axis] for image_HWC in images_HWC) for axis in (0, 1))
        return await super().score([image_HWC[:height, :width] for image_HWC in images_HWC], prompts)


@breaks("sizes")
class RefusesSizes(Keeper):
    async def score(self, images_HWC: Images, prompts: Prompts) -> list[Any]:
        if len({image_HWC.shape for image_HWC in images_HWC}) > 1:
            raise Refusal(500, "cannot stack")
        return await super().score(images_HWC, prompts)


@breaks("prompts")
class SecretPrompts(Keeper):
    """Says that prompts change nothing."""

    async def score(self, images_HWC: Images, prompts: Prompts) -> list[Any]:
        scores = await super().score(images_HWC, prompts)
        return [score + len(text) for score, text in zip(scores, prompts or [""] * len(scores), strict=True)]


@breaks("prompts")
class NoPrompts(Keeper):
    def decode(self, media: str, body: bytes) -> Batch:
        batch = super().decode(media, body)
        if batch.prompts is not None:
            raise Refusal(422, "no prompts are taken", 0)
        return batch


@breaks("bodies")
class SwappedChannels(Keeper):
    """Reads tensors as BGR."""

    def decode(self, media: str, body: bytes) -> Batch:
        batch = super().decode(media, body)
        if media == protocol.MEDIA_JSON:
            return batch
        return Batch([image_HWC[:, :, ::-1] for image_HWC in batch.images_HWC], batch.prompts)


@breaks("bodies")
class Unread(Keeper):
    """Lists a body that it does not read."""

    def decode(self, media: str, body: bytes) -> Batch:
        if media == protocol.MEDIA_SAFETENSORS:
            raise Refusal(415, "not today")
        return super().decode(media, body)


@breaks("formats")
class PngOnly(Keeper):
    """Refuses what is no PNG."""

    def decode(self, media: str, body: bytes) -> Batch:
        if media == protocol.MEDIA_JSON and b'"/9j/' in body:  # how a JPEG begins in base64
            raise Refusal(422, "no JPEG", 0)
        return super().decode(media, body)


@breaks("full-batch")
class OneLess(Keeper):
    async def score(self, images_HWC: Images, prompts: Prompts) -> list[Any]:
        if len(images_HWC) >= self.limits.max_images:
            raise Refusal(413, "too many images")
        return await super().score(images_HWC, prompts)


@breaks("concurrency")
class Crossed(Keeper):
    """Keeps the images of a request where the next one finds them."""

    async def score(self, images_HWC: Images, prompts: Prompts) -> list[Any]:
        self.held = images_HWC
        await asyncio.sleep(0.001)
        return await super().score(self.held, None)


@breaks("deadline")
class NoDeadlines(Keeper):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        if protocol.HEADER_DEADLINE_MS in request.headers:
            raise Refusal(400, "unknown header")
        return await super().answer(request)


@breaks("deadline")
class DiesLate(Keeper):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        if request.headers.get(protocol.HEADER_DEADLINE_MS) == "1":
            raise Refusal(500, "late")
        return await super().answer(request)


@breaks("idempotency")
class ByKeyAlone(Keeper):
    """Answers a known key without a look at the body."""

    def __init__(self) -> None:
        self.known: dict[str, httpx.Response] = {}

    async def answer(self, request: httpx.Request) -> httpx.Response:
        key = request.headers.get(protocol.HEADER_IDEMPOTENCY_KEY)
        if key is None:
            return await super().answer(request)
        if key not in self.known:
            self.known[key] = await super().answer(request)
        return httpx.Response(200, content=self.known[key].content, headers={"Content-Type": "application/json"})


@breaks("idempotency")
class OnceOnly(ByKeyAlone):
    """Refuses to repeat itself."""

    async def answer(self, request: httpx.Request) -> httpx.Response:
        if request.headers.get(protocol.HEADER_IDEMPOTENCY_KEY, "") in self.known:
            raise Refusal(409, "seen before")
        return await super().answer(request)
