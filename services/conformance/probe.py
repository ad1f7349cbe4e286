"""The one place where the kit meets a service: bounded requests, and what came back.

Shape suffixes: H height and W width in pixels, C = 3 channels (RGB).
"""

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx
import numpy as np
from numpy.typing import NDArray

from services import protocol
from services.client.exchange import ANSWER_LIMIT_BYTES, check_url, one_line
from services.client.retry import retry_after_s
from services.conformance.pictures import KNOWN_MEDIA, Body, encode, make_images, make_prompts
from services.protocol import Info

BUSY_STATUSES = frozenset({429, 503})
BUSY_REPEATS = 4
BUSY_WAIT_S = 3.0
"""Longest wait for a service that asks to be asked again."""
SEEN_CHARS = 160
"""Of an answer, in a report."""
OK = 200
FIRST_ERROR = 400

Images = Sequence[NDArray[np.uint8]]


class Breach(Exception):
    """A rule is broken; the message says what was seen and what was expected."""


class NotJudged(Exception):
    """A rule cannot be judged here; the message says why."""


class NoAnswer(Breach):
    """A request got no answer: the connection was refused or broke, or the time was over."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, and what was asked: a few words for the report."""

    asked: str
    status: int
    headers: httpx.Headers
    body: bytes

    @property
    def media(self) -> str:
        """Its media type, without parameters."""
        return str(self.headers.get("Content-Type", "")).partition(";")[0].strip().lower()

    def json(self) -> dict[str, Any]:
        """The object that it holds.

        Raises:
            Breach: it holds none.
        """
        try:
            content = json.loads(self.body)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise Breach(f"{self}: the body is no JSON object")
        return content

    def expect(self, *statuses: int) -> None:
        """Check the status.

        Raises:
            Breach: it is another.
        """
        if self.status not in statuses:
            raise Breach(f"{self}; expected {' or '.join(map(str, statuses))}")

    def __str__(self) -> str:
        text = " ".join(self.body[: 2 * SEEN_CHARS].decode(errors="replace").split())[:SEEN_CHARS]
        return f"{self.asked}: {self.status}" + (f" ({text})" if self.status != OK else "")


class Probe:
    """Asks one service; use as `async with`.

    Attributes:
        errors: every answer so far with a status of 400 or more.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None,
        tolerance: float,
        timeout_s: float,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Describe the service; nothing is sent yet.

        Args:
            url: its address.
            token: bearer token, or None.
            tolerance: by which two scores of one image may differ: absolute up to 1, relative beyond.
            timeout_s: for one answer, in seconds.
            transport: in place of the network, for tests.

        Raises:
            ValueError: the address is none.
        """
        self.url = check_url(url)
        self.token = token
        self.tolerance = tolerance
        self.timeout_s = timeout_s
        self.errors: list[Answer] = []
        self._http = httpx.AsyncClient(
            timeout=timeout_s,
            follow_redirects=False,
            trust_env=False,
            transport=transport,
            limits=httpx.Limits(max_connections=None),
        )
        self._info: Info | None = None
        self._alone: list[float] | None = None

    async def __aenter__(self) -> Self:
        """Open the connections' pool."""
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all connections."""
        await self._http.__aexit__(kind, error, trace)

    @property
    def info(self) -> Info:
        """What the service says of itself."""
        assert self._info is not None, "the check `info` comes first"
        return self._info

    def learn(self, info: Info) -> None:
        """Keep what the service says of itself, and choose pictures and prompts accordingly."""
        self._info = info
        self.media = next(media for media in KNOWN_MEDIA if media in info.bodies)
        count = min(info.limits.max_images, len(make_images(info.limits)))
        self.images_HWC = make_images(info.limits)[:count]
        self.prompts = make_prompts(info.limits)[:count]

    def prompts_of(self, positions: Sequence[int]) -> list[str] | None:
        """The prompts of some of the pictures, or None where the reward reads none."""
        return [self.prompts[position] for position in positions] if self.info.uses_prompts else None

    async def get(self, path: str, *, with_token: bool = True) -> Answer:
        """Ask for a page."""
        return await self._send("GET", path, f"GET {path}", token=None if with_token else "")

    async def post(
        self, body: Body, asked: str, *, headers: Mapping[str, str] | None = None, token: str | None = None
    ) -> Answer:
        """Ask for scores.

        Args:
            body: to be sent.
            asked: what it holds, in a few words.
            headers: in addition.
            token: in place of the probe's; empty for none.
        """
        headers = {"Content-Type": body.content_type, **(headers or {})}
        return await self._send("POST", protocol.SCORE_PATH, asked, body.content, headers, token=token)

    async def ask(
        self,
        images_HWC: Images,
        prompts: Sequence[str] | None,
        *,
        media: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Ask for the scores of images that must be scored.

        Raises:
            Breach: they are not.
        """
        media = media or self.media
        body = encode(media, images_HWC, prompts)
        answer = await self.post(body, f"{len(images_HWC)} images as {media}", headers=headers)
        answer.expect(OK)
        return answer

    async def scores(
        self,
        images_HWC: Images,
        prompts: Sequence[str] | None,
        *,
        media: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> list[float]:
        """The scores of images.

        Raises:
            Breach: one is missing, extra, or no finite number.
        """
        answer = await self.ask(images_HWC, prompts, media=media, headers=headers)
        return read_scores(answer, len(images_HWC))

    async def scores_of(self, positions: Sequence[int], **options: Any) -> list[float]:
        """The scores of some of the usual pictures, as `scores` has them."""
        images_HWC = [self.images_HWC[position] for position in positions]
        return await self.scores(images_HWC, self.prompts_of(positions), **options)

    def body_of(self, positions: Sequence[int], media: str | None = None) -> Body:
        """Some of the usual pictures as a body."""
        images_HWC = [self.images_HWC[position] for position in positions]
        return encode(media or self.media, images_HWC, self.prompts_of(positions))

    async def alone(self) -> list[float]:
        """The score of each of the usual pictures in a request of its own; they are asked for once."""
        if self._alone is None:
            self._alone = [(await self.scores_of([position]))[0] for position in range(len(self.images_HWC))]
        return self._alone

    def same(self, score: float, expected: float) -> bool:
        """Whether two scores of one image agree."""
        return abs(score - expected) <= self.tolerance * max(1.0, abs(expected))

    def difference(self, scores: Sequence[float], expected: Sequence[float]) -> str | None:
        """The first of several scores that do not agree, in words; None where all do."""
        for index, (score, other) in enumerate(zip(scores, expected, strict=True)):
            if not self.same(score, other):
                return f"image {index} scores {score:.8g}, expected {other:.8g} (tolerance {self.tolerance:g})"
        return None

    async def _send(
        self,
        method: str,
        path: str,
        asked: str,
        content: bytes = b"",
        headers: Mapping[str, str] | None = None,
        *,
        token: str | None,
    ) -> Answer:
        """Send a request, and again where the service is busy and says when to come back.

        Raises:
            NoAnswer: the connection failed, or the time was over.
        """
        given = self.token if token is None else token
        headers = {**(headers or {}), **({"Authorization": f"Bearer {given}"} if given else {})}
        for repeat in range(BUSY_REPEATS + 1):
            answer = await self._send_once(method, path, asked, content, headers)
            if answer.status >= FIRST_ERROR:
                self.errors.append(answer)
            after_s = retry_after_s(answer.headers) if answer.status in BUSY_STATUSES else None
            if after_s is None or after_s > BUSY_WAIT_S or repeat == BUSY_REPEATS:
                break
            await asyncio.sleep(max(0.1, after_s))
        return answer

    async def _send_once(
        self, method: str, path: str, asked: str, content: bytes, headers: Mapping[str, str]
    ) -> Answer:
        body = bytearray()
        try:
            async with (
                asyncio.timeout(self.timeout_s),
                self._http.stream(method, self.url + path, content=content, headers=headers) as answer,
            ):
                async for chunk in answer.aiter_bytes():
                    body += chunk
                    if len(body) > ANSWER_LIMIT_BYTES:
                        raise Breach(f"{asked}: the answer has more than {ANSWER_LIMIT_BYTES} bytes")
        except TimeoutError:
            raise NoAnswer(f"{asked}: no answer within {self.timeout_s:g} s") from None
        except httpx.HTTPError as error:
            raise NoAnswer(f"{asked}: no answer ({one_line(error)})") from error
        return Answer(asked, answer.status_code, answer.headers, bytes(body))


def raw_scores(answer: Answer) -> list[Any]:
    """What stands in the place of the scores, of any type and number.

    Raises:
        Breach: no list does.
    """
    scores = answer.json().get("scores")
    if not isinstance(scores, list):
        raise Breach(f"{answer}: `scores` is no list but {str(scores)[:40]}")
    return scores


def read_scores(answer: Answer, count: int) -> list[float]:
    """The scores of an answer.

    Raises:
        Breach: one is missing, extra, or no finite number.
    """
    scores = raw_scores(answer)
    if len(scores) != count:
        raise Breach(f"{answer}: {len(scores)} scores for {count} images")
    for index, score in enumerate(scores):
        if not is_number(score):
            raise Breach(f"{answer}: score {index} is {json.dumps(score)[:40]}, no finite number")
    return [float(score) for score in scores]


def is_number(value: object) -> bool:
    """Whether a value from JSON is a finite number."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond any float
        return False
