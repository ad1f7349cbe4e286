"""What is sent to a service: in which form, and how many images at once.

Shape suffixes: B images of a batch, H height and W width in pixels, C = 3 channels (RGB).
"""

import json
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from services import protocol
from services.client.errors import RewardAnswerInvalid
from services.images import HEADER_LIMIT_BYTES, encode_batch, encode_json
from services.protocol import Info

Encoder = Callable[[NDArray[np.uint8], Sequence[str] | None], bytes]

ENCODERS: dict[str, Encoder] = {protocol.MEDIA_SAFETENSORS: encode_batch, protocol.MEDIA_JSON: encode_json}
"""The bodies that the client can write, the best first."""
FRAME_BYTES = 1024
"""Room for what a body holds besides images and prompts."""


def choose_media(info: Info, url: str) -> str:
    """The best media type that both sides know.

    Raises:
        RewardAnswerInvalid: there is none.
    """
    for media in ENCODERS:
        if media in info.bodies:
            return media
    raise RewardAnswerInvalid(
        f"{url} accepts {', '.join(info.bodies)}, this client sends {' or '.join(ENCODERS)}: let the service accept one"
    )


def images_at_once(info: Info, media: str, images_BHWC: NDArray[np.uint8], prompts: Sequence[str] | None) -> int:
    """How many images of a batch fit into one request, at least one.

    Args:
        info: what the service accepts.
        media: the type of the body, a key of `ENCODERS`.
        images_BHWC: uint8 (B, H, W, 3).
        prompts: one string for each image, or None.

    Returns:
        A number that keeps the limits on images and bytes; 1 also where a single image may exceed them, for the
        service is the judge of that.
    """
    limits = info.limits
    # Quoted twice: as an item of a JSON list, which is a string within the JSON header of safetensors.
    prompt_bytes = max((len(json.dumps(json.dumps(prompt))) + 4 for prompt in prompts), default=0) if prompts else 0
    each = int(images_BHWC[0].nbytes)
    if media == protocol.MEDIA_JSON:
        each = _base64_png_bytes(images_BHWC.shape[1], each)
    count = min(limits.max_images, (limits.max_body_bytes - FRAME_BYTES) // (each + prompt_bytes))
    if prompt_bytes:
        count = min(count, (HEADER_LIMIT_BYTES - FRAME_BYTES) // prompt_bytes)
    return max(1, count)


def _base64_png_bytes(height: int, raw_bytes: int) -> int:
    """The most that one image takes as base64 of a PNG.

    Each row has a byte more; noise grows by up to 9/8 where zlib uses its fixed code, and base64 makes 4 bytes of 3.
    """
    return (raw_bytes + height) * 3 // 2 + FRAME_BYTES
