"""Forward passes: jobs of one shape together, within a time limit; a bad job fails alone.

Shape suffixes: B images of a batch, H height and W width in pixels, C = 3 channels (RGB).
"""

import asyncio
import contextlib
import logging
import operator
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.batching.streams import Delivery, Reply
from services.images import Batch
from services.rewards.base import Reward, UnfitImage

logger = logging.getLogger(__name__)

TIMEOUT_SLICES = 20
"""The limit of a forward pass is waited for in so many pieces, so that a process that was frozen, which is no fault of
the images, wakes with most of it left."""

Guard = Callable[[], contextlib.AbstractContextManager[None]]


class ScorerHung(RuntimeError):
    """A forward pass exceeded its time limit; the process must end, since its thread cannot be stopped.

    Attributes:
        culprit: the job that was scored, where it was alone.
    """

    def __init__(self, message: str, culprit: Delivery | None) -> None:
        super().__init__(message)
        self.culprit = culprit


@dataclass(slots=True)
class Work:
    """A delivered job with its images, and what became of it.

    Attributes:
        delivery: the job.
        batch: its images.
        queue_ms: how long it waited until it was taken, and from `begin` on, until it was scored.
        since_s: when it was taken, by the monotonic clock.
        reply: what is to be said of it.
    """

    delivery: Delivery
    batch: Batch
    queue_ms: float
    since_s: float
    reply: Reply | None = None

    def begin(self, now_s: float) -> None:
        """Its turn has come; if that is too late, this is the reply."""
        self.queue_ms += 1000 * (now_s - self.since_s)
        if self.delivery.submitted_ms + self.queue_ms >= self.delivery.deadline_ms:
            late = f"the deadline passed after {self.queue_ms:.0f} ms in the queue: allow more time"
            self.reply = Reply(error=late, expired=True, queue_ms=self.queue_ms)

    def images(self) -> NDArray[np.uint8]:
        """All of its images, uint8 (B, H, W, 3)."""
        whole_BHWC = self.batch.whole_BHWC
        return np.stack(self.batch.images_HWC) if whole_BHWC is None else whole_BHWC


class Scorer:
    """Scores jobs with one reward, on a thread of its own."""

    def __init__(self, reward: Reward, *, timeout_s: float, guard: Guard = contextlib.nullcontext) -> None:
        """Bind the reward; it is warmed up by `warmup`.

        Args:
            reward: scores.
            timeout_s: longest forward pass, in seconds.
            guard: entered around each forward pass, to end a process that not even the limit can.
        """
        self._reward = reward
        self._timeout_s = timeout_s
        self._guard = guard
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reward")
        self._hung = False
        self._last = (1, 0.0)

    async def warmup(self) -> None:
        """Load the reward, on the thread that will score."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._reward.warmup)

    def close(self) -> None:
        """Wait for the thread to end, unless it never will."""
        if not self._hung:
            self._thread.shutdown()

    def expected_s(self, images: int) -> float:
        """Seconds that so many images may take, going by the last forward pass; rather too many than too few."""
        last_images, last_s = self._last
        return last_s * max(1.0, images / last_images)

    async def score(self, works: Sequence[Work]) -> list[int]:
        """Score a batch: each job gets its reply, be it an error.

        Returns:
            The images of each forward pass that succeeded.

        Raises:
            ScorerHung: a forward pass exceeded its limit; the caller must end the process at once.
        """
        return [size for group in _group_by_shape(works) for size in await self._score(group)]

    async def _score(self, works: Sequence[Work]) -> list[int]:
        """Score jobs of one shape together; should that fail, each alone, so that only the culprit fails."""
        parts_BHWC = [work.images() for work in works]
        images_BHWC = parts_BHWC[0] if len(works) == 1 else np.concatenate(parts_BHWC)
        prompts = [prompt for work in works for prompt in work.batch.prompts or ()] or None
        started_s = time.perf_counter()
        try:
            scores_B = await self._forward(images_BHWC, prompts)
        except ScorerHung as error:
            error.culprit = works[0].delivery if len(works) == 1 else None
            raise
        except Exception as error:
            if len(works) > 1:
                return [size for work in works for size in await self._score([work])]
            logger.exception("job cannot be scored", extra=fields_of(works[0].delivery))
            line = str(error).splitlines()[0][:200] if str(error) else "no message"
            reason = f"the reward failed: {type(error).__name__}: {line}"
            works[0].reply = Reply(error=reason, index=_index_of(error, len(images_BHWC)))
            return []
        taken_s = time.perf_counter() - started_s
        self._last = (len(images_BHWC), taken_s)
        requests = sorted({work.delivery.request for work in works})
        fields = {"images": len(images_BHWC), "jobs": len(works), "ms": round(1000 * taken_s, 2), "requests": requests}
        logger.info("batch scored", extra={"fields": fields})
        start = 0
        for work in works:
            stop = start + len(work.batch.images_HWC)
            work.reply = _reply(scores_B[start:stop], work.queue_ms, 1000 * taken_s)
            start = stop
        return [len(images_BHWC)]

    async def _forward(self, images_BHWC: NDArray[np.uint8], prompts: Sequence[str] | None) -> NDArray[np.float64]:
        """Run the reward on its thread, for at most `timeout_s`; check the count of its scores."""
        loop = asyncio.get_running_loop()
        with self._guard():
            future = loop.run_in_executor(self._thread, self._call, images_BHWC, prompts)
            for _ in range(TIMEOUT_SLICES):
                done, _pending = await asyncio.wait([future], timeout=self._timeout_s / TIMEOUT_SLICES)
                if done:
                    break
        if not done:
            self._hung = True
            name, images = self._reward.name, len(images_BHWC)
            raise ScorerHung(f"reward {name} took longer than {self._timeout_s:g} s for {images} images", None)
        given = future.result()
        scores_B = np.asarray(given)
        if scores_B.dtype.kind not in "fiu" or isinstance(given, np.ma.MaskedArray):
            raise TypeError(f"scores are {scores_B.dtype}, masked or not, expected plain real numbers")
        if scores_B.shape != (len(images_BHWC),):
            raise ValueError(f"scores have shape {scores_B.shape}, expected ({len(images_BHWC)},)")
        return scores_B.astype(np.float64)

    def _call(self, images_BHWC: NDArray[np.uint8], prompts: Sequence[str] | None) -> object:
        """Call the reward; what would end a thread or a loop, such as SystemExit, becomes an error like any other."""
        try:
            return self._reward.score(images_BHWC, prompts)
        except StopIteration as error:
            raise RuntimeError(f"StopIteration: {error}") from error
        except Exception:
            raise
        except BaseException as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error


def fields_of(delivery: Delivery) -> dict[str, Any]:
    """What the log says of a job, as `extra` of a record."""
    return {"fields": {"request": delivery.request, "job": delivery.uid}}


def _index_of(error: Exception, images: int) -> int | None:
    """The image that an error names, be it by an index of numpy's; None where there is no such image."""
    if not isinstance(error, UnfitImage):
        return None
    try:
        index = operator.index(error.index)
    except TypeError:
        return None
    return index if 0 <= index < images else None


def _reply(scores_B: NDArray[np.float64], queue_ms: float, score_ms: float) -> Reply:
    """The reply to one job; a score that is no finite number makes it an error."""
    bad = np.flatnonzero(~np.isfinite(scores_B))
    if bad.size:
        error = f"the reward gave {scores_B[bad[0]]} for {bad.size} of {scores_B.size} images: no finite number"
        return Reply(error=error, index=int(bad[0]), queue_ms=queue_ms, score_ms=score_ms)
    return Reply(scores=tuple(scores_B.tolist()), queue_ms=queue_ms, score_ms=score_ms)


def _group_by_shape(works: Sequence[Work]) -> list[list[Work]]:
    """Gather jobs that one forward pass can take: images of one size, all with prompts or none."""
    groups: dict[tuple[tuple[int, ...], bool], list[Work]] = {}
    for work in works:
        key = (work.batch.images_HWC[0].shape, work.batch.prompts is None)
        groups.setdefault(key, []).append(work)
    return list(groups.values())
