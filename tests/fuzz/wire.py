"""Requests on a plain socket: HTTP clients refuse to send most of what is sent here."""

import http.client
import random
import select
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from services import protocol
from tests.fuzz.mutations import MUTATIONS, Attempt, Framing

TIMEOUT_S = 60.0
GARBLED_TIMEOUT_S = 0.15
"""A damaged head may ask for anything, also to wait for more of it."""
PAUSE_S = 0.02
WRONG_LENGTHS = ("-1", "1e3", "0x10", "", "9" * 30, "10, 20", "1_0")
WRONG_SIZES = ("zz", "-5", "", "{:x}")


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes = field(repr=False)


class Line:
    """One connection to a service at a time, kept while that is safe."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._socket: socket.socket | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def send(self, attempt: Attempt) -> Answer | None:
        """Send a request; None where the other side closed the connection, or is left, without an answer."""
        connected = self._connected()
        connected.settimeout(GARBLED_TIMEOUT_S if attempt.framing is Framing.GARBLED else TIMEOUT_S)
        answer = None
        try:
            self._write(connected, attempt)
            if attempt.framing is not Framing.CUT:
                answer = _read(connected)
        except TimeoutError:
            if attempt.framing is not Framing.GARBLED:
                raise
        finally:
            # After a refusal the service may close; what follows a wrong length would be taken for a request.
            if answer is None or answer.status != 200 or attempt.framing is Framing.SHORT:
                self.close()
        return answer

    def _connected(self) -> socket.socket:
        if self._socket is not None and select.select([self._socket], [], [], 0)[0]:
            self.close()  # the service has closed it
        if self._socket is None:
            self._socket = socket.create_connection(self._address, TIMEOUT_S)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._socket

    @staticmethod
    def _write(connected: socket.socket, attempt: Attempt) -> None:
        try:
            for number, piece in enumerate(pieces(attempt)):
                if number and attempt.framing is Framing.SLOW:
                    time.sleep(PAUSE_S)
                connected.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has answered already


def _read(connected: socket.socket) -> Answer | None:
    response = http.client.HTTPResponse(connected, method="POST")
    try:
        response.begin()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, headers, response.read())
    except (http.client.BadStatusLine, ConnectionResetError):
        return None
    finally:
        response.close()


def sent_length(attempt: Attempt) -> str:
    """The Content-Length of an attempt whose framing gives a wrong one or, in half of the cases, chunks too."""
    size, draw = len(attempt.body.data), random.Random(attempt.salt)
    if attempt.framing is Framing.SHORT:
        return str(draw.randrange(max(1, size)))
    if attempt.framing is Framing.STALLED:
        return str(size + draw.randint(1, 1000))
    if attempt.framing is Framing.NO_NUMBER:
        return draw.choice(WRONG_LENGTHS)
    if attempt.framing is Framing.BOTH:
        return str(size + draw.randrange(2))
    return str(size)


def pieces(attempt: Attempt) -> Iterator[bytes]:
    """The bytes of a request, in the pieces in which they are sent."""
    framing, data, draw = attempt.framing, attempt.body.data, random.Random(attempt.salt)
    in_chunks = framing in {Framing.CHUNKED, Framing.BAD_CHUNK, Framing.BOTH}
    lines = [f"POST {protocol.SCORE_PATH} HTTP/1.1", "Host: 127.0.0.1", f"Content-Type: {attempt.body.media}"]
    lines += [f"{name}: {value}" for name, value in attempt.headers]
    if in_chunks:
        lines.append("Transfer-Encoding: chunked")
    if not in_chunks or framing is Framing.BOTH:
        lines.append(f"Content-Length: {sent_length(attempt)}")
    head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
    if framing is Framing.GARBLED:
        yield draw.choice(MUTATIONS)(head, draw)
    elif framing is Framing.CUT:
        yield head + data[: draw.randrange(len(data) + 1)]
    elif framing is Framing.SLOW:
        yield head
        yield from _split(data, draw)
    elif in_chunks:
        chunks = list(_split(data, draw))
        bad = draw.randrange(len(chunks) + 1) if framing is Framing.BAD_CHUNK else None
        sizes = [f"{len(chunk):x}" for chunk in chunks]
        if bad is not None and bad < len(chunks):
            sizes[bad] = draw.choice(WRONG_SIZES).format(len(chunks[bad]) + 1)
        ends = b"0\r\n\r\n" if bad != len(chunks) else b"zero\r\n\r\n"
        written = zip(sizes, chunks, strict=True)
        yield b"".join([head, *(b"%s\r\n%s\r\n" % (size.encode(), chunk) for size, chunk in written), ends])
    else:
        yield head + data


def _split(data: bytes, draw: random.Random) -> list[bytes]:
    """Cut into one to five pieces, none of them empty."""
    cuts = sorted({draw.randrange(len(data)) for _ in range(4)} - {0}) if data else []
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True) if data]
