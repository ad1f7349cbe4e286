"""How much a body holds, counted before it is parsed or decoded, which would itself be the harm."""

import io

from services.protocol import Limits

MOST_SCANS = 100
"""Scans of a JPEG, each of which passes over the whole picture again: encoders write 10 in colour, and 18 of CMYK."""
SCAN_HEADS = (b"\xff\xda\0\x08\x01", b"\xff\xda\0\x0a\x02", b"\xff\xda\0\x0c\x03", b"\xff\xda\0\x0e\x04")
"""How a scan of one to four components begins: marker, length, components; decoders take no other. Compressed pixels
never look like that. Pictures that follow in the same file, as those of a camera for depth, count; a film does not."""

MOST_READS = 100_000
"""Of a picture file: decoders read each part of one up to four times, and a PNG of 64 MiB is written in some 8,000."""
MARKS = {b'"': "quotation marks", b",": "commas", b"[": "brackets", b"{": "braces"}
"""What begins or parts the values of JSON, of which each takes many times its bytes once parsed."""
HEADER_ROOM_BYTES = 2**16
"""What a safetensors header may hold besides prompts, such as other programs' metadata."""
HEADER_COMMAS = 1000
"""Likewise, outside its strings: of tensor and prompts there are eight."""
PROMPT_CHAR_BYTES = len(r"\\ud83d\\ude00")
"""The most that encoders make of a character, in a JSON list that is a string of the header."""
PROMPT_FRAME_BYTES = len(r"\"\", ")
"""What they put around a prompt there."""


class TooManyReads(Exception):
    """A file is cut into more parts than a picture has."""


class PictureFile(io.BytesIO):
    """A picture file whose decoder may read `MOST_READS` times: it keeps a note of each part, however small."""

    _reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self._reads += 1
        if self._reads > MOST_READS:
            raise TooManyReads
        return super().read(size)


def scans_of(data: bytes) -> int:
    """The scans of a JPEG, thumbnails included."""
    return sum(data.count(head) for head in SCAN_HEADS)


def most_marks(limits: Limits) -> int:
    """The most of each kind of `MARKS` in a JSON body that keeps its limits.

    Those between its items are few; each character of a prompt may be one as well.
    """
    return limits.max_images * (4 + limits.max_prompt_chars) + 8


def header_bytes(limits: Limits) -> int:
    """Bytes of a safetensors header that has as many and as long prompts as there may be."""
    prompts = limits.max_images * (PROMPT_CHAR_BYTES * limits.max_prompt_chars + PROMPT_FRAME_BYTES)
    return HEADER_ROOM_BYTES + prompts


def has_more_commas(text: str, most: int) -> bool:
    """Whether JSON has more commas outside its strings, or more strings than so many commas could part."""
    bare = text.replace("\\\\", "").replace('\\"', "")  # now all quotation marks begin or end a string
    if bare.count('"') > 4 * (most + 1):
        return True
    return sum(outside.count(",") for outside in bare.split('"')[::2]) > most
