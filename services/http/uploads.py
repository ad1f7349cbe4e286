"""Read the bodies of requests into memory that is bounded for each of them and for all together.

What is booked is what has arrived, not what was announced: who announces much and sends nothing takes no room.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fastapi import Request
from starlette.requests import ClientDisconnect

from services.http.problems import ProblemError


class HeldBytes:
    """The bytes of all requests in work in this process, under one bound."""

    def __init__(self, limit: int, *, headers: dict[str, str]) -> None:
        """Start with none.

        Args:
            limit: bytes held at most.
            headers: of the answer to a request beyond it.
        """
        self.limit = limit
        self.held = 0
        self._headers = headers

    @contextlib.contextmanager
    def share(self) -> Iterator["Share"]:
        """What one request holds; all of it is given back at the end."""
        share = Share(self)
        try:
            yield share
        finally:
            self.held -= share.size

    def check(self, more: int) -> None:
        """Refuse a request that would need `more` bytes than there are.

        Raises:
            ProblemError: 429.
        """
        if self.held + more > self.limit:
            detail = f"{self.held} bytes are in work and {more} more exceed the limit of {self.limit}: try again later"
            raise ProblemError("queue-full", detail, headers=self._headers)


class Share:
    """The part of `HeldBytes` that one request holds."""

    def __init__(self, of: HeldBytes) -> None:
        self._of = of
        self.size = 0

    def grow_to(self, size: int) -> None:
        """Hold `size` bytes, if that is more than now.

        Raises:
            ProblemError: 429, and nothing changes.
        """
        more = max(0, size - self.size)
        self._of.check(more)
        self._of.held += more
        self.size += more


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for a body.

    Attributes:
        deadline_s: seconds for the whole request, for the message.
        gives_up_s: when they have passed, by the clock of the event loop.
        stall_s: longest silence, in seconds.
    """

    deadline_s: float
    gives_up_s: float
    stall_s: float


async def read_body(
    request: Request,
    held: HeldBytes,
    share: Share,
    limit: int,
    patience: Patience,
    buffer: Callable[[int], memoryview | None] | None = None,
) -> bytearray | memoryview:
    """Read the body of a request.

    Args:
        request: nothing of its body has been read.
        held: the bound for all requests.
        share: what this one holds; it grows with what arrives.
        limit: bytes of the body at most.
        patience: how long to wait.
        buffer: gives memory for a body of known length, if it has some; it must take room only as it is written to.

    Returns:
        The body, in that memory if there is some: exactly Content-Length bytes, or, without that header, no more than
        `limit`.

    Raises:
        ProblemError: 400, 408, 413, 429 or 504, or the client left.
    """
    length = _content_length(request, limit)
    held.check(length or 0)
    body, memory, size = bytearray(), buffer(length) if buffer and length else None, 0
    now_s = asyncio.get_running_loop().time
    stalls_s = now_s() + patience.stall_s
    try:
        async with asyncio.timeout_at(min(patience.gives_up_s, stalls_s)) as timer:
            async for chunk in request.stream():
                start, size = size, size + len(chunk)
                if length is None and size > limit:
                    raise _too_large(f"more than {limit}", limit)
                if length is not None and size > length:
                    detail = f"the body exceeds its Content-Length of {length}: send what was announced"
                    raise ProblemError("malformed-request", detail)
                share.grow_to(size)
                if memory is None:
                    body += chunk
                else:
                    memory[start:size] = chunk
                if chunk:
                    stalls_s = now_s() + patience.stall_s
                    timer.reschedule(min(patience.gives_up_s, stalls_s))
    except TimeoutError:  # perhaps a millisecond early: uvloop's clock and timers have whole ones
        raise _too_slow(size, patience, in_time=stalls_s < patience.gives_up_s) from None
    except ClientDisconnect:
        raise ProblemError("client-gone", "the client left") from None
    if length is not None and size != length:
        if "upgrade" in request.headers:
            detail = "the request asks for another protocol and so loses its body: send it without an Upgrade header"
            raise ProblemError("malformed-request", detail)
        detail = f"{size} bytes of a Content-Length of {length} arrived: send what was announced"
        raise ProblemError("malformed-request", detail)
    return body if memory is None else memory


def _content_length(request: Request, limit: int) -> int | None:
    """The length that the request claims, or None for a chunked one."""
    text = request.headers.get("content-length")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()):
        raise ProblemError("malformed-request", f"Content-Length is {text[:40]!r}, must be a number of bytes")
    if len(text) > 20 or int(text) > limit:
        raise _too_large(text[:40], limit)
    return int(text)


def _too_large(size: object, limit: int) -> ProblemError:
    return ProblemError("body-too-large", f"the body has {size} bytes, limit {limit}: split the batch")


def _too_slow(size: int, patience: Patience, *, in_time: bool) -> ProblemError:
    close = {"Connection": "close"}  # the rest of the body may still come
    if in_time:
        detail = f"no byte came for {patience.stall_s:g} s after {size} bytes: send the body without pauses"
        return ProblemError("upload-stalled", detail, headers=close)
    detail = f"{size} bytes came within the deadline of {patience.deadline_s:g} s, not all: allow more time"
    return ProblemError("deadline-passed", detail, headers=close)
