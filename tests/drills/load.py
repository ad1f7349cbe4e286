"""Many requests at once, each of which knows its own scores."""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from services.client import RewardClient, RewardError
from services.rewards.brightness import Brightness
from tests.services.dummies import HARMLESS, POISONS

LARGEST = 64  # images of a request
DEADLINE_S = 60.0


@dataclass
class Request:
    """A request of a load.

    Attributes:
        images_BHWC: uint8, unlike those of any other request.
        poison: what one of its images does, or None.
        leaves_after_s: when its client leaves, or None.
        outcome: scores (B,), an error, or None where the client left.
    """

    images_BHWC: NDArray[np.uint8]
    poison: str | None = None
    leaves_after_s: float | None = None
    outcome: NDArray[np.float64] | RewardError | None = None

    @property
    def expected(self) -> NDArray[np.float64]:
        """The scores that it must get."""
        return Brightness().score(self.images_BHWC, None)


@dataclass
class Load:
    """What is sent, and how.

    Args:
        count: requests.
        seed: of everything random.
        poison: what some of them do; one in `one_in` has one such image.
        leave: how many leave before they are answered.
        concurrency: requests at once.
    """

    count: int
    seed: int = 0
    poison: str | None = None
    one_in: int = 40
    leave: int = 0
    concurrency: int = 24
    deadline_s: float = DEADLINE_S
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        draw, noise = random.Random(self.seed), np.random.default_rng(self.seed)
        for number in range(self.count):
            images_BHWC = noise.integers(0, HARMLESS + 1, (draw.randint(1, LARGEST), 8, 8, 3), dtype=np.uint8)
            request = Request(images_BHWC)
            if self.poison is not None and number % self.one_in == self.one_in // 2:
                images_BHWC[draw.randrange(len(images_BHWC)), 0, 0, 0] = POISONS[self.poison]
                request.poison = self.poison
            self.requests.append(request)
        for request in draw.sample(self.requests, self.leave):
            request.leaves_after_s = draw.uniform(0, 0.2)

    async def send(self, urls: Sequence[str]) -> None:
        """Send all of them, in turn to each of the addresses; every one has its outcome afterwards."""
        slots = asyncio.Semaphore(self.concurrency)
        async with contextlib.AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(RewardClient(url, timeout_s=self.deadline_s, attempts=400))
                for url in urls
            ]

            async def one(number: int, request: Request) -> None:
                async with slots:
                    scoring = clients[number % len(clients)].score(request.images_BHWC, deadline_s=self.deadline_s)
                    if request.leaves_after_s is not None:
                        with contextlib.suppress(TimeoutError, RewardError):
                            await asyncio.wait_for(scoring, request.leaves_after_s)
                        return
                    try:
                        request.outcome = (await scoring).scores
                    except RewardError as error:
                        request.outcome = error

            await asyncio.gather(*(one(number, request) for number, request in enumerate(self.requests)))

    def check(self, *, offset: float = 0.0) -> Counter[str]:
        """Every request has exactly its own scores in its own order, or a clear error.

        Args:
            offset: what the reward adds to brightness.

        Returns:
            How many had which outcome: "scores", "left", or the name of an error.
        """
        outcomes: Counter[str] = Counter()
        for request in self.requests:
            if request.outcome is None:
                assert request.leaves_after_s is not None
                outcomes["left"] += 1
            elif isinstance(request.outcome, RewardError):
                assert str(request.outcome)
                outcomes[type(request.outcome).__name__] += 1
            else:
                assert request.poison is None, f"a poisoned request was scored ({request.poison})"
                np.testing.assert_array_equal(request.outcome, request.expected + offset)
                outcomes["scores"] += 1
        return outcomes
