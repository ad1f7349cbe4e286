"""Jobs: the pieces of a request that go through the queue, and what is known of each until it is answered.

Shape suffixes: B images of a job, H height and W width in pixels, C = 3 channels (RGB).
"""

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.batching.errors import DeadlinePassed, ScoringFailed
from services.batching.shared import Area
from services.batching.streams import Reply
from services.images import Batch


@dataclass(frozen=True, slots=True)
class Job:
    """Consecutive images of one request, all of one size.

    Attributes:
        images_BHWC: uint8 (B, H, W, 3); perhaps a view of the request's body.
        prompts: one for each image, or None.
        shared: what a worker of this host finds both by in shared memory; empty where they are not there.
    """

    images_BHWC: NDArray[np.uint8]
    prompts: Sequence[str] | None
    shared: str = ""


@dataclass(slots=True, eq=False)
class Submitted:
    """A job on its way, kept until it is answered.

    Attributes:
        uid: its name.
        content: what to submit again, should Redis lose it.
        request: name of its request in the logs.
        gives_up_s: its deadline, by the clock of the event loop.
        reply: what is awaited.
        entry: id of its entry in the stream; None until it is there.
        is_sent: whether Redis may hold anything of it.
        on_way: what puts it into the stream; a Redis that hangs may do so long after its caller has left.
        lost: whether a worker has said that it cannot get at the images.
        is_shared: whether a worker is to find the images in shared memory, not in Redis.
    """

    uid: str
    content: Job
    request: str
    gives_up_s: float
    reply: asyncio.Future[Reply]
    entry: bytes | None = None
    is_sent: bool = False
    on_way: asyncio.Task[None] | None = None
    lost: bool = False
    is_shared: bool = False

    @property
    def images(self) -> int:
        """Images in it."""
        return len(self.content.images_BHWC)

    @property
    def size_bytes(self) -> int:
        """Bytes of its pixels."""
        return self.content.images_BHWC.nbytes

    @property
    def left_ms(self) -> int:
        """Milliseconds until its deadline, at least 1."""
        return max(1, int(1000 * (self.gives_up_s - asyncio.get_running_loop().time())))


def split_batch(
    batch: Batch, *, job_images: int, job_bytes: int, area: Area | None = None, body_bytes: int = 0
) -> list[Job]:
    """Cut a batch into jobs that keep its order.

    Args:
        batch: the images of a request, of any mix of sizes.
        job_images: most images in a job.
        job_bytes: most bytes of pixels in a job of more than one image.
        area: where the whole batch lies as a safetensors file, if it does.
        body_bytes: the size of that file.

    Returns:
        The jobs; laid end to end they are the batch.
    """
    jobs = []
    start = 0
    count = len(batch.images_HWC)
    while start < count:
        first = batch.images_HWC[start]
        most = max(1, min(job_images, job_bytes // first.nbytes))
        stop = start + 1
        while stop < min(count, start + most) and batch.images_HWC[stop].shape == first.shape:
            stop += 1
        prompts = None if batch.prompts is None else batch.prompts[start:stop]
        whole_BHWC = batch.whole_BHWC
        images_BHWC = np.stack(batch.images_HWC[start:stop]) if whole_BHWC is None else whole_BHWC[start:stop]
        shared = "" if area is None else area.reference(body_bytes, start, stop)
        jobs.append(Job(images_BHWC, prompts, shared))
        start = stop
    return jobs


async def collect(submitted: Sequence[Submitted]) -> list[Reply]:
    """Wait for all replies, or for the first error.

    Raises:
        DeadlinePassed, ScoringFailed: a worker said so.
    """
    starts = itertools.accumulate((job.images for job in submitted[:-1]), initial=0)
    pending = {job.reply: start for job, start in zip(submitted, starts, strict=True)}
    while pending:
        done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for future in done:
            reply, start = future.result(), pending.pop(future)
            if reply.expired:
                raise DeadlinePassed(reply.error or "the deadline passed")
            if reply.error is not None:
                raise ScoringFailed(reply.error, None if reply.index is None else start + reply.index)
    return [job.reply.result() for job in submitted]
