"""Requests that are wrong in one way or in several, made from bodies that are right."""

import enum
import random
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from services import protocol
from tests.fuzz.corpus import FORM, Body, bodies, deep_json, large, pictures

EXTREMES = (0, 1, 2, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
NUMBERS = ("-1", "0", "1e3", "1e400", "NaN", "9" * 30, "9" * 5000, "4294967296", "18446744073709551616", "0x10", "null")
TEXTS = ("\ufeff", "\0", "\u2028", "\U0001f408" * 300, "\\ud800", "\\u0000", "\\", '"', "{", "]", "\r\n\r\n", "--", ";")
BYTES = (
    b"\xff\xfe",
    b"\xc0\xaf",
    b"\xed\xa0\x80",
    b"\x80" * 9,
    b"IHDR",
    b"IEND",
    b"acTL",
    b"\xff\xd8\xff",
    b"Exif\0\0",
)
DEPTHS = (50, 900, 1000, 20_000)
MEDIA = (
    protocol.MEDIA_SAFETENSORS,
    protocol.MEDIA_JSON,
    FORM,
    protocol.MEDIA_MULTIPART,
    f"{protocol.MEDIA_MULTIPART}; boundary=",
    f"{protocol.MEDIA_MULTIPART}; boundary={'x' * 200}",
    f"{FORM}; boundary*=utf-8''x; charset=utf-16",
    f'{protocol.MEDIA_JSON}; charset="utf-7',
    *protocol.MEDIA_PICTURES,
    "text/plain",
    "",
    "\xe9\xff/;;;===",
    "a/" + 2000 * "b",
)
KEYS = ("one", "two", "three")
"""Idempotency keys that are used again and again, for different bodies."""
ODD_HEADERS: dict[tuple[str, str], int | None] = {
    ("Content-Encoding", "gzip"): 415,
    ("Content-Encoding", "identity"): None,
    ("Idempotency-Key", "two words"): 400,
    ("Idempotency-Key", "x" * 129): 400,
    ("Idempotency-Key", "\xe9"): 400,
    ("X-Deadline-Ms", "-1"): 400,
    ("X-Deadline-Ms", "1" * 15): None,
    ("X-Deadline-Ms", "1" * 30): 400,
    ("X-Deadline-Ms", "\xb2"): 400,
    ("X-Deadline-Ms", "1"): None,
    ("X-Request-Id", "\xe9 \t\x80" * 60): None,
    ("Authorization", "Bearer \xe9"): None,
    ("Accept", "text/html"): None,
    ("Expect", "100-continue"): None,
    ("X-Padding", "p" * 3000): None,
}
"""With the status that such a request gets whatever its body is, or None."""


class Framing(enum.Enum):
    """How a body lies on the wire."""

    LENGTH = "with its Content-Length"
    CHUNKED = "in chunks"
    SLOW = "in pieces with pauses"
    SHORT = "with a Content-Length that is too small"
    STALLED = "with a Content-Length that is too large"
    CUT = "and then the client leaves in the middle of it"
    NO_NUMBER = "with a Content-Length that is none"
    BAD_CHUNK = "in chunks of which one lies about its size"
    BOTH = "in chunks and with a Content-Length"
    GARBLED = "below a request line and headers that are damaged; without scores in any case"


@dataclass(frozen=True)
class Attempt:
    """A request that is to be sent.

    Attributes:
        body: and its media type.
        headers: further ones.
        framing: how the body is sent.
        salt: of what the framing does at random.
    """

    body: Body
    headers: tuple[tuple[str, str], ...] = ()
    framing: Framing = Framing.LENGTH
    salt: int = field(default=0, repr=False)


def flip(data: bytes, draw: random.Random) -> bytes:
    """Some bits are turned."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 6)):
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(data: bytes, draw: random.Random) -> bytes:
    """The end is missing."""
    return data[: draw.randrange(len(data))]


def drop(data: bytes, draw: random.Random) -> bytes:
    """A piece is missing."""
    start, end = _slice(data, draw)
    return data[:start] + data[end:]


def double(data: bytes, draw: random.Random) -> bytes:
    """A piece is there several times."""
    start, end = _slice(data, draw)
    return data[:start] + data[start:end] * draw.choice((2, 3, 40)) + data[end:]


def splice(data: bytes, draw: random.Random) -> bytes:
    """The beginning of another body or file, or a piece of it, comes in between."""
    others = [body.data for body in bodies()] + [file for _, file in pictures()]
    other = draw.choice(others)
    at = draw.randrange(len(data))
    start, end = _slice(other, draw)
    return data[:at] + (other[:end] if draw.randrange(2) else other[start:end]) + data[draw.randint(at, len(data)) :]


def lie(data: bytes, draw: random.Random) -> bytes:
    """A length in the file is another one, often an extreme."""
    form = draw.choice(("<Q", ">I", "<I", ">H", "<H"))
    size = struct.calcsize(form)
    value = draw.choice(EXTREMES) & ((1 << 8 * size) - 1)
    at = 0 if draw.randrange(3) == 0 else draw.randrange(len(data))
    return data[:at] + struct.pack(form, value) + data[at + size :]


def count(data: bytes, draw: random.Random) -> bytes:
    """A number in the text is another one, often huge."""
    found = list(re.finditer(rb"\d+", data[:2000]))
    if not found:
        return lie(data, draw)
    start, end = draw.choice(found).span()
    return data[:start] + draw.choice(NUMBERS).encode() + data[end:]


def write(data: bytes, draw: random.Random) -> bytes:
    """Text or bytes that decoders stumble over stand in between, or at the beginning of a string."""
    quotes = [found.end() for found in re.finditer(rb'"', data[:2000])]
    at = draw.choice(quotes) if quotes and draw.randrange(2) else draw.randrange(len(data))
    return data[:at] + draw.choice((*(text.encode() for text in TEXTS), *BYTES)) + data[at:]


def deepen(data: bytes, draw: random.Random) -> bytes:
    """Lists in lists, too deep for a reader that follows them."""
    depth = draw.choice(DEPTHS)
    if draw.randrange(2):
        return deep_json(depth)
    header = b'{"images":{"dtype":' + b"[" * depth + b"]" * depth + b"}}"
    return struct.pack("<Q", len(header)) + header + data


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flip, cut, drop, double, splice, lie, count, write, deepen,
)  # fmt: skip
RARE = {Framing.STALLED: 1, Framing.CUT: 4, Framing.SLOW: 4}
"""How often of 1000 those framings are drawn that take time; the others that are wrong come 20 times each."""


def mutate(body: Body, draw: random.Random) -> Body:
    """Change a body in up to three ways, and now and then its media type."""
    data = body.data
    for _ in range(draw.randint(0, 3)):
        data = draw.choice(MUTATIONS)(data, draw) if data else data
    return Body(draw.choice(MEDIA) if draw.randrange(8) == 0 else body.media, data)


def attempt(draw: random.Random, *, scale: int = 1) -> Attempt:
    """Make one request; the same for the same state of `draw`.

    Args:
        draw: all that is random.
        scale: how many times more often than in a long run the framings of `RARE` are drawn.
    """
    if draw.randrange(400) == 0:
        body = large(draw)
    elif draw.randrange(8) == 0:
        body = Body(draw.choice(MEDIA), draw.choice(pictures())[1])
    else:
        body = draw.choice(bodies())
    headers = []
    if draw.randrange(8) == 0:
        headers.append(draw.choice(list(ODD_HEADERS)))
    elif draw.randrange(8) == 0:
        headers.append((protocol.HEADER_IDEMPOTENCY_KEY, draw.choice(KEYS)))
    weights = [RARE.get(framing, 0) * scale or 20 for framing in Framing]
    weights[0] = 1000 - sum(weights[1:])
    (framing,) = draw.choices(list(Framing), weights)
    return Attempt(mutate(body, draw), tuple(headers), framing, draw.getrandbits(32))


def _slice(data: bytes, draw: random.Random) -> tuple[int, int]:
    start = draw.randrange(len(data))
    return start, min(len(data), start + draw.choice((1, 4, 30, 500)))
