"""The work that every contender is given: a body in, scores out; the same code in each environment.

Shape suffixes: B images of a batch, H height and W width in pixels, C = 3 channels (RGB).
"""

import struct
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from services.images import decode_batch, decode_picture
from services.protocol import Limits
from services.rewards.brightness import Brightness

LIMITS = Limits()
MAX_BATCH = 64
MAX_WAIT_S = 0.003

Score = Callable[[Sequence[bytes]], list[list[float]]]


def tensors(bodies: Sequence[bytes]) -> list[NDArray[np.uint8]]:
    """The images (B, H, W, 3) of each safetensors body, without a copy: all of ours are of one size."""
    images = []
    for body in bodies:
        batch = decode_batch(body, LIMITS)
        (length,) = struct.unpack_from("<Q", body)
        shape = (len(batch.images_HWC), *batch.images_HWC[0].shape)
        images.append(np.frombuffer(body, np.uint8, offset=8 + length).reshape(shape))
    return images


def scorer(workload: str) -> Score:
    """What scores bodies of a workload; several of them in one forward pass.

    Args:
        workload: `w1` (brightness of tensors), `w2` (brightness of a picture) or `w3` (an encoder of tensors).
    """
    if workload == "w3":
        from benchmarks.peers.encoder import Encoder  # noqa: PLC0415 - torch, which only this one needs

        encoder = Encoder()
        encoder.warmup()
        return lambda bodies: [encoder.score(images, None).tolist() for images in tensors(bodies)]
    brightness = Brightness()
    if workload == "w1":
        return lambda bodies: [brightness.score(images, None).tolist() for images in tensors(bodies)]

    def pictures(bodies: Sequence[bytes]) -> list[list[float]]:
        rooms = LIMITS.max_body_bytes
        images = [decode_picture(bytes(body), index, LIMITS, room_bytes=rooms) for index, body in enumerate(bodies)]
        return [[score] for score in brightness.score(np.stack(images), None).tolist()]

    return pictures
