"""The service answers whatever its own description allows and forbids as that description says."""

import random

import pytest

from tests.fuzz import described
from tests.fuzz.served import Memory, Served
from tests.fuzz.storm import send_valid

pytestmark = [pytest.mark.redis, pytest.mark.drill]

EXAMPLES = 400
"""Random requests for each operation; more of them take longer and see more."""
WARM_UP = 30
LEAST = {"200": 30, "400": 100, "405": 30, "413": 1, "415": 1, "422": 30}
"""Fewer of a status would mean that hardly anything was tried."""


@pytest.mark.parametrize("token", [None, "open-sesame"], ids=["without a token", "with a token"])
def test_answers_are_as_described(token: str | None) -> None:
    """Documented statuses, types, headers and schemas; no 5xx but 503 and 504; no way around the token."""
    with Served(token=token) as served:
        described.fuzz(served, examples=WARM_UP, seed=1)
        with Memory(served) as memory:
            outcomes = described.fuzz(served, examples=EXAMPLES, seed=0)
        served.check_unharmed()
        memory.check()
        assert outcomes.keys() <= {*LEAST, "401", "504"}
        assert all(outcomes[status] >= least for status, least in LEAST.items()), outcomes
        assert (outcomes["401"] > 0) == (token is not None)
        with served.line() as line:
            send_valid(line, random.Random(0), served.headers)
