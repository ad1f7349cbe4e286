"""When a request is sent again: after how long, how often, and within which time."""

import asyncio
import contextlib
import math
import random
import re
import time
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from services.client.errors import RewardDeadlineExceeded, RewardError, RewardUnavailable
from services.protocol import HEADER_RETRY_AFTER, Problem

RETRIED_STATUSES = frozenset({408, 429, 502, 503, 504})
"""What may pass: a stalled upload, a full queue, a gateway's trouble, a restart, the deadline of one attempt."""
PATIENT_STATUSES = frozenset({429, 503})
"""With Retry-After these are no failures: the service is there and says when to come back."""
BACKOFF_FIRST_S = 0.1
BACKOFF_LIMIT_S = 5.0
ASKED_LEAST_S = 0.1
JITTER_LEAST_S = 0.25
JITTER_SHARE = 0.25


class TryAgain(Exception):
    """An attempt failed in a way that may pass.

    Attributes:
        status: HTTP status of the answer, or None where there was none.
        problem: what the service said in it, or None.
        after_s: the least wait that the service asks for, in seconds, or None.
    """

    def __init__(
        self, reason: str, *, status: int | None = None, problem: Problem | None = None, after_s: float | None = None
    ) -> None:
        super().__init__(reason)
        self.status = status
        self.problem = problem
        self.after_s = after_s


class Budget:
    """The time that one call has for all its requests, attempts and waits together."""

    def __init__(self, deadline_s: float) -> None:
        """Start the clock.

        Args:
            deadline_s: seconds from now.

        Raises:
            ValueError: it is not positive and finite.
        """
        if not 0 < deadline_s < math.inf:
            raise ValueError(f"the deadline is {deadline_s} s, must be positive and finite: give seconds")
        self._ends_s = time.monotonic() + deadline_s
        self._deadline_s = deadline_s
        self.last: TryAgain | None = None
        """The last failure of any request of the call: why it took so long."""

    @property
    def left_s(self) -> float:
        """Seconds that are left, at least 0."""
        return max(0.0, self._ends_s - time.monotonic())

    @contextlib.asynccontextmanager
    async def hold(self, url: str) -> AsyncIterator[None]:
        """End the block when the time is up.

        Raises:
            RewardDeadlineExceeded: it is.
        """
        try:
            async with asyncio.timeout(self.left_s):
                yield
        except TimeoutError:
            reason = self.last or TryAgain("no answer")
            raise RewardDeadlineExceeded(
                f"{url} gave no scores before the deadline of {self._deadline_s:g} s ({reason}): "
                "allow more time or add workers",
                status=reason.status,
                problem=reason.problem,
            ) from None


class Patience:
    """Decides for one request whether and when it is sent again; a backoff hook of stamina."""

    def __init__(self, budget: Budget, attempts: int) -> None:
        self._budget = budget
        self._attempts = attempts
        self._failures = 0
        self._late_s: float | None = None

    def __call__(self, error: Exception) -> bool | float:
        """The seconds to wait before the next attempt, or False where there is none."""
        if not isinstance(error, TryAgain):
            return False
        self._budget.last = error
        if error.after_s is None or error.status not in PATIENT_STATUSES:
            self._failures += 1
        if self._failures >= self._attempts:
            return False
        wait_s = backoff_s(self._failures) if error.after_s is None else asked_wait_s(error.after_s)
        if wait_s >= self._budget.left_s:
            self._late_s = wait_s
            return False
        return wait_s

    def verdict(self, error: TryAgain, url: str) -> RewardError:
        """The error of a request that is not sent again."""
        if self._late_s is None:
            message = f"{url} is not available after {self._failures} attempts ({error}): check that it runs"
            return RewardUnavailable(message, status=error.status, problem=error.problem)
        return RewardDeadlineExceeded(
            f"{url} can be asked again in {self._late_s:.3g} s, and the deadline is in {self._budget.left_s:.3g} s "
            f"({error}): allow more time or add workers",
            status=error.status,
            problem=error.problem,
        )


def backoff_s(failures: int) -> float:
    """The wait after a failure: it doubles up to a limit, and a random half of it keeps clients apart.

    Args:
        failures: how often the request has failed, at least 1.

    Returns:
        Seconds.
    """
    longest_s = min(BACKOFF_LIMIT_S, BACKOFF_FIRST_S * 2.0 ** min(failures - 1, 32))
    return random.uniform(longest_s / 2, longest_s)  # noqa: S311 - jitter is no secret


def asked_wait_s(after_s: float) -> float:
    """The wait that a service asks for, and a random part more, so that not all come back at once.

    Args:
        after_s: seconds, at least 0.

    Returns:
        Seconds, no fewer than asked for.
    """
    jitter_s = random.uniform(0, max(JITTER_LEAST_S, JITTER_SHARE * after_s))  # noqa: S311 - jitter is no secret
    return max(after_s, ASKED_LEAST_S) + jitter_s


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Read Retry-After: seconds, or a date, which counts from the answer's own Date where it has one.

    Args:
        headers: of the answer, by name in any case.

    Returns:
        Seconds, at least 0; None where there is no header or it says neither.

    Source: RFC 9110, sections 10.2.3 and 5.6.7.
    """
    text = headers.get(HEADER_RETRY_AFTER, "").strip()
    if re.fullmatch(r"[0-9]+", text):
        return float(text)
    until = _date(text)
    if until is None:
        return None
    now = _date(headers.get("Date", "")) or datetime.now(UTC)
    return max(0.0, (until - now).total_seconds())


def _date(text: str) -> datetime | None:
    """Read an HTTP-date of any of its three forms; the one without a zone is in UTC as well."""
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, IndexError, OverflowError):
        return None
    return date if date.tzinfo is not None else date.replace(tzinfo=UTC)
