"""The long drill: `python -m tests.drills --kills 100`. Random kills under an unbroken load, and the record of it.

Prints one JSON object: what was done, what every request got, and what was left behind (nothing).
"""

import argparse
import asyncio
import json
import logging
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from tests.drills.fleet import LEASE_S, Fleet, Member, assert_clean, dead_letters
from tests.drills.load import Load

REQUESTS = 200  # of one load; loads follow each other until all kills are done
PAUSE_S = (0.3, 1.2)  # between two kills
WAYS = ("kill", "stop", "freeze")


class Chaos:
    """Kills, stops and freezes members of a fleet at random, a given number of times."""

    def __init__(self, fleet: Fleet, kills: int, seed: int) -> None:
        self._fleet, self._left, self._chance = fleet, kills, random.Random(seed)
        self.done: Counter[str] = Counter()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while self._left:
            time.sleep(self._chance.uniform(*PAUSE_S))
            role = self._chance.choice(("worker", "worker", "api", "redis"))
            way = self._chance.choice(WAYS)
            if role == "redis" and way != "kill":
                continue
            self._act(self._chance.choice(self._members(role)), way)
            self.done[f"{role} {way}"] += 1
            self._left -= 1

    def _members(self, role: str) -> list[Member]:
        return {"worker": self._fleet.workers, "api": self._fleet.apis, "redis": [self._fleet.redis]}[role]

    @staticmethod
    def _act(member: Member, way: str) -> None:
        if way == "kill":
            member.send(signal.SIGKILL)
        elif way == "stop":
            member.send(signal.SIGTERM)
        else:
            member.send(signal.SIGSTOP)
            time.sleep(1.5 * LEASE_S)
            member.send(signal.SIGCONT)


def drill(kills: int, seed: int) -> dict[str, object]:
    """Kill at random under load until all is done.

    Args:
        kills: how many times a process is killed, stopped or frozen.
        seed: of the load and the kills.

    Returns:
        The record.

    Raises:
        AssertionError: a request got what it should not, or something was left behind.
    """
    started_s = time.monotonic()
    outcomes: Counter[str] = Counter()
    images = 0
    with tempfile.TemporaryDirectory() as folder, Fleet(Path(folder)) as fleet:
        chaos = Chaos(fleet, kills, seed)
        chaos.thread.start()
        number = 0
        while chaos.thread.is_alive():
            load = Load(REQUESTS, seed=seed + number, leave=REQUESTS // 20, deadline_s=120.0)
            asyncio.run(load.send(fleet.urls))
            outcomes += load.check()
            images += sum(len(request.images_BHWC) for request in load.requests)
            number += 1
            print(f"{sum(chaos.done.values())} kills, {dict(outcomes)}", file=sys.stderr)
        fleet.wait_ready()
        assert_clean(fleet)
        letters = [letter[b"reason"].decode() for letter in dead_letters(fleet)]
    return {
        "seconds": round(time.monotonic() - started_s),
        "kills": dict(chaos.done),
        "images": images,
        "requests": dict(outcomes),
        "dead_letters": letters,
    }


def main() -> int:
    """Run the drill and print its record."""
    parser = argparse.ArgumentParser(prog="python -m tests.drills", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)  # the clients' retries are what is to be expected
    print(json.dumps(drill(options.kills, options.seed), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
