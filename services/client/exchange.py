"""One request to a reward service and its answer: sent until it succeeds, is refused, or attempts or time are spent."""

import asyncio
import math
import re
from typing import TypeVar

import httpx
import stamina
from pydantic import BaseModel, ValidationError

from services import protocol
from services.client.errors import RewardAnswerInvalid, RewardRefused
from services.client.retry import RETRIED_STATUSES, Budget, Patience, TryAgain, retry_after_s
from services.protocol import Problem

ANSWER_LIMIT_BYTES = 8 * 2**20
CONNECT_LIMIT_S = 10.0
GRACE_S = 1.0
"""Beyond `timeout_s`, which goes along as the deadline, so that the service's own word on it arrives and says why."""
Model = TypeVar("Model", bound=BaseModel)


class Exchange:
    """The connections to one service."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None,
        timeout_s: float,
        attempts: int,
        concurrency: int,
        transport: httpx.AsyncBaseTransport | None,
    ) -> None:
        """See `RewardClient`; nothing is sent yet."""
        self.url = check_url(url)
        if not 0 < timeout_s < math.inf or attempts < 1:
            raise ValueError(f"timeout_s {timeout_s}, attempts {attempts}: both must be positive and finite")
        if token and not re.fullmatch(r"[\x21-\x7e]+", token):
            raise ValueError("the token has a character that no header carries: give visible ASCII without spaces")
        self._timeout_s = timeout_s
        self._attempts = attempts
        self.http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_LIMIT_S)),
            # The requests are bounded where they are made; each of their connections is kept for the next.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=concurrency),
            follow_redirects=False,
            trust_env=False,
            transport=transport,
        )

    async def send(
        self, method: str, path: str, budget: Budget, *, content: bytes = b"", headers: dict[str, str] | None = None
    ) -> bytes:
        """Send a request, the same at every attempt.

        Args:
            method: of HTTP.
            path: below the service's address.
            budget: the time of the call that it belongs to.
            content: the body.
            headers: in addition to the token and the deadline.

        Returns:
            The body of the answer.

        Raises:
            RewardError: see `services.client`.
        """
        patience = Patience(budget, self._attempts)
        try:
            async for attempt in stamina.retry_context(on=patience, attempts=None, timeout=None):
                with attempt:
                    return await self.send_once(method, path, budget, content=content, headers=headers)
        except TryAgain as error:
            raise patience.verdict(error, self.url) from error
        raise AssertionError("unreachable: the attempts end by a return or an error")

    async def send_once(
        self, method: str, path: str, budget: Budget, *, content: bytes = b"", headers: dict[str, str] | None = None
    ) -> bytes:
        """Make one attempt of `send`.

        Raises:
            TryAgain: it failed in a way that may pass.
            RewardRefused, RewardAnswerInvalid: it failed in a way that will not.
        """
        left_ms = max(1, int(1000 * min(self._timeout_s, budget.left_s)))
        headers = {**(headers or {}), protocol.HEADER_DEADLINE_MS: str(left_ms)}
        try:
            # The timeouts of the connection are those of single reads: an answer that drips in would pass them all.
            async with (
                asyncio.timeout(self._timeout_s + GRACE_S),
                self.http.stream(method, self.url + path, content=content, headers=headers) as answer,
            ):
                body = await self._read(answer)
        except TimeoutError as error:
            raise TryAgain(f"no whole answer within {self._timeout_s:g} s") from error
        except httpx.TransportError as error:
            raise TryAgain(one_line(error)) from error
        except httpx.DecodingError as error:
            raise RewardAnswerInvalid(
                f"{self.url} sent a body that cannot be decoded ({one_line(error)}): its service or proxy is broken",
                status=answer.status_code,
            ) from error
        if answer.status_code == httpx.codes.OK:
            return body
        problem = read_problem(body)
        line = describe(answer.status_code, problem)
        if answer.status_code in RETRIED_STATUSES:
            after_s = retry_after_s(answer.headers)
            raise TryAgain(line, status=answer.status_code, problem=problem, after_s=after_s)
        kind = RewardAnswerInvalid if answer.is_success else RewardRefused
        raise kind(f"{self.url} answered {line}", status=answer.status_code, problem=problem)

    async def _read(self, answer: httpx.Response) -> bytes:
        """The body, as far as it may be an answer's."""
        body = bytearray()
        async for chunk in answer.aiter_bytes():
            body += chunk
            if len(body) > ANSWER_LIMIT_BYTES:
                raise RewardAnswerInvalid(
                    f"{self.url} answered with more than {ANSWER_LIMIT_BYTES} bytes: it is no reward service",
                    status=answer.status_code,
                )
        return bytes(body)


def check_url(url: str) -> str:
    """Return a service's address without the slash at its end.

    Raises:
        ValueError: it is none, or holds what belongs elsewhere.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"reward URL is {url!r} ({error}): give http://HOST:PORT or https://HOST:PORT") from None
    if parsed.userinfo:
        raise ValueError(f"reward URL for {parsed.host!r} holds a user or password: give a token instead")
    if parsed.scheme not in {"http", "https"} or not parsed.host or parsed.query or parsed.fragment:
        raise ValueError(f"reward URL is {url!r}: give http://HOST:PORT or https://HOST:PORT")
    return str(parsed).rstrip("/")


def read_answer(model: type[Model], body: bytes, url: str) -> Model:
    """Read an answer.

    Raises:
        RewardAnswerInvalid: something is missing, of another type, or no finite number.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise RewardAnswerInvalid(
            f"{url} gave an invalid {model.__name__}: {where}: {first['msg']}; its service is broken",
            status=httpx.codes.OK,
        ) from None


def read_problem(body: bytes) -> Problem:
    """Read the problem details of an error, as far as there are any."""
    try:
        return Problem.model_validate_json(body)
    except ValidationError:
        return Problem(detail=body[:200].decode(errors="replace"))


def describe(status: int, problem: Problem) -> str:
    """An answer that is an error, in one line."""
    words = " ".join(f"{problem.title}: {problem.detail}".split()).strip(": ")
    return f"{status} ({words[:500]})"


def one_line(error: Exception) -> str:
    """An error of the transport, which may have no message, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
