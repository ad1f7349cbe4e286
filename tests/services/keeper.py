"""A small service that keeps the contract, behind the client's transport seam; broken ones are made of it."""

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from services import protocol
from services.images import Batch, BodyError, ItemInvalid, decode_batch, decode_json
from services.protocol import Info, Limits

Images = Sequence[NDArray[np.uint8]]
Prompts = Sequence[str] | None

LIMITS = Limits(max_images=8, max_body_bytes=100_000, max_pixels=4096, max_prompt_chars=50)


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, detail: str, index: int | None = None) -> None:
        super().__init__(detail)
        self.status, self.index = status, index


class Keeper:
    """Scores the mean of a picture, and of its prompt's length where it uses prompts.

    What breaks a rule overrides the one method that keeps it.
    """

    limits = LIMITS
    bodies = (protocol.MEDIA_JSON, protocol.MEDIA_SAFETENSORS)
    uses_prompts = False
    token: str | None = None
    low, high = 0.0, 100.0

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        """Answer as a service does."""
        await asyncio.sleep(0)  # as a network, which lets others in
        try:
            return await self.route(request)
        except Refusal as error:
            return self.problem(error.status, str(error), error.index)

    async def route(self, request: httpx.Request) -> httpx.Response:
        """Find what is asked for."""
        path = request.url.path
        if path in {protocol.HEALTH_PATH, protocol.READY_PATH}:
            return httpx.Response(200, json={"status": "ok"})
        if path not in {protocol.INFO_PATH, protocol.SCORE_PATH}:
            raise Refusal(404, "nothing is here")
        self.authorise(request)
        if path == protocol.INFO_PATH:
            return httpx.Response(200, json=self.told())
        if request.method != "POST":
            raise Refusal(405, "send a POST")
        return await self.answer(request)

    def authorise(self, request: httpx.Request) -> None:
        """Want the token, if there is one."""
        if self.token is not None and request.headers.get("Authorization") != f"Bearer {self.token}":
            raise Refusal(401, "send the token")

    def told(self) -> dict[str, Any]:
        """What /info says."""
        info = Info(name="keeper", version="1", bodies=list(self.bodies), limits=self.limits, low=self.low)
        return {**info.model_dump(), "high": self.high, "uses_prompts": self.uses_prompts}

    async def answer(self, request: httpx.Request) -> httpx.Response:
        """Score a batch."""
        media = request.headers.get("Content-Type", "").partition(";")[0]
        if media not in self.bodies:
            raise Refusal(415, f"send {self.bodies}")
        if len(request.content) > self.limits.max_body_bytes:
            raise Refusal(413, "send less")
        try:
            batch = self.decode(media, request.content)
        except BodyError as error:
            raise Refusal(error.status, str(error), error.index if isinstance(error, ItemInvalid) else None) from error
        scores = await self.score(batch.images_HWC, batch.prompts)
        return httpx.Response(200, content=json.dumps(self.reply(scores)), headers={"Content-Type": "application/json"})

    def decode(self, media: str, body: bytes) -> Batch:
        """Read a body."""
        return {protocol.MEDIA_JSON: decode_json, protocol.MEDIA_SAFETENSORS: decode_batch}[media](body, self.limits)

    async def score(self, images_HWC: Images, prompts: Prompts) -> list[Any]:
        """Score images."""
        await asyncio.sleep(0)
        texts = prompts if self.uses_prompts and prompts is not None else [""] * len(images_HWC)
        return [self.one(image_HWC, text) for image_HWC, text in zip(images_HWC, texts, strict=True)]

    def one(self, image_HWC: NDArray[np.uint8], text: str) -> float:
        """Score one image; the channels count differently."""
        return float((image_HWC / 255 @ np.array([0.5, 0.3, 0.2])).mean() + len(text))

    def reply(self, scores: list[Any]) -> dict[str, Any]:
        """The answer that carries the scores."""
        return {"scores": scores, "reward": "keeper", "version": "1", "timing_ms": {"queue": 0.0, "score": 1.0}}

    def problem(self, status: int, detail: str, index: int | None) -> httpx.Response:
        """An error."""
        content: dict[str, Any] = {"title": "No", "status": status, "detail": detail}
        if index is not None:
            content["index"] = index
        return httpx.Response(status, json=content, headers={"Content-Type": protocol.MEDIA_PROBLEM})


def entering(broken: list[tuple[str, type[Keeper]]]) -> Callable[[str], Callable[[type[Keeper]], type[Keeper]]]:
    """A decorator that enters a service in a list, under the name of the one check that must find it."""

    def breaks(name: str) -> Callable[[type[Keeper]], type[Keeper]]:
        def enter(kind: type[Keeper]) -> type[Keeper]:
            broken.append((name, kind))
            return kind

        return enter

    return breaks
