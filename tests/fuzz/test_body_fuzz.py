"""Whatever comes as a body, on whatever wire: a right answer or a clear error, and nothing is lost by it."""

import json
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services import protocol
from tests.fuzz.corpus import Body, bodies, pictures
from tests.fuzz.mutations import KEYS, MEDIA, MUTATIONS, ODD_HEADERS, Attempt, Framing
from tests.fuzz.served import LEAST_SAMPLES, MOST_GROWTH_MIB, Memory, Served, check_growth
from tests.fuzz.storm import WARM_UP, Storm, send_attempt, send_valid

EXAMPLES = 200
"""Of Hypothesis, each of several requests at once; more of them take longer and see more."""
REQUESTS = 5000
"""Of the storm."""
AT_ONCE = 6
OUTCOMES = {"200", "400", "404", "405", "408", "413", "415", "422", "504", "no answer"}
FRAMINGS = [*Framing, *[Framing.LENGTH] * 20]
FRAMINGS.remove(Framing.STALLED)  # each takes seconds; the storm has them

pytestmark = [
    pytest.mark.redis,
    pytest.mark.drill,
    # Pillow warns of damaged EXIF and of large pictures; what counts is what the service answers.
    pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::RuntimeWarning:PIL"),
]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """One service for all, warm."""
    with Served() as running:
        Storm(running, WARM_UP, seed=-1).send()
        yield running


def values() -> st.SearchStrategy[object]:
    """Anything that JSON can say."""
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    return st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=10), inner))


def requests_in_json() -> st.SearchStrategy[object]:
    """Objects that look like a request."""
    return st.fixed_dictionaries(
        {"images": st.lists(st.text(max_size=40) | values(), max_size=4) | values()},
        optional={"prompts": st.lists(st.text() | values(), max_size=4) | values(), "more": values()},
    )


@st.composite
def attempts(draw: st.DrawFn) -> Attempt:
    """A request with a body that is mutated, or made of nothing."""
    made = st.one_of(
        st.builds(Body, st.sampled_from(MEDIA), st.binary(max_size=300)),
        st.builds(Body, st.sampled_from(MEDIA), st.sampled_from([file for _, file in pictures()])),
        st.builds(
            Body,
            st.just(protocol.MEDIA_JSON),
            (requests_in_json() | values()).map(lambda value: json.dumps(value).encode()),
        ),
    )
    body = draw(made) if draw(st.integers(0, 3)) == 0 else draw(st.sampled_from(bodies()))
    for mutation in draw(st.lists(st.sampled_from(MUTATIONS), max_size=3)):
        if body.data:
            body = Body(body.media, mutation(body.data, random.Random(draw(st.integers(0, 2**32)))))
    headers = st.sampled_from([*ODD_HEADERS, *((protocol.HEADER_IDEMPOTENCY_KEY, key) for key in KEYS)])
    return Attempt(
        body,
        tuple(draw(st.lists(headers, max_size=1))),
        draw(st.sampled_from(FRAMINGS)),
        draw(st.integers(0, 2**32)),
    )


def test_every_body_gets_its_own_answer(served: Served) -> None:
    """What the decoders accept gets its scores, all else its error, also beside others in one batch."""
    seen: Counter[str] = Counter()

    def send(one: Attempt) -> str:
        with served.line() as line:
            return send_attempt(line, one, served.limits)

    def send_right(seed: int) -> str:
        with served.line() as line:
            send_valid(line, random.Random(seed))
        return "right"

    with ThreadPoolExecutor(AT_ONCE + 1) as pool:

        @settings(
            max_examples=EXAMPLES,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        )
        @given(st.lists(attempts(), min_size=1, max_size=AT_ONCE), st.integers(0, 2**32))
        def fuzz(together: list[Attempt], seed: int) -> None:
            right = pool.submit(send_right, seed)
            seen.update(pool.map(send, together))
            seen[right.result()] += 1

        fuzz()
    served.check_unharmed()
    assert seen["right"] >= EXAMPLES
    assert {"200", "400", "415", "422"} <= seen.keys() <= {*OUTCOMES, "right"}


def test_a_storm_leaves_no_trace(served: Served) -> None:
    """Thousands of mutated bodies at once: right answers, the same processes, no more memory than before."""
    with Memory(served) as memory:
        storm = Storm(served, REQUESTS, seed=0)
        storm.send()
    served.check_unharmed()
    memory.check()
    assert storm.outcomes.total() == REQUESTS
    assert storm.right > REQUESTS // 20
    assert {"200", "400", "408", "413", "415", "422"} <= storm.outcomes.keys() <= OUTCOMES


def test_growth_is_seen() -> None:
    """A slow leak breaks the rule; a peak in between and noise do not."""
    steady = [100.0 + number % 7 for number in range(LEAST_SAMPLES)]
    check_growth("api", steady)
    check_growth("api", [*steady, *(400.0 for _ in steady), *steady])
    with pytest.raises(AssertionError, match="in the first quarter"):
        check_growth("api", [mib + 1.5 * MOST_GROWTH_MIB * number / len(steady) for number, mib in enumerate(steady)])
    with pytest.raises(AssertionError, match="tell nothing"):
        check_growth("api", steady[1:])
