"""Reward services that tests script: behind the client's transport seam, and on a socket of their own."""

import asyncio
import contextlib
import inspect
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from services import protocol
from services.images import Batch, decode_batch, decode_json
from services.protocol import Info, Limits

URL = "http://reward.test"
LIMITS = Limits(max_images=100, max_body_bytes=10**6, max_pixels=10**6, max_prompt_chars=100)
Handler = Callable[[httpx.Request], httpx.Response | Awaitable[httpx.Response]]


def info(*, version: str = "1", bodies: list[str] | None = None, **limits: int) -> Info:
    """An answer of `GET /info`."""
    bodies = bodies or [protocol.MEDIA_SAFETENSORS, protocol.MEDIA_JSON]
    return Info(name="fake", version=version, bodies=bodies, limits=LIMITS.model_copy(update=limits))


def answer(scores: object, **changes: object) -> dict[str, object]:
    """An answer of `POST /score`."""
    timing = {"queue": 1.0, "score": 2.0}
    return {"scores": scores, "reward": "fake", "version": "1", "timing_ms": timing, **changes}


def scored(request: httpx.Request, **changes: object) -> httpx.Response:
    """The answer of a service that scores each image by its content."""
    return httpx.Response(200, json=answer([content(image) for image in batch_of(request).images_HWC], **changes))


def batch_of(request: httpx.Request) -> Batch:
    """The images and prompts of a request."""
    return decode(request.headers["content-type"], request.content)


def decode(media: str, body: bytes) -> Batch:
    """The images and prompts of a body."""
    return {protocol.MEDIA_SAFETENSORS: decode_batch, protocol.MEDIA_JSON: decode_json}[media](body, Limits())


def content(image_HWC: NDArray[np.uint8]) -> float:
    """A number that no two images of a test share, but for a collision of their bytes."""
    weights = np.arange(1, image_HWC.size + 1, dtype=np.int64)
    return float(np.dot(weights, image_HWC.reshape(-1).astype(np.int64)))


def problem(status: int, *, index: int | None = 2, **headers: str) -> httpx.Response:
    """An error as the services give it."""
    body: dict[str, Any] = {"type": "urn:reward:x", "title": "No", "status": status, "detail": "because"}
    if index is not None:
        body["index"] = index
    return httpx.Response(status, json=body, headers={"Content-Type": protocol.MEDIA_PROBLEM, **headers})


@dataclass
class FakeService:
    """A service behind the client's transport seam.

    Attributes:
        on_score: answers `POST /score`; by default with scores.
        told: what `GET /info` answers; tests change it as a restart does.
        posts: every request for scores, in order of arrival.
        infos: how often `GET /info` was asked.
    """

    on_score: Handler = scored
    told: Info = field(default_factory=info)
    posts: list[httpx.Request] = field(default_factory=list)
    infos: int = 0

    @property
    def transport(self) -> httpx.MockTransport:
        """In place of the network."""
        return httpx.MockTransport(self._handle)

    def headers(self, name: str) -> list[str]:
        """One header of every request for scores."""
        return [request.headers[name] for request in self.posts]

    async def _handle(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == protocol.INFO_PATH:
            self.infos += 1
            await asyncio.sleep(0)  # as a network, which lets others in
            return httpx.Response(200, content=self.told.model_dump_json())
        self.posts.append(request)
        given = self.on_score(request)
        return await given if inspect.isawaitable(given) else given


@dataclass
class SocketService:
    """A service on a socket, which scores by content.

    Attributes:
        url: its address.
        accepted: connections so far.
        keys: the idempotency key of each request for scores, in order of arrival.
        cut_answers: so many of the next answers break off in their middle.
        dripped_answers: so many of the next answers come a byte at a time, with pauses, and have no end.
    """

    url: str = ""
    accepted: int = 0
    keys: list[str] = field(default_factory=list)
    cut_answers: int = 0
    dripped_answers: int = 0

    async def serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection, which stays open between them."""
        self.accepted += 1
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                start, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                text = info(max_images=2).model_dump_json().encode()
                if start.startswith("POST"):
                    self.keys.append(headers[protocol.HEADER_IDEMPOTENCY_KEY.lower()])
                    images_HWC = decode(headers["content-type"], body).images_HWC
                    text = json.dumps(answer([content(image_HWC) for image_HWC in images_HWC])).encode()
                if self.dripped_answers and start.startswith("POST"):
                    self.dripped_answers -= 1
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
                    while True:
                        writer.write(b" ")
                        await writer.drain()
                        await asyncio.sleep(0.05)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(text))
                if self.cut_answers and start.startswith("POST"):
                    self.cut_answers -= 1
                    writer.write(text[: len(text) // 2])
                    await writer.drain()
                    return
                writer.write(text)
                await writer.drain()


@contextlib.asynccontextmanager
async def socket_service() -> AsyncIterator[SocketService]:
    """Serve on a free port of this machine, in this event loop."""
    service = SocketService()
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(service.serve_connection(reader, writer)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        service.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield service
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
