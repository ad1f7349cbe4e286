"""Services that break one rule about refusals each, and the check that must find it."""

import json
from typing import Any

import httpx
import numpy as np

from services import protocol
from services.images import Batch, BodyError, ItemInvalid, decode_batch, decode_json
from tests.services.keeper import Keeper, Refusal, entering

BREAKERS: list[tuple[str, type[Keeper]]] = []
breaks = entering(BREAKERS)


@breaks("unknown-path")
class Everywhere(Keeper):
    async def route(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/no-such-path":
            return httpx.Response(200, json={})
        return await super().route(request)


@breaks("method")
class NoMethods(Keeper):
    async def route(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == protocol.SCORE_PATH and request.method != "POST":
            raise Refusal(404, "nothing is here")
        return await super().route(request)


class Unlimited(Keeper):
    """Does not keep one of its limits."""

    ignored = ""

    def decode(self, media: str, body: bytes) -> Batch:
        limits = self.limits.model_copy(update={self.ignored: 10**6})
        return {protocol.MEDIA_JSON: decode_json, protocol.MEDIA_SAFETENSORS: decode_batch}[media](body, limits)


@breaks("max-images")
class AnyNumber(Unlimited):
    ignored = "max_images"


@breaks("max-pixels")
class AnySize(Unlimited):
    ignored = "max_pixels"


@breaks("max-prompt-chars")
class AnyPrompt(Unlimited):
    ignored = "max_prompt_chars"


@breaks("max-body-bytes")
class AnyBody(Keeper):
    async def answer(self, request: httpx.Request) -> httpx.Response:
        request = httpx.Request("POST", request.url, headers=request.headers, content=request.content.rstrip(b" "))
        return await super().answer(request)


class Lenient(Keeper):
    """Takes some of what cannot be scored for one white picture."""

    answered = 200

    def decode(self, media: str, body: bytes) -> Batch:
        try:
            return super().decode(media, body)
        except BodyError as error:
            if not self.minds(error, body):
                raise
            if self.answered == 200:
                return Batch([np.full((1, 1, 3), 255, np.uint8)], None)
            raise Refusal(self.answered, "no", getattr(error, "index", None)) from error

    def minds(self, error: BodyError, body: bytes) -> bool:
        raise NotImplementedError


@breaks("prompt-count")
class AnyCount(Lenient):
    def minds(self, error: BodyError, body: bytes) -> bool:
        return "prompts for" in str(error)


@breaks("malformed")
class FallsOver(Lenient):
    answered = 500

    def minds(self, error: BodyError, body: bytes) -> bool:
        return body.startswith(b'{"images": [[[')


@breaks("malformed")
class EmptyBatch(Lenient):
    def minds(self, error: BodyError, body: bytes) -> bool:
        return body == b'{"images": []}'


@breaks("malformed")
class BelievesShapes(Lenient):
    answered = 500

    def minds(self, error: BodyError, body: bytes) -> bool:
        return b"1099511627776" in body


@breaks("unreadable")
class WrongStatus(Lenient):
    answered = 400

    def minds(self, error: BodyError, body: bytes) -> bool:
        return isinstance(error, ItemInvalid) and "cannot be read" in str(error)


class Pointing(Keeper):
    """Names another image than the one at fault."""

    def problem(self, status: int, detail: str, index: int | None) -> httpx.Response:
        return super().problem(status, detail, self.point(index))

    def point(self, index: int | None) -> int | None:
        return index


@breaks("unreadable")
class CountsFromOne(Pointing):
    def point(self, index: int | None) -> int | None:
        return None if index is None else index + 1


@breaks("unreadable")
class AlwaysTheFirst(Pointing):
    def point(self, index: int | None) -> int | None:
        return None if index is None else 0


@breaks("unreadable")
class NamesNone(Pointing):
    def point(self, index: int | None) -> int | None:
        return None


@breaks("media-type")
class AnyType(Keeper):
    """Takes whatever comes for JSON."""

    async def answer(self, request: httpx.Request) -> httpx.Response:
        if request.headers.get("Content-Type") not in self.bodies:
            request.headers["Content-Type"] = protocol.MEDIA_JSON
        return await super().answer(request)


class Misshapen(Keeper):
    """Gives its errors another form."""

    media = protocol.MEDIA_PROBLEM

    def problem(self, status: int, detail: str, index: int | None) -> httpx.Response:
        content = self.misshape(json.loads(super().problem(status, detail, index).content))
        return httpx.Response(status, json=content, headers={"Content-Type": self.media})

    def misshape(self, content: dict[str, Any]) -> dict[str, Any]:
        return content


@breaks("problem-details")
class PlainJson(Misshapen):
    media = protocol.MEDIA_JSON


@breaks("problem-details")
class NoTitle(Misshapen):
    def misshape(self, content: dict[str, Any]) -> dict[str, Any]:
        return {**content, "title": ""}


@breaks("problem-details")
class NoDetail(Misshapen):
    def misshape(self, content: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in content.items() if name != "detail"}


@breaks("problem-details")
class OtherStatus(Misshapen):
    def misshape(self, content: dict[str, Any]) -> dict[str, Any]:
        return {**content, "status": 200}
