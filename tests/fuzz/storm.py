"""Many fuzzed requests at once, with right ones in between that must get exactly their scores."""

import random
import threading
from collections import Counter
from collections.abc import Mapping

from services.protocol import Limits, ScoreAnswer
from tests.fuzz.corpus import valid
from tests.fuzz.mutations import Attempt, attempt
from tests.fuzz.rules import check
from tests.fuzz.served import Served
from tests.fuzz.wire import Line

VALID_EVERY = 8
WARM_UP = 1000
"""Requests after which the memory of a service counts: pools are filled and all code has run."""


class Storm:
    """Sends fuzzed requests from several threads.

    Args:
        served: who gets them.
        count: how many, without the right ones in between.
        seed: of everything random.
        threads: how many requests at once.
    """

    def __init__(self, served: Served, count: int, *, seed: int, threads: int = 12) -> None:
        self._served = served
        self._left = count
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self.outcomes: Counter[str] = Counter()
        self.right = 0
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(f"{seed} {number}"),)) for number in range(threads)
        ]

    def send(self) -> None:
        """Send them all.

        Raises:
            AssertionError: an answer broke a rule; nothing more is sent then.
        """
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def _run(self, draw: random.Random) -> None:
        try:
            with self._served.line() as line:
                while self._take():
                    if draw.randrange(VALID_EVERY) == 0:
                        send_valid(line, draw)
                        with self._lock:
                            self.right += 1
                    status = send_attempt(line, attempt(draw), self._served.limits)
                    with self._lock:
                        self.outcomes[status] += 1
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
            self._error = error

    def _take(self) -> bool:
        with self._lock:
            self._left -= 1
            return self._left >= 0 and self._error is None


def send_attempt(line: Line, attempt: Attempt, limits: Limits) -> str:
    """Send one fuzzed request and hold its answer to the rules.

    Returns:
        Its status, or what came instead.

    Raises:
        AssertionError: a rule is broken; the message holds the request.
    """
    try:
        answer = line.send(attempt)
        check(attempt, answer, limits)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}; {attempt}, {attempt.body.data[:2000]!r}") from error
    return "no answer" if answer is None else str(answer.status)


def send_valid(line: Line, draw: random.Random, headers: Mapping[str, str] | None = None) -> None:
    """Send a right request, with these headers; it must get exactly its scores."""
    body, scores = valid(draw)
    answer = line.send(Attempt(body, tuple((headers or {}).items())))
    assert answer is not None, "no answer to a right request"
    assert answer.status == 200, answer.body
    assert ScoreAnswer.model_validate_json(answer.body).scores == scores, f"expected {scores}: {answer.body!r}"
