"""How much a body holds, counted in its bytes before it is parsed or decoded, which would itself be the harm."""

from services.protocol import Limits

MOST_SCANS = 100
"""Scans of a JPEG, each of which passes over the whole picture again: encoders write 10 in colour, and 18 of CMYK."""
SCAN_HEADS = (b"\xff\xda\0\x08\x01", b"\xff\xda\0\x0a\x02", b"\xff\xda\0\x0c\x03", b"\xff\xda\0\x0e\x04")
"""How a scan of one to four components begins: marker, length, components; decoders take no other. Compressed pixels
never look like that, and what follows the picture in its file, such as a film, does not by chance."""


def scans_of(data: bytes) -> int:
    """The scans of a JPEG, thumbnails included."""
    return sum(data.count(head) for head in SCAN_HEADS)


MARKS = {b'"': "quotation marks", b",": "commas", b"[": "brackets", b"{": "braces"}
"""What begins or parts the values of JSON, of which each takes many times its bytes once parsed."""


def most_marks(limits: Limits) -> int:
    """The most of each kind of `MARKS` in a JSON body that keeps its limits.

    Those between its items are few; each character of a prompt may be one as well.
    """
    return limits.max_images * (4 + limits.max_prompt_chars) + 8
