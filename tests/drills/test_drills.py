"""What may happen to a service under load, with real processes and a real Redis.

In each drill every request gets exactly its own scores in its own order or a clear error; within one lease of the last
answer nothing is left in the queue; dead letters hold only what killed or hung its workers.
"""

import asyncio
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.client import RewardRefused
from tests.drills.fleet import LEASE_S, Fleet, assert_clean, dead_letters
from tests.drills.load import Load

pytestmark = [pytest.mark.redis, pytest.mark.drill]

REQUESTS = 200


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """Two APIs and two workers."""
    with Fleet(tmp_path) as running:
        yield running


def run_while(fleet: Fleet, action: Callable[[], None], *, every_s: float = 0.4, times: int = 5) -> None:
    """Send load after load while something is done several times; every request must get its scores."""
    thread = threading.Thread(target=lambda: [(time.sleep(every_s), action()) for _ in range(times)], daemon=True)
    thread.start()
    seed = 0
    while thread.is_alive() or not seed:
        load = Load(REQUESTS, seed=seed)
        asyncio.run(load.send(fleet.urls))
        assert load.check() == {"scores": REQUESTS}
        seed += 1
    assert_clean(fleet)
    assert dead_letters(fleet) == []


def run(fleet: Fleet, load: Load) -> dict[str, int]:
    """Send a load and check every outcome; the queue must be clean within a lease."""
    asyncio.run(load.send(fleet.urls))
    outcomes = dict(load.check())
    assert_clean(fleet)
    return outcomes


def test_workers_are_killed(fleet: Fleet) -> None:
    """SIGKILL in the middle of batches: others take over, nobody notices, nothing becomes a dead letter."""
    chance = random.Random(0)
    run_while(fleet, lambda: chance.choice(fleet.workers).send(signal.SIGKILL))
    assert sum(worker.starts for worker in fleet.workers) >= 4


def test_apis_are_killed(fleet: Fleet) -> None:
    """SIGKILL: the clients try again, with the same key; what the dead API had queued is dropped."""
    chance = random.Random(1)
    run_while(fleet, lambda: chance.choice(fleet.apis).send(signal.SIGKILL), every_s=1.5, times=2)
    assert sum(api.starts for api in fleet.apis) >= 3


@pytest.mark.parametrize("durable", [False, True], ids=["loses its data", "keeps its data"])
def test_redis_is_killed(tmp_path: Path, durable: bool) -> None:
    """SIGKILL, and started again: what it lost is submitted again."""
    with Fleet(tmp_path, durable=durable) as fleet:
        run_while(fleet, lambda: fleet.redis.send(signal.SIGKILL), every_s=1.0, times=3)
        assert fleet.redis.starts >= 3


def test_a_worker_stands_still_and_wakes(fleet: Fleet) -> None:
    """SIGSTOP for longer than its lease: another answers, and the zombie's late replies are dropped."""
    zombie = fleet.workers[0]

    def pause() -> None:
        zombie.send(signal.SIGSTOP)
        time.sleep(2 * LEASE_S)
        zombie.send(signal.SIGCONT)

    run_while(fleet, pause, times=1)
    assert zombie.starts == 1


@pytest.mark.parametrize("poison", ["raise", "nan", "count"])
def test_a_poisoned_image_fails_its_own_request(fleet: Fleet, poison: str) -> None:
    """An exception, a NaN, a score too few: an error for that request alone, and no dead letter."""
    load = Load(REQUESTS, poison=poison)
    assert run(fleet, load) == {"scores": REQUESTS - 5, "RewardRefused": 5}
    for request in load.requests:
        if request.poison is not None:
            assert isinstance(request.outcome, RewardRefused)
            assert request.outcome.status == 500
    assert [worker.starts for worker in fleet.workers] == [1, 1]
    assert dead_letters(fleet) == []


@pytest.mark.parametrize("poison", ["kill", "hang"])
def test_an_image_that_ends_its_workers_becomes_a_dead_letter(fleet: Fleet, poison: str) -> None:
    """Its request gets an error once it is known to be the culprit; those in one batch with it get their scores.

    That is after three deliveries for one that kills, and for one that hangs as soon as it has done so alone.
    """
    assert run(fleet, Load(REQUESTS, poison=poison, one_in=100)) == {"scores": REQUESTS - 2, "RewardRefused": 2}
    letters = dead_letters(fleet)
    assert len(letters) == 2
    assert {int(letter[b"deliveries"]) for letter in letters} <= ({3} if poison == "kill" else {1, 2})


def test_a_full_queue_loses_nothing(tmp_path: Path) -> None:
    """Beyond the bound it is 429 with Retry-After; the clients come back until all is scored."""
    with Fleet(tmp_path, workers=1, REWARD_QUEUE_IMAGES="256", REWARD_RETRY_AFTER_S="1") as fleet:
        assert run(fleet, Load(REQUESTS)) == {"scores": REQUESTS}
        assert any("429" in api.log() for api in fleet.apis)


def test_clients_leave(fleet: Fleet) -> None:
    """Their jobs go with them, the others get their scores."""
    assert run(fleet, Load(REQUESTS, leave=80)) == {"scores": REQUESTS - 80, "left": 80}


def test_two_versions_side_by_side(tmp_path: Path) -> None:
    """Each API is answered by workers of its own version alone."""
    with Fleet(tmp_path, apis=1, workers=1) as fleet:
        fleet.add_worker(DRILLED_VERSION="2")
        newer_url = fleet.add_api(DRILLED_VERSION="2")
        fleet.wait_ready()
        old, new = Load(REQUESTS // 2, seed=1), Load(REQUESTS // 2, seed=2)

        async def send_both() -> None:
            await asyncio.gather(old.send(fleet.urls[:1]), new.send([newer_url]))

        asyncio.run(send_both())
        assert old.check() == {"scores": REQUESTS // 2}
        assert new.check(offset=1.0) == {"scores": REQUESTS // 2}
        for version in ("1", "2"):
            assert_clean(fleet, version)


@pytest.mark.parametrize("role", ["api", "worker"])
def test_one_is_told_to_stop(fleet: Fleet, role: str) -> None:
    """SIGTERM under load: an API finishes what it has, a worker finishes its batch and hands the rest back."""
    members = fleet.apis if role == "api" else fleet.workers
    chance = random.Random(3)
    run_while(fleet, lambda: chance.choice(members).send(signal.SIGTERM), every_s=0.8, times=3)
    assert sum(member.starts for member in members) >= 4
    with fleet.client() as redis:
        events = redis.hgetall("reward:{drilled:1}:events")
    assert b"redeliveries" not in events  # what is handed back is no redelivery
