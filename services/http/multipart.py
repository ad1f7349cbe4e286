"""Read a `multipart/form-data` body (RFC 7578) that lies in memory as a whole: what `curl -F` sends."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from services.images import Batch, BodyMalformed, BodyTooLarge, decode_files
from services.protocol import Limits

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FILES, PROMPTS = "images", "prompts"
PART_HEADERS = 8
HEADER_BYTES = 2048
PLAIN_ENCODINGS = {b"", b"7bit", b"8bit", b"binary"}

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of each malformed body; the answer says so


class _Reader:
    """Collects the parts of a form as views of the body, which is parsed in one piece."""

    def __init__(self, limits: Limits) -> None:
        self.files: list[memoryview] = []
        self.prompts: list[str] = []
        self.ended = False
        self._limits = limits
        self._parts = 0
        self._headers: dict[bytes, bytes] = {}
        self._name = b""
        self._data = memoryview(b"")

    def begin(self) -> None:
        self._parts += 1
        most = 2 * self._limits.max_images
        if self._parts > most:
            raise BodyTooLarge(
                f"more than {most} parts in the form, limit {self._limits.max_images} images with a prompt each: "
                "split the batch"
            )
        self._headers = {}
        self._data = memoryview(b"")

    def header_field(self, body: bytes, start: int, end: int) -> None:
        self._name = bytes(body[start:end]).lower()

    def header_value(self, body: bytes, start: int, end: int) -> None:
        self._headers[self._name] = bytes(body[start:end])

    def data(self, body: bytes, start: int, end: int) -> None:
        assert not self._data, "a body parsed in one piece has each part in one piece"
        self._data = memoryview(body)[start:end]

    def end(self) -> None:
        if self._headers.get(b"content-transfer-encoding", b"").lower() not in PLAIN_ENCODINGS:
            raise BodyMalformed("a part has a Content-Transfer-Encoding: send the file's bytes as they are")
        disposition, options = parse_options_header(self._headers.get(b"content-disposition", b"").decode("latin-1"))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        is_file = b"filename" in options
        if disposition != b"form-data" or (name, is_file) not in {(FILES, True), (PROMPTS, False)}:
            raise BodyMalformed(
                f"part {self._parts - 1} of the form is {'a file' if is_file else 'text'} named {name[:40]!r}: send "
                f"files named {FILES!r} and texts named {PROMPTS!r}, as in curl -F {FILES}=@a.png -F {PROMPTS}=TEXT"
            )
        if is_file:
            self.files.append(self._data)
            return
        try:
            self.prompts.append(str(self._data, "utf-8"))
        except UnicodeDecodeError:
            raise BodyMalformed(f"prompt {len(self.prompts)} is not UTF-8: send it as UTF-8") from None

    def finish(self) -> None:
        self.ended = True


def decode_multipart(body: bytes | bytearray, limits: Limits, parameters: Mapping[str, str]) -> Batch:
    """Read a batch from a form of picture files named `images` and, if any, texts named `prompts`.

    Args:
        body: the whole form.
        limits: bounds to hold it to; `max_body_bytes` also bounds the decoded pixels.
        parameters: of the Content-Type: the form's `boundary`.

    Returns:
        The batch, with images of any mix of sizes, files and prompts each in the order of their parts.

    Raises:
        BodyMalformed, BodyTooLarge, ItemInvalid: see `services.images`.
    """
    boundary = parameters.get("boundary", "")
    if not 1 <= len(boundary) <= 70 or not boundary.isascii():
        raise BodyMalformed(f"the form's boundary has {len(boundary)} characters, must have 1 to 70 of ASCII: name it")
    reader = _Reader(limits)
    callbacks: MultipartCallbacks = {
        "on_part_begin": reader.begin,
        "on_header_field": reader.header_field,
        "on_header_value": reader.header_value,
        "on_part_data": reader.data,
        "on_part_end": reader.end,
        "on_end": reader.finish,
    }
    try:
        parser = MultipartParser(boundary, callbacks, max_header_count=PART_HEADERS, max_header_size=HEADER_BYTES)
        parser.write(body)  # type: ignore[arg-type]  # a bytearray has all the methods that it uses
    except FormParserError as error:
        raise BodyMalformed(f"the form cannot be read ({error}): send multipart/form-data as RFC 7578 has it") from None
    if not reader.ended:
        raise BodyMalformed("the form ends before its last boundary: send it whole")
    if not reader.files:
        raise BodyMalformed(
            f"the form holds no file named {FILES!r}: send at least one, as curl -F {FILES}=@a.png does"
        )
    return decode_files((bytes(view) for view in reader.files), len(reader.files), reader.prompts or None, limits)
