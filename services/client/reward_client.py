"""The client of one reward service: what it is, whether it is ready, and its scores.

Shape suffixes: B images of a batch, H height and W width in pixels, C = 3 channels (RGB).
"""

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import httpx
import numpy as np
from numpy.typing import NDArray

from services import protocol
from services.client.bodies import ENCODERS, choose_media, images_at_once
from services.client.errors import RewardAnswerInvalid, RewardRefused, RewardUnavailable
from services.client.exchange import Exchange, read_answer
from services.client.retry import Budget, TryAgain
from services.images import check_images
from services.protocol import Info, ScoreAnswer

READY_POLL_S = 0.1
RENEGOTIATED_STATUSES = frozenset({413, 415})
"""What a service may answer that was restarted with other limits or bodies than `/info` told before."""


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """The scores of a batch.

    Attributes:
        scores: float64 (B,), finite, in the order of the images.
        reward: name of the reward.
        version: version of the reward, the same for all scores.
        timing_ms: milliseconds by phase: `queue` and `score` as the service reports them (the longest of its
            requests), `total` as measured here.
    """

    scores: NDArray[np.float64]
    reward: str
    version: str
    timing_ms: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a batch that fits into one request; `start` is its position."""

    start: int
    images_BHWC: NDArray[np.uint8]
    prompts: Sequence[str] | None


class RewardClient:
    """Client of one reward service; use as `async with`, within one event loop."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout_s: float = 60.0,
        attempts: int = 30,
        concurrency: int = 8,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Describe the service; nothing is sent yet.

        Args:
            url: address of the service, `http://` or `https://`.
            token: bearer token, if the service wants one.
            timeout_s: of one attempt, from its first byte to the last of its answer, in seconds.
            attempts: how often one request may fail; an answer that asks to come back later (429 or 503 with
                Retry-After) does not count, for the deadline of `score` bounds them all.
            concurrency: requests for scores in flight at once; one that waits for its next attempt counts.
            transport: in place of the network, for tests.

        Raises:
            ValueError: an argument is out of range.
        """
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency}, must be at least 1")
        self._exchange = Exchange(
            url, token=token, timeout_s=timeout_s, attempts=attempts, concurrency=concurrency, transport=transport
        )
        self.url = self._exchange.url
        self._slots = asyncio.Semaphore(concurrency)
        self._asking = asyncio.Lock()
        self._info: Info | None = None

    async def __aenter__(self) -> Self:
        """Open the connections' pool."""
        await self._exchange.http.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all connections."""
        await self._exchange.http.__aexit__(kind, error, trace)

    async def info(self, *, deadline_s: float = 30.0) -> Info:
        """Ask which reward this is and what may be sent to it; from now on that is what is sent.

        Args:
            deadline_s: seconds for all attempts together.

        Raises:
            ValueError: `deadline_s` is not positive and finite.
            RewardError: see `services.client` for the tree.
        """
        budget = Budget(deadline_s)
        async with budget.hold(self.url):
            return await self._ask_info(budget)

    async def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Wait until the service is ready to score.

        Args:
            timeout_s: seconds to wait at most.

        Raises:
            RewardUnavailable: it was not ready in time; the message says what it answered last.
            RewardAnswerInvalid: it answered with something that no reward service says.
            ValueError: `timeout_s` is not positive and finite.
        """
        budget = Budget(timeout_s)
        last: TryAgain | RewardRefused = TryAgain("no answer")
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        await self._exchange.send_once("GET", protocol.READY_PATH, budget)
                        return
                    except (TryAgain, RewardRefused) as error:
                        last = error
                    await asyncio.sleep(READY_POLL_S)
        except TimeoutError:
            raise RewardUnavailable(
                f"{self.url} is not ready after {timeout_s:g} s ({last}): start the service or correct the URL",
                status=last.status,
                problem=last.problem,
            ) from None

    async def score(
        self, images_BHWC: NDArray[np.uint8], prompts: Sequence[str] | None = None, *, deadline_s: float = 120.0
    ) -> ScoreResult:
        """Score a batch; one larger than the service's limits is sent in pieces.

        Where the service turns out to have other limits than it told before, or two of its versions answer, all of
        the batch is sent once more.

        Args:
            images_BHWC: uint8 (B, H, W, 3), 0–255.
            prompts: one string for each image, or None.
            deadline_s: seconds for all pieces and attempts together.

        Returns:
            One finite score for each image, all of one version of the reward.

        Raises:
            ValueError: the images or prompts are not what they should be, or `deadline_s` is not positive and finite.
            RewardError: see `services.client` for the tree; never a score in place of one that is missing.
        """
        check_images(images_BHWC, prompts)
        budget = Budget(deadline_s)
        started_s = time.monotonic()
        async with budget.hold(self.url):
            answers = await self._score_by_one_model(_Piece(0, images_BHWC, prompts), budget)
        return ScoreResult(
            scores=np.array([score for answer in answers for score in answer.scores], dtype=np.float64),
            reward=answers[0].reward,
            version=answers[0].version,
            timing_ms={
                "queue": max(answer.timing_ms.queue for answer in answers),
                "score": max(answer.timing_ms.score for answer in answers),
                "total": 1000 * (time.monotonic() - started_s),
            },
        )

    async def _ask_info(self, budget: Budget) -> Info:
        body = await self._exchange.send("GET", protocol.INFO_PATH, budget)
        self._info = read_answer(Info, body, self.url)
        return self._info

    async def _negotiated(self, budget: Budget, *, stale: Info | None = None) -> Info:
        """What `/info` told, asked again where nobody has since it told `stale`; many callers ask once."""
        async with self._asking:
            if self._info is None or self._info is stale:
                return await self._ask_info(budget)
            return self._info

    async def _score_by_one_model(self, batch: _Piece, budget: Budget) -> list[ScoreAnswer]:
        """The answers to all pieces of a batch, in order."""
        info = await self._negotiated(budget)
        try:
            answers = await self._score_pieces(batch, info, budget)
        except RewardRefused as error:
            if error.status not in RENEGOTIATED_STATUSES:
                raise
            told = await self._negotiated(budget, stale=info)
            if told == info:
                raise
            answers = await self._score_pieces(batch, told, budget)
        else:
            if len(_models(answers)) > 1:
                info = await self._negotiated(budget, stale=info)
                answers = await self._score_pieces(batch, info, budget)
        models = _models(answers)
        if len(models) > 1:
            raise RewardAnswerInvalid(
                f"{self.url} mixed the models {', '.join(' '.join(model) for model in sorted(models))} in one batch: "
                "wait until all its replicas run one version, then score again"
            )
        return answers

    async def _score_pieces(self, batch: _Piece, info: Info, budget: Budget) -> list[ScoreAnswer]:
        """Send a batch in pieces that the service accepts; the first error ends them all."""
        media = choose_media(info, self.url)
        step = images_at_once(info, media, batch.images_BHWC, batch.prompts)
        request_id = uuid.uuid4().hex
        pieces = [
            _Piece(
                start,
                batch.images_BHWC[start : start + step],
                None if batch.prompts is None else batch.prompts[start : start + step],
            )
            for start in range(0, len(batch.images_BHWC), step)
        ]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._score_piece(piece, media, request_id, budget)) for piece in pieces]
        except ExceptionGroup as errors:  # the first error stops the other pieces; the caller wants that one
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _score_piece(self, piece: _Piece, media: str, request_id: str, budget: Budget) -> ScoreAnswer:
        """Score what fits into one request."""
        async with self._slots:
            content = await asyncio.to_thread(ENCODERS[media], piece.images_BHWC, piece.prompts)
            headers = {
                "Content-Type": media,
                protocol.HEADER_REQUEST_ID: f"{request_id}-{piece.start}",
                protocol.HEADER_IDEMPOTENCY_KEY: uuid.uuid4().hex,
            }
            try:
                body = await self._exchange.send("POST", protocol.SCORE_PATH, budget, content=content, headers=headers)
            except RewardRefused as error:
                raise _in_batch(error, piece) from error
        answer = read_answer(ScoreAnswer, body, self.url)
        count = len(piece.images_BHWC)
        if len(answer.scores) != count:
            raise RewardAnswerInvalid(
                f"{self.url} gave {len(answer.scores)} scores for {count} images: its reward is broken",
                status=httpx.codes.OK,
            )
        return answer


def _models(answers: Sequence[ScoreAnswer]) -> set[tuple[str, str]]:
    """Names and versions of the rewards that answered."""
    return {(answer.reward, answer.version) for answer in answers}


def _in_batch(error: RewardRefused, piece: _Piece) -> RewardRefused:
    """The refusal of a piece, with the position of its image in the batch."""
    index = error.problem.index
    if index is None or index >= len(piece.images_BHWC):
        return RewardRefused(str(error), status=error.status, problem=error.problem)
    index += piece.start
    moved = f"; image {index} of the batch" if piece.start else ""
    return RewardRefused(f"{error}{moved}", status=error.status, problem=error.problem, index=index)
