"""From the bytes of a request to jobs for the queue, whichever body they came in."""

import functools
import hashlib
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from python_multipart.multipart import parse_options_header

from services import protocol
from services.batching.jobs import Job, split_batch
from services.batching.shared import Lease
from services.http.multipart import decode_multipart
from services.http.problems import ProblemError
from services.images import Batch, batch_head, decode_batch, decode_file, decode_json
from services.protocol import Limits

MEDIA_TYPES = (protocol.MEDIA_SAFETENSORS, protocol.MEDIA_JSON, protocol.MEDIA_MULTIPART, *protocol.MEDIA_PICTURES)
CONTENT_TYPE_CHARS = 400
MEDIA_TYPES_KEPT = 64
"""How many headers are kept with what they say: a client with one boundary for all its forms sends one."""

Body = bytes | bytearray | memoryview
Decoder = Callable[..., Batch]
"""Of a body and limits; only `decode_batch` takes every kind of buffer."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A decoded request.

    Attributes:
        jobs: its images and prompts, in order.
        images: how many images.
        size_bytes: of their pixels.
        has_prompts: whether there is one for each image.
        digest: of images and prompts, the same for the same pictures in any body; empty if it was not asked for.
    """

    jobs: Sequence[Job]
    images: int
    size_bytes: int
    has_prompts: bool
    digest: str


def decoder_of(headers: Mapping[str, str]) -> Decoder:
    """Choose the decoder of a body.

    Args:
        headers: of the request, with names in lower case.

    Raises:
        ProblemError: 415, no such body is read here.
    """
    encoding = headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        detail = f"Content-Encoding is {encoding[:40]!r}, but bodies are not decompressed: send it as it is"
        raise ProblemError("unsupported-media-type", detail)
    media, parameters = _media_type(headers.get("content-type", "")[:CONTENT_TYPE_CHARS])
    if media == protocol.MEDIA_SAFETENSORS:
        return decode_batch
    if media == protocol.MEDIA_JSON:
        return decode_json
    if media == protocol.MEDIA_MULTIPART:
        return functools.partial(decode_multipart, parameters=parameters)
    if media in protocol.MEDIA_PICTURES:
        return decode_file
    known = ", ".join(MEDIA_TYPES)
    detail = f"the body is {media[:80] or 'of no type'!r}, must be one of {known}: set Content-Type"
    raise ProblemError("unsupported-media-type", detail)


def prepare(
    decode: Decoder,
    body: Body,
    limits: Limits,
    *,
    job_images: int,
    job_bytes: int,
    digests: bool,
    lease: Lease | None = None,
) -> Prepared:
    """Decode a body and cut it into jobs; slow, and so meant for a thread.

    Args:
        decode: what `decoder_of` chose.
        body: of the request; the result may refer to it, and then it must not change.
        limits: bounds to hold the batch to.
        job_images, job_bytes: bounds of one job.
        digests: whether the digest is wanted.
        lease: of shared memory; a safetensors body may lie there already, the images of another are laid there.

    Raises:
        services.images.BodyError: the body holds no batch that can be scored.
    """
    batch = decode(body, limits)
    size = len(body)
    if lease is not None and decode is not decode_batch:
        batch, size = _lay_out(batch, lease)
    shared = None if lease is None else lease.area
    return Prepared(
        jobs=split_batch(batch, job_images=job_images, job_bytes=job_bytes, area=shared, body_bytes=size),
        images=len(batch.images_HWC),
        size_bytes=sum(image_HWC.nbytes for image_HWC in batch.images_HWC),
        has_prompts=batch.prompts is not None,
        digest=digest_of(batch) if digests else "",
    )


def _lay_out(batch: Batch, lease: Lease) -> tuple[Batch, int]:
    """Write a batch of one size into shared memory, where there is some; the size of its file there, else 0."""
    first = batch.images_HWC[0]
    if any(image_HWC.shape != first.shape for image_HWC in batch.images_HWC):
        return batch, 0
    shape = (len(batch.images_HWC), *first.shape)
    head = batch_head(shape, batch.prompts)
    size = len(head) + math.prod(shape)
    memory = lease.memory(size)
    if memory is None:
        return batch, 0
    memory[: len(head)] = head
    whole_BHWC = np.frombuffer(memory, np.uint8, math.prod(shape), len(head)).reshape(shape)
    np.stack(batch.images_HWC, out=whole_BHWC)
    return Batch(list(whole_BHWC), batch.prompts, whole_BHWC), size


def digest_of(batch: Batch) -> str:
    """SHA-256 of sizes, pixels and prompts, in hexadecimal."""
    digest = hashlib.sha256()
    for image_HWC in batch.images_HWC:
        digest.update(struct.pack("<QQ", *image_HWC.shape[:2]))
        digest.update(image_HWC.data)
    for prompt in batch.prompts or ():
        text = prompt.encode()
        digest.update(struct.pack("<Q", len(text)))
        digest.update(text)
    digest.update(struct.pack("<Q?", len(batch.images_HWC), batch.prompts is None))
    return digest.hexdigest()


@functools.lru_cache(MEDIA_TYPES_KEPT)
def _media_type(text: str) -> tuple[str, dict[str, str]]:
    """The media type of a Content-Type and its parameters."""
    media, parameters = parse_options_header(text)
    return media.decode("latin-1"), {
        name.decode("latin-1"): value.decode("latin-1") for name, value in parameters.items()
    }
