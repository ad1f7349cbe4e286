"""The long fuzz: `python -m tests.fuzz --requests 100000`, and the record of it as one JSON object.

Rounds of requests made from the service's own description follow rounds of mutated bodies, with right requests in
between. The exit code is 1 where a rule was broken; the record then says which.
"""

import argparse
import json
import sys
import time
import warnings
from collections import Counter

from tests.fuzz import described
from tests.fuzz.served import ROLES, Memory, Served, resident_mib
from tests.fuzz.storm import WARM_UP, Storm

MOST_ROUNDS = 10
ROUND_REQUESTS = 1000  # of the shortest round
EXAMPLES = 150  # of a round, from the description


def fuzz(requests: int, *, seed: int, reward: str) -> dict[str, object]:
    """Fuzz a service.

    Args:
        requests: how many fuzzed ones; the right ones in between are not counted.
        seed: of everything random.
        reward: that is served; only brightness gives the right scores.

    Returns:
        The record; its `breach` is None where all rules were kept.
    """
    outcomes: Counter[str] = Counter()
    right = 0
    rounds = max(1, min(MOST_ROUNDS, requests // ROUND_REQUESTS))
    with Served(reward) as served:
        try:
            Storm(served, max(WARM_UP, requests // 20), seed=seed - 1).send()
            started_s = time.monotonic()
            with Memory(served) as memory:
                for number in range(rounds):
                    outcomes += described.fuzz(served, examples=EXAMPLES, seed=seed + number)
                    left = requests * (number + 1) // rounds - outcomes.total()
                    storm = Storm(served, left, seed=seed + number)
                    storm.send()
                    outcomes += storm.outcomes
                    right += storm.right
                    mib = {role: round(resident_mib(served.pids[role])) for role in ROLES}
                    print(f"{outcomes.total()} requests, {dict(outcomes)}, {mib} MiB", file=sys.stderr)
            seconds = time.monotonic() - started_s
            served.check_unharmed()
            memory.check()
        except AssertionError as error:
            return {"requests": outcomes.total(), "breach": str(error)}
        return {
            "requests": outcomes.total(),
            "answers": dict(outcomes.most_common()),
            "right_requests_in_between": right,
            "seconds": round(seconds),
            "requests_per_s": round(outcomes.total() / seconds),
            "mib_in_first_and_last_quarter": {
                role: [round(first, 1), round(last, 1)] for role, (first, last) in memory.quarters().items()
            },
            "processes_unchanged": sorted(served.pids),
            "breach": None,
        }


def main() -> int:
    """Run the fuzz and print its record."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reward", default="brightness", help="another one shows that the rules see what it breaks")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="PIL")  # of damaged pictures
    record = fuzz(options.requests, seed=options.seed, reward=options.reward)
    print(json.dumps(record, indent=2))
    return 0 if record["breach"] is None else 1


if __name__ == "__main__":
    sys.exit(main())
