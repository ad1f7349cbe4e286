"""Bodies that are right: what the mutations start from, and what must be scored in between."""

import io
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from services import protocol
from services.images import encode_batch, encode_json
from services.rewards.brightness import Brightness

BOUNDARY = "one-boundary"
FORM = f"{protocol.MEDIA_MULTIPART}; boundary={BOUNDARY}"
LARGE_SIDE = 600  # of one image of about a mebibyte
LIMITS = {"REWARD_MAX_IMAGES": "32", "REWARD_MAX_PIXELS": str(LARGE_SIDE**2), "REWARD_MAX_PROMPT_CHARS": "100"}
"""Low ones, so that small bodies exceed them."""


@dataclass(frozen=True)
class Body:
    """A body and its Content-Type."""

    media: str
    data: bytes = field(repr=False)


def noise(draw: random.Random, *shape: int) -> NDArray[np.uint8]:
    """Random bytes."""
    return np.frombuffer(draw.randbytes(int(np.prod(shape))), dtype=np.uint8).reshape(shape)


def valid(draw: random.Random, *, most: int = 12) -> tuple[Body, list[float]]:
    """A body unlike any other, and the scores that it must get."""
    images_BHWC = noise(draw, draw.randint(1, most), draw.randint(1, 16), draw.randint(1, 16), 3)
    prompts = ["ein Bild ✓"] * len(images_BHWC) if draw.random() < 0.3 else None
    scores: list[float] = Brightness().score(images_BHWC, prompts).tolist()
    if draw.random() < 0.7:
        return Body(protocol.MEDIA_SAFETENSORS, encode_batch(images_BHWC, prompts)), scores
    return Body(protocol.MEDIA_JSON, encode_json(images_BHWC, prompts)), scores


def large(draw: random.Random) -> Body:
    """A batch of some mebibytes."""
    images_BHWC = noise(random.Random(draw.getrandbits(32)), draw.randint(1, 4), LARGE_SIDE, LARGE_SIDE, 3)
    return Body(protocol.MEDIA_SAFETENSORS, encode_batch(images_BHWC))


@cache
def bodies() -> Sequence[Body]:
    """Batches in all kinds of bodies, with all kinds of pictures."""
    draw = random.Random(0)
    files = pictures()
    few = [file for _, file in files[:3]]
    found = [
        Body(protocol.MEDIA_SAFETENSORS, encode_batch(noise(draw, 3, 5, 7, 3))),
        Body(protocol.MEDIA_SAFETENSORS, encode_batch(noise(draw, 1, 16, 16, 3), ["a cat"])),
        Body(protocol.MEDIA_SAFETENSORS, encode_batch(noise(draw, 20, 2, 2, 3), ["é\u2028"] * 20)),
        Body(protocol.MEDIA_SAFETENSORS, encode_batch(noise(draw, 40, 2, 2, 3))),  # too many
        Body(
            protocol.MEDIA_SAFETENSORS, encode_batch(np.zeros((1, 1, LARGE_SIDE**2 + 1, 3), np.uint8))
        ),  # too many pixels
        Body(protocol.MEDIA_JSON, encode_json(noise(draw, 2, 4, 4, 3), ["one", "x" * 101])),  # too long a prompt
        Body(protocol.MEDIA_JSON, encode_json(noise(draw, 2, 4, 4, 3), ["one", "two"])),
        Body(protocol.MEDIA_JSON, encode_json(noise(draw, 1, 8, 8, 3))),
        Body(FORM, form(few, ["one", "zwei", "\U0001f408"])),
    ]
    alone = [
        Body(media, file) for media, (_, file) in zip(itertools.cycle(protocol.MEDIA_PICTURES), files, strict=False)
    ]
    return [*found, *(Body(FORM, form([file], [])) for _, file in files), *alone]


@cache
def pictures() -> Sequence[tuple[str, bytes]]:
    """Picture files of every format and mode that is read, and some that are not, each with its name."""
    draw = random.Random(1)
    rgb = Image.fromarray(noise(draw, 9, 12, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    saved = [
        ("png", rgb, {}),
        ("jpeg", rgb, {"exif": exif}),
        ("webp", rgb, {"lossless": True}),
        ("png", rgb.convert("RGBA"), {}),
        ("png", rgb.convert("P"), {"transparency": 3}),
        ("png", rgb.convert("1"), {}),
        ("png", Image.fromarray(noise(draw, 6, 6, 2).view("<u2")[..., 0]), {}),
        ("jpeg", rgb.convert("CMYK"), {}),
        ("jpeg", rgb.convert("L"), {"progressive": True}),
        ("webp", rgb.convert("RGBA"), {"quality": 40}),
        ("webp", rgb, {"save_all": True, "append_images": [rgb.rotate(180)]}),
        ("png", rgb, {"save_all": True, "append_images": [rgb.rotate(180)]}),
        ("gif", rgb.convert("P"), {}),
    ]
    return [(f"{number}.{kind}", _save(image, kind, options)) for number, (kind, image, options) in enumerate(saved)]


def form(files: Sequence[bytes], prompts: Sequence[str]) -> bytes:
    """A `multipart/form-data` body with the boundary of `FORM`."""
    parts = [(f'name="images"; filename="{number}"', file) for number, file in enumerate(files)]
    parts += [('name="prompts"', prompt.encode()) for prompt in prompts]
    lines = [
        b"--%s\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (BOUNDARY.encode(), names.encode(), data)
        for names, data in parts
    ]
    return b"".join(lines) + b"--%s--\r\n" % BOUNDARY.encode()


def deep_json(depth: int) -> bytes:
    """Lists in lists."""
    return json.dumps({"images": []}).encode().replace(b"[]", b"[" * depth + b"]" * depth)


def _save(image: Image.Image, kind: str, options: dict[str, object]) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
