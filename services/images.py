"""Batches of images as bytes, and back: safetensors for programs, PNG, JPEG and WebP for people.

Shape suffixes: B images of a batch, H height and W width in pixels, C = 3 channels (RGB).

Errors of a body, each with the HTTP status that stands for it::

    BodyError (ValueError)
    ├── BodyMalformed   400  not what its media type promises
    ├── BodyTooLarge    413  more images, pixels or bytes than the limits allow
    └── ItemInvalid     422  one image or prompt, named by its `index`
"""

import base64
import binascii
import io
import json
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from services import bounds
from services.protocol import Limits, ScoreRequest
from services.rgb import to_rgb

ImagesBHWC = NDArray[np.uint8]

FORMATS = ("PNG", "JPEG", "WEBP")
"""The picture formats that are decoded; anything else is refused before its decoder sees a byte."""

TENSOR_NAME = "images"
PROMPTS_KEY = "prompts"
HEADER_LIMIT_BYTES = 8 * 2**20
HEADER_LENGTH = struct.Struct("<Q")

PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
PNG_DEPTH_BYTE = 24


class BodyError(ValueError):
    """A body that cannot be scored; see the module for the tree."""

    status: ClassVar[int] = 400


class BodyMalformed(BodyError):
    """The bytes are not what their media type promises."""


class BodyTooLarge(BodyError):
    """The batch exceeds a limit."""

    status: ClassVar[int] = 413


class ItemInvalid(BodyError):
    """One image or prompt is invalid; `index` is its position in the batch."""

    status: ClassVar[int] = 422

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


@dataclass(frozen=True, slots=True)
class Batch:
    """Images in the order of the request, of one size or of several.

    Attributes:
        images_HWC: one uint8 array (H, W, 3) for each image; they may be read-only views of the body.
        prompts: one prompt for each image, or None.
        whole_BHWC: the same images as one array, where they lie in memory like that; else None.
    """

    images_HWC: Sequence[NDArray[np.uint8]]
    prompts: Sequence[str] | None
    whole_BHWC: ImagesBHWC | None = None

    def part(self, which: slice) -> "Batch":
        """Some of the images, with their prompts."""
        prompts = None if self.prompts is None else self.prompts[which]
        return Batch(self.images_HWC[which], prompts, None if self.whole_BHWC is None else self.whole_BHWC[which])


def check_images(images_BHWC: ImagesBHWC, prompts: Sequence[str] | None = None) -> None:
    """Check that an array is a batch of images and that the prompts fit it.

    Args:
        images_BHWC: any array; only uint8 (B, H, W, 3) with no side of 0 passes.
        prompts: one string for each image, or None.

    Raises:
        ValueError: wrong dtype, shape or number of prompts, or a prompt that is no string.
    """
    if images_BHWC.dtype != np.uint8:
        raise ValueError(f"images are {images_BHWC.dtype}, expected uint8 in 0–255: round and convert them first")
    if images_BHWC.ndim != 4 or images_BHWC.shape[3] != 3 or 0 in images_BHWC.shape:
        raise ValueError(f"images have shape {images_BHWC.shape}, expected (B, H, W, 3) with no side of 0")
    if prompts is None:
        return
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("prompts must be a sequence of strings, one for each image")
    if len(prompts) != len(images_BHWC):
        raise ValueError(f"{len(prompts)} prompts for {len(images_BHWC)} images: give one for each, or none")


def encode_batch(images_BHWC: ImagesBHWC, prompts: Sequence[str] | None = None) -> bytes:
    """Write a batch as safetensors: tensor `images`, prompts as a JSON list in the metadata.

    Args:
        images_BHWC: uint8 (B, H, W, 3), 0–255.
        prompts: one string for each image, or None.

    Returns:
        The file's bytes; any safetensors library reads them.

    Raises:
        ValueError: the array is no batch of images, or the prompts do not fit it.

    Source: the safetensors format, https://huggingface.co/docs/safetensors.
    """
    check_images(images_BHWC, prompts)
    return b"".join((batch_head(images_BHWC.shape, prompts), np.ascontiguousarray(images_BHWC).data))


def batch_head(shape: Sequence[int], prompts: Sequence[str] | None) -> bytes:
    """What a safetensors file holds before the pixels of images of this shape, (B, H, W, 3)."""
    header: dict[str, Any] = {TENSOR_NAME: {"dtype": "U8", "shape": list(shape), "data_offsets": [0, math.prod(shape)]}}
    if prompts is not None:
        header["__metadata__"] = {PROMPTS_KEY: json.dumps(list(prompts))}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    return HEADER_LENGTH.pack(len(text)) + text


def decode_batch(body: bytes | bytearray | memoryview, limits: Limits) -> Batch:
    """Read a batch from safetensors without copying its pixels.

    Args:
        body: the bytes of the file; they must not change while the batch is in use.
        limits: bounds to hold it to.

    Returns:
        The batch; its images are read-only views of `body` (B arrays of one size).

    Raises:
        BodyMalformed, BodyTooLarge, ItemInvalid: see the module.
    """
    view = memoryview(body).toreadonly()
    header, data = _split_safetensors(view, min(HEADER_LIMIT_BYTES, bounds.header_bytes(limits)))
    tensor = header.get(TENSOR_NAME)
    metadata = header.get("__metadata__", {})
    others = set(header) - {TENSOR_NAME, "__metadata__"}
    if not isinstance(tensor, dict) or not isinstance(metadata, dict) or others:
        raise BodyMalformed(f"the file must hold one tensor named {TENSOR_NAME!r} and no other")
    shape = tensor.get("shape")
    if not isinstance(shape, list) or not all(type(side) is int for side in shape):
        raise BodyMalformed("the tensor's shape must be a list of four integers (B, H, W, 3)")
    if tensor.get("dtype") != "U8" or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
        raise BodyMalformed(
            f"images are {str(tensor.get('dtype'))[:20]} {str(shape)[:60]}, expected U8 (B, H, W, 3) with no side of 0"
        )
    if tensor.get("data_offsets") != [0, len(data)] or math.prod(shape) != len(data):
        raise BodyMalformed(
            f"{len(data)} bytes of data for shape {str(shape)[:60]}: the file is truncated, padded or mislabelled"
        )
    _check_count(shape[0], limits)
    if shape[1] * shape[2] > limits.max_pixels:
        raise BodyTooLarge(
            f"images of {shape[1]}×{shape[2]} exceed the limit of {limits.max_pixels} pixels: send smaller ones"
        )
    images_BHWC = np.frombuffer(data, dtype=np.uint8).reshape(shape)
    prompts = _read_prompts(metadata.get(PROMPTS_KEY), shape[0], limits)
    return Batch(list(images_BHWC), prompts, images_BHWC)


def decode_json(body: bytes | bytearray, limits: Limits) -> Batch:
    """Read a batch from the JSON body that `ScoreRequest` describes.

    Args:
        body: UTF-8 JSON.
        limits: bounds to hold it to; `max_body_bytes` also bounds the decoded pixels.

    Returns:
        The batch, with images of any mix of sizes.

    Raises:
        BodyMalformed, BodyTooLarge, ItemInvalid: see the module.
    """
    most = bounds.most_marks(limits)
    for mark, name in bounds.MARKS.items():
        if (count := body.count(mark)) > most:
            raise BodyTooLarge(f"{count} {name}, limit {most}: send fewer images or shorter prompts")
    try:
        request = ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise BodyMalformed(f"{where}: {first['msg']}; expected {{'images': [base64, …], 'prompts': […]}}") from None
    return decode_files(_base64_files(request.images), len(request.images), request.prompts, limits)


def decode_file(body: bytes | bytearray, limits: Limits) -> Batch:
    """Read a batch of one image, without a prompt, from its PNG, JPEG or WebP file.

    Args:
        body: the bytes of the file.
        limits: bounds to hold it to.

    Returns:
        The batch.

    Raises:
        BodyTooLarge, ItemInvalid: see the module.
    """
    return decode_files([bytes(body)], 1, None, limits)


def decode_files(files: Iterable[bytes], count: int, prompts: Sequence[str] | None, limits: Limits) -> Batch:
    """Decode the picture files of one request.

    Args:
        files: the bytes of each file; they are taken one after the other.
        count: how many there are.
        prompts: one for each file, or None.
        limits: bounds to hold them to; `max_body_bytes` also bounds the decoded pixels.

    Returns:
        The batch, with images of any mix of sizes.

    Raises:
        BodyMalformed, BodyTooLarge, ItemInvalid: see the module.
    """
    _check_count(count, limits)
    _check_prompts(prompts, count, limits)
    room = limits.max_body_bytes
    images_HWC = []
    for index, data in enumerate(files):
        images_HWC.append(decode_picture(data, index, limits, room_bytes=room))
        room -= images_HWC[-1].nbytes
    return Batch(images_HWC, prompts)


def decode_picture(data: bytes, index: int, limits: Limits, *, room_bytes: int) -> NDArray[np.uint8]:
    """Decode one PNG, JPEG or WebP file to RGB.

    Rotation by EXIF is applied; grey is repeated over the channels; transparency is laid over white; of 16 bits the
    upper 8 count; CMYK is converted by Pillow's rule; colour profiles are ignored; of an MPO the first picture counts;
    an animation is refused. docs/contract.md has the table.

    Args:
        data: the bytes of the file.
        index: position in the batch, for the message of an error.
        limits: bounds to hold it to.
        room_bytes: bytes that the decoded pixels may still take.

    Returns:
        uint8 (H, W, 3).

    Raises:
        ItemInvalid: not a picture, truncated, animated, or too many pixels, scans or parts.
        BodyTooLarge: the batch's pixels take more than its room.
    """
    try:
        with Image.open(bounds.PictureFile(data), formats=FORMATS) as picture:
            pixels = picture.width * picture.height
            if pixels > limits.max_pixels:
                raise ItemInvalid(
                    index,
                    f"image {index} is {picture.width}×{picture.height}, "
                    f"over the limit of {limits.max_pixels} pixels: send a smaller one",
                )
            if pixels * 3 > room_bytes:
                raise BodyTooLarge(
                    f"the decoded images take more than {limits.max_body_bytes} bytes: send fewer or smaller ones"
                )
            if picture.format != "MPO" and getattr(picture, "n_frames", 1) != 1:
                raise ItemInvalid(index, f"image {index} is animated: send a single frame")
            if picture.format in {"JPEG", "MPO"} and (scans := bounds.scans_of(data)) > bounds.MOST_SCANS:
                raise ItemInvalid(
                    index, f"image {index} is a JPEG of {scans} scans, limit {bounds.MOST_SCANS}: write it anew"
                )
            if picture.format == "PNG" and data.rfind(PNG_END) == -1:
                raise ItemInvalid(index, f"image {index} is cut off before the end of its PNG: send a whole file")
            picture.load()
            if picture.format == "PNG" and data[PNG_DEPTH_BYTE] == 16:
                picture.info.pop("transparency", None)  # a 16-bit key, which Pillow would compare with 8-bit pixels
            return to_rgb(picture)
    except (BodyError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ItemInvalid(
            index, f"image {index} has more than {limits.max_pixels} pixels: send a smaller one"
        ) from None
    except bounds.TooManyReads:
        raise ItemInvalid(
            index, f"image {index} has more parts than {bounds.MOST_READS} reads take: write it anew"
        ) from None
    except Exception as error:  # noqa: BLE001 - on hostile bytes a decoder fails in any way; all mean the same
        reason = type(error).__name__
        raise ItemInvalid(
            index, f"image {index} cannot be read as {', '.join(FORMATS)} ({reason}): send a whole file"
        ) from None


def encode_json(images_BHWC: ImagesBHWC, prompts: Sequence[str] | None = None) -> bytes:
    """Write a batch as the JSON body, with each image as a PNG: slow, and read by every service.

    Args:
        images_BHWC: uint8 (B, H, W, 3), 0–255.
        prompts: one string for each image, or None.

    Returns:
        UTF-8 JSON.

    Raises:
        ValueError: the array is no batch of images, or the prompts do not fit it.
    """
    check_images(images_BHWC, prompts)
    pictures = [base64.b64encode(encode_png(image_HWC)).decode() for image_HWC in images_BHWC]
    body: dict[str, Any] = {"images": pictures}
    if prompts is not None:
        body["prompts"] = list(prompts)
    return json.dumps(body).encode()


def encode_png(image_HWC: NDArray[np.uint8]) -> bytes:
    """Write one image, uint8 (H, W, 3), as a PNG file (lossless)."""
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _split_safetensors(view: memoryview, most_bytes: int) -> tuple[dict[str, Any], memoryview]:
    """Return the header and the data of a safetensors file."""
    if len(view) < HEADER_LENGTH.size:
        raise BodyMalformed(f"a body of {len(view)} bytes is no safetensors file: send one")
    (length,) = HEADER_LENGTH.unpack_from(view)
    start = HEADER_LENGTH.size
    if length > min(most_bytes, len(view) - start):
        raise BodyMalformed(
            f"the safetensors header claims {length} bytes of {len(view) - start} (limit {most_bytes}): "
            "send a whole safetensors file"
        )
    try:
        text = str(view[start : start + length], "utf-8")  # of bytes json would take UTF-16, too
        has_more = bounds.has_more_commas(text, bounds.HEADER_COMMAS)
        header = None if has_more else json.loads(text)
    except (ValueError, RecursionError):
        raise BodyMalformed("the safetensors header is not JSON: send a whole safetensors file") from None
    if has_more:
        raise BodyMalformed(
            f"the safetensors header has more than {bounds.HEADER_COMMAS} commas: leave other metadata out"
        )
    if not isinstance(header, dict):
        raise BodyMalformed("the safetensors header is no JSON object: send a whole safetensors file")
    return header, view[start + length :]


def _read_prompts(text: object, count: int, limits: Limits) -> list[str] | None:
    """Read the prompts from the metadata of a safetensors file."""
    if text is None:
        return None
    if isinstance(text, str) and bounds.has_more_commas(text, limits.max_images):
        raise BodyMalformed(f"more prompts than {limits.max_images} images may have: give one for each, or none")
    try:
        prompts = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        prompts = None
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise BodyMalformed("the metadata's 'prompts' must be a JSON list of strings")
    _check_prompts(prompts, count, limits)
    return prompts


def _check_count(count: int, limits: Limits) -> None:
    if count > limits.max_images:
        raise BodyTooLarge(f"{count} images in one request, limit {limits.max_images}: split the batch")


def _check_prompts(prompts: Sequence[str] | None, count: int, limits: Limits) -> None:
    if prompts is None:
        return
    if len(prompts) != count:
        raise BodyMalformed(f"{len(prompts)} prompts for {count} images: give one for each, or none")
    for index, prompt in enumerate(prompts):
        if len(prompt) > limits.max_prompt_chars:
            raise ItemInvalid(
                index, f"prompt {index} has {len(prompt)} characters, limit {limits.max_prompt_chars}: shorten it"
            )
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ItemInvalid(index, f"prompt {index} holds half a surrogate pair: send whole characters") from None


def _base64_files(texts: Sequence[str]) -> Iterator[bytes]:
    for index, text in enumerate(texts):
        try:
            yield base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise ItemInvalid(index, f"image {index} is not base64: send the file's bytes in standard base64") from None
