"""Async client of any reward service that keeps the contract of `services.protocol`.

Errors::

    RewardError
    ├── RewardUnavailable       no connection, or 502, 503, 504, until the attempts were spent
    ├── RewardDeadlineExceeded  the deadline passed first
    ├── RewardRefused           another status that is no success: the request is at fault, or the reward failed
    └── RewardAnswerInvalid     an answer with a missing, extra or non-finite score, or that is no answer at all

Shape suffixes: B images of a batch, H height and W width in pixels, C = 3 channels (RGB).
"""

import asyncio
import random
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

import httpx
import numpy as np
import stamina
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from services import protocol
from services.images import check_images, encode_batch, encode_json
from services.protocol import Info, Problem, ScoreAnswer

RETRIED_STATUSES = frozenset({429, 502, 503, 504})
ANSWER_LIMIT_BYTES = 8 * 2**20
READY_POLL_S = 0.1
RETRY_JITTER_S = 0.25
Model = TypeVar("Model", bound=BaseModel)


class RewardError(Exception):
    """A reward service did not give scores; see the module for the tree."""


class RewardUnavailable(RewardError):
    """The service cannot be reached, or stayed too busy, for all attempts."""


class RewardDeadlineExceeded(RewardError):
    """The deadline passed before the scores came."""


class RewardRefused(RewardError):
    """The service refused the request or failed to score it.

    Attributes:
        status: the HTTP status.
        problem: what the service says about it.
    """

    def __init__(self, message: str, *, status: int, problem: Problem) -> None:
        super().__init__(message)
        self.status = status
        self.problem = problem


class RewardAnswerInvalid(RewardError):
    """The service answered with something that is not one finite score for each image."""


class _TryAgain(Exception):
    """An attempt failed in a way that may pass; `after_s` is the least wait that the service asks for."""

    def __init__(self, reason: str, after_s: float | None = None) -> None:
        super().__init__(reason)
        self.after_s = after_s


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
            timeout_s: longest wait for one answer, in seconds.
            attempts: how often one request may fail; an answer that asks to come back later (429 or 503 with
                Retry-After) does not count, for the deadline of `score` bounds them all.
            concurrency: requests in flight at once.
            transport: in place of the network, for tests.

        Raises:
            ValueError: an argument is out of range.
        """
        parsed = httpx.URL(url)
        if parsed.scheme not in {"http", "https"} or not parsed.host:
            raise ValueError(f"reward URL is {url!r}: give http://HOST:PORT or https://HOST:PORT")
        if not timeout_s > 0 or attempts < 1 or concurrency < 1:
            raise ValueError(
                f"timeout_s {timeout_s}, attempts {attempts}, concurrency {concurrency}: all must be positive"
            )
        self.url = str(parsed).rstrip("/")
        self._timeout_s = timeout_s
        self._attempts = attempts
        self._slots = asyncio.Semaphore(concurrency)
        self._info: Info | None = None
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, 10.0)),
            follow_redirects=False,
            trust_env=False,
            transport=transport,
        )

    async def __aenter__(self) -> Self:
        """Open the connections' pool."""
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all connections."""
        await self._http.__aexit__(kind, error, trace)

    async def info(self, *, deadline_s: float = 30.0) -> Info:
        """Ask which reward this is and what may be sent to it.

        Args:
            deadline_s: seconds for all attempts together.

        Raises:
            RewardError: see the module for the tree.
        """
        gives_up_s = _gives_up_s(deadline_s)
        body = await self._send("GET", protocol.INFO_PATH, b"", {}, gives_up_s)
        self._info = _parse(Info, body, self.url)
        return self._info

    async def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Wait until the service is ready to score.

        Args:
            timeout_s: seconds to wait at most.

        Raises:
            RewardUnavailable: it was not ready in time; the message says what it answered last.
            ValueError: `timeout_s` is not positive.
        """
        gives_up_s = _gives_up_s(timeout_s)
        reason = "no answer"
        while (left_s := gives_up_s - time.monotonic()) > 0:
            try:
                async with asyncio.timeout(left_s):
                    answer = await self._http.get(self.url + protocol.READY_PATH)
                if answer.status_code == httpx.codes.OK:
                    return
                reason = _describe(answer.status_code, _problem(answer.content))
            except (httpx.TransportError, TimeoutError) as error:
                reason = _reason(error)
            await asyncio.sleep(min(READY_POLL_S, max(0.0, gives_up_s - time.monotonic())))
        raise RewardUnavailable(
            f"{self.url} is not ready after {timeout_s:g} s ({reason}): start the service or correct the URL"
        )

    async def score(
        self, images_BHWC: NDArray[np.uint8], prompts: Sequence[str] | None = None, *, deadline_s: float = 120.0
    ) -> ScoreResult:
        """Score a batch; one larger than the service's limit is sent in pieces.

        Args:
            images_BHWC: uint8 (B, H, W, 3), 0–255.
            prompts: one string for each image, or None.
            deadline_s: seconds for all pieces and attempts together.

        Returns:
            One finite score for each image, all of one version of the reward.

        Raises:
            ValueError: the images or prompts are not what they should be.
            RewardError: see the module for the tree; never a score in place of one that is missing.
        """
        check_images(images_BHWC, prompts)
        gives_up_s = _gives_up_s(deadline_s)
        started_s = time.monotonic()
        info = self._info or await self.info(deadline_s=deadline_s)
        step = _piece(info, images_BHWC)
        request_id = uuid.uuid4().hex
        starts = range(0, len(images_BHWC), step)
        try:
            async with asyncio.TaskGroup() as pieces:
                tasks = [
                    pieces.create_task(
                        self._score_piece(
                            images_BHWC[start : start + step],
                            None if prompts is None else prompts[start : start + step],
                            f"{request_id}-{start}",
                            info,
                            gives_up_s,
                        )
                    )
                    for start in starts
                ]
        except ExceptionGroup as group:  # the first error stops the other pieces; the caller wants that one
            raise group.exceptions[0] from None
        answers = [task.result() for task in tasks]
        models = {(answer.reward, answer.version) for answer in answers}
        if len(models) != 1:
            raise RewardAnswerInvalid(f"{self.url} mixed the models {sorted(models)} in one batch: score it again")
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

    async def _score_piece(
        self,
        images_BHWC: NDArray[np.uint8],
        prompts: Sequence[str] | None,
        request_id: str,
        info: Info,
        gives_up_s: float,
    ) -> ScoreAnswer:
        """Score what fits into one request."""
        async with self._slots:
            if protocol.MEDIA_SAFETENSORS in info.bodies:
                media, encode = protocol.MEDIA_SAFETENSORS, encode_batch
            else:
                media, encode = protocol.MEDIA_JSON, encode_json
            content = await asyncio.to_thread(encode, images_BHWC, prompts)
            headers = {"Content-Type": media, protocol.HEADER_REQUEST_ID: request_id}
            body = await self._send("POST", protocol.SCORE_PATH, content, headers, gives_up_s)
        answer = _parse(ScoreAnswer, body, self.url)
        if len(answer.scores) != len(images_BHWC):
            raise RewardAnswerInvalid(
                f"{self.url} gave {len(answer.scores)} scores for {len(images_BHWC)} images: its reward is broken"
            )
        return answer

    async def _send(self, method: str, path: str, content: bytes, headers: dict[str, str], gives_up_s: float) -> bytes:
        """Send a request until it succeeds, is refused, or attempts or time are spent; return the answer's body."""
        reason, failures = "no answer", 0

        def wait(error: Exception) -> bool | float:
            return _wait(error) if failures < self._attempts else False

        try:
            async with asyncio.timeout(max(0.0, gives_up_s - time.monotonic())):
                async for attempt in stamina.retry_context(
                    on=wait, attempts=None, timeout=None, wait_initial=0.1, wait_max=5.0, wait_jitter=0.1
                ):
                    with attempt:
                        try:
                            return await self._send_once(method, path, content, headers, gives_up_s)
                        except _TryAgain as error:
                            reason = str(error)
                            failures += error.after_s is None
                            raise
        except TimeoutError:
            raise RewardDeadlineExceeded(
                f"{self.url} gave no scores before the deadline ({reason}): allow more time or add workers"
            ) from None
        except _TryAgain as error:
            raise RewardUnavailable(
                f"{self.url} is not available after {self._attempts} attempts ({error}): check that it runs"
            ) from error
        raise AssertionError("unreachable: the attempts end by a return or an error")

    async def _send_once(
        self, method: str, path: str, content: bytes, headers: dict[str, str], gives_up_s: float
    ) -> bytes:
        """Make one attempt.

        Raises:
            _TryAgain: it failed in a way that may pass.
            RewardError: it failed in a way that will not.
        """
        left_ms = max(1, int(1000 * min(self._timeout_s, gives_up_s - time.monotonic())))
        headers = {**headers, protocol.HEADER_DEADLINE_MS: str(left_ms)}
        try:
            async with self._http.stream(method, self.url + path, content=content, headers=headers) as answer:
                body = bytearray()
                async for chunk in answer.aiter_bytes():
                    body += chunk
                    if len(body) > ANSWER_LIMIT_BYTES:
                        raise RewardAnswerInvalid(
                            f"{self.url} answered with more than {ANSWER_LIMIT_BYTES} bytes: it is no reward service"
                        )
        except httpx.TransportError as error:
            raise _TryAgain(_reason(error)) from error
        except httpx.DecodingError as error:
            raise RewardAnswerInvalid(f"{self.url} sent a body that cannot be decoded: {_reason(error)}") from error
        if answer.status_code == httpx.codes.OK:
            return bytes(body)
        problem = _problem(bytes(body))
        line = _describe(answer.status_code, problem)
        if answer.status_code in RETRIED_STATUSES:
            raise _TryAgain(line, _retry_after_s(answer))
        raise RewardRefused(f"{self.url} answered {line}", status=answer.status_code, problem=problem)


def _wait(error: Exception) -> bool | float:
    """Whether to try again, and after how many seconds where the service asks for a wait."""
    if not isinstance(error, _TryAgain):
        return False
    if error.after_s is None:
        return True
    return error.after_s + random.uniform(0, RETRY_JITTER_S)  # noqa: S311 - jitter is no secret


def _retry_after_s(answer: httpx.Response) -> float | None:
    """The wait that the service asks for, in seconds; dates are not understood and count as none."""
    text = answer.headers.get(protocol.HEADER_RETRY_AFTER, "").strip()
    return float(text) if re.fullmatch(r"[0-9]{1,6}", text) else None


def _gives_up_s(deadline_s: float) -> float:
    if not deadline_s > 0:
        raise ValueError(f"the deadline is {deadline_s} s, must be positive")
    return time.monotonic() + deadline_s


def _piece(info: Info, images_BHWC: NDArray[np.uint8]) -> int:
    """How many images fit into one request: by count, and by bytes with some room for header and prompts."""
    room = info.limits.max_body_bytes - 1024
    each = images_BHWC[0].nbytes + 8 * info.limits.max_prompt_chars
    return max(1, min(info.limits.max_images, room // int(each)))


def _parse(model: type[Model], body: bytes, url: str) -> Model:
    """Read an answer; whatever is missing, of another type, or no finite number raises."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise RewardAnswerInvalid(
            f"{url} gave an invalid {model.__name__}: {where}: {first['msg']}; its service is broken"
        ) from None


def _problem(body: bytes) -> Problem:
    """Read the problem details of an error, as far as there are any."""
    try:
        return Problem.model_validate_json(body)
    except ValidationError:
        return Problem(detail=body[:200].decode(errors="replace"))


def _describe(status: int, problem: Problem) -> str:
    words = " ".join(f"{problem.title}: {problem.detail}".split()).strip(": ")
    return f"{status} ({words[:500]})"


def _reason(error: Exception) -> str:
    """One line for an error of the transport, which may have no message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
