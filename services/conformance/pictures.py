"""The pictures that a service is tried with, and the bodies that carry them.

Shape suffixes: H height and W width in pixels, C = 3 channels (RGB).
"""

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from services import protocol
from services.images import encode_batch, encode_png
from services.protocol import Limits

COUNT = 6
"""Pictures of a usual batch: few, for a slow reward; enough that an order can hardly be met by chance."""
SIDE = 32
FILE_MEDIA = (protocol.MEDIA_JSON, protocol.MEDIA_MULTIPART)
"""The bodies that carry files, and so pictures of several sizes, and what is no picture."""
KNOWN_MEDIA = (protocol.MEDIA_JSON, protocol.MEDIA_SAFETENSORS, protocol.MEDIA_MULTIPART)
"""The bodies of the contract, in the order in which the kit prefers them."""


@dataclass(frozen=True, slots=True)
class Body:
    """A request's body and its Content-Type."""

    content: bytes
    content_type: str


def make_images(limits: Limits, count: int = COUNT) -> list[NDArray[np.uint8]]:
    """Images, uint8 (H, W, 3), of one size within the limits, that most rewards tell apart.

    Each has a colour, a brightness and a roughness of its own.
    """
    side = min(SIDE, math.isqrt(limits.max_pixels))
    images_HWC = []
    for index in range(count):
        rng = np.random.default_rng(index)
        ramp_HW = np.linspace(0, 1, side)[:, None] * np.linspace(1, 0.2, side)[None, :]
        colour_C = rng.uniform(0.2, 1, 3) * (index + 1) / count
        noise_HWC = rng.normal(0, 0.04 * index, (side, side, 3))
        image_HWC = 0.6 * colour_C + 0.4 * ramp_HW[:, :, None] + noise_HWC
        images_HWC.append(np.round(255 * image_HWC.clip(0, 1)).astype(np.uint8))
    return images_HWC


def make_prompts(limits: Limits, count: int = COUNT) -> list[str]:
    """Texts that differ, as far as the limit on their length lets them."""
    things = ("a bright photo", "an old picture", "a painting", "a red house", "a cat", "noise")
    return [things[index % len(things)][: limits.max_prompt_chars] for index in range(count)]


def encode(media: str, images_HWC: Sequence[NDArray[np.uint8]], prompts: Sequence[str] | None) -> Body:
    """Write a batch as one of the contract's bodies; for safetensors all images must have one size."""
    if media == protocol.MEDIA_SAFETENSORS:
        return Body(encode_batch(np.stack(images_HWC), prompts), media)
    return encode_files(media, [encode_png(image_HWC) for image_HWC in images_HWC], prompts)


def encode_files(media: str, files: Sequence[bytes], prompts: Sequence[str] | None) -> Body:
    """Write files, whatever they hold, as JSON or as a form."""
    if media == protocol.MEDIA_JSON:
        body: dict[str, object] = {"images": [base64.b64encode(file).decode() for file in files]}
        if prompts is not None:
            body["prompts"] = list(prompts)
        return Body(json.dumps(body).encode(), media)
    form = httpx.Request(
        "POST",
        "http://form.invalid",
        files=[("images", (f"{index}.png", file, "image/png")) for index, file in enumerate(files)],
        data={} if prompts is None else {"prompts": list(prompts)},
    )
    return Body(form.read(), form.headers["Content-Type"])


def picture_file(picture: Image.Image, kind: str) -> bytes:
    """Write a picture of any mode as PNG, JPEG or lossless WebP."""
    file = io.BytesIO()
    picture.save(file, format=kind, lossless=True)
    return file.getvalue()


def large_picture(pixels: int) -> bytes:
    """A black PNG of more pixels than these, in few bytes."""
    side = math.isqrt(pixels) + 1
    return picture_file(Image.new("1", (side, side)), "PNG")
