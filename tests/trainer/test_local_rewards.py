"""Reward services that a run starts itself: there when needed, and gone with the run, however it ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from services.client import RewardRefused
from services.rewards.brightness import Brightness
from tests.services.conftest import descendants, is_alive, random_images, wait_until
from tests.trainer.conftest import ROOT
from trainer.config import RewardConfig
from trainer.local_rewards import LocalRewards, LocalRewardsError
from trainer.scoring import Scorer
from trainer.settings import Settings

pytestmark = pytest.mark.redis

PARENT = """
import json, sys, time
from pathlib import Path
from trainer.local_rewards import LocalRewards

with LocalRewards(["brightness"], Path(sys.argv[1])) as services:
    print(json.dumps(services.urls), flush=True)
    time.sleep(600)
"""


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def listens(port: int) -> bool:
    """Whether anyone accepts connections there."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def queued_images(url: str) -> float:
    """Images that wait or are in work, as the service's metrics say."""
    text = httpx.get(f"{url}/metrics", timeout=10).text
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith("reward_queue_images{"))


def process_of(pids: set[int], part: bytes) -> int:
    """The one process that has a part in its command line."""
    (pid,) = (pid for pid in pids if part in Path(f"/proc/{pid}/cmdline").read_bytes())
    return pid


def assert_gone(pids: set[int], port: int) -> None:
    """No process and no port is left."""
    wait_until(lambda: not any(is_alive(pid) for pid in pids))
    wait_until(lambda: not listens(port))


def below_this_process() -> set[int]:
    return set(descendants(os.getpid()))


def test_services_start_score_and_stop(tmp_path: Path) -> None:
    """They listen on a free port of this machine; nothing is left afterwards."""
    before = below_this_process()
    with LocalRewards(["brightness"], tmp_path / "services.log") as services:
        (url,) = services.urls.values()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
        pids = below_this_process() - before
        assert len(pids) == 4  # supervisor, Redis, API, worker
        images_BHW3 = random_images(3, 8, 8, 3)
        with Scorer([RewardConfig(name="brightness")], services.urls, timeout_s=60) as scorer:
            scored = scorer.submit(images_BHW3).result(60)
    assert np.array_equal(scored.reward, Brightness().score(images_BHW3, None))
    assert_gone(pids, port_of(url))
    assert (tmp_path / "services.log").exists()


def test_an_exception_stops_them(tmp_path: Path) -> None:
    """Also while a second run has its own, at another port."""
    before = below_this_process()
    with LocalRewards(["brightness"], tmp_path / "other.log") as other:
        others = below_this_process() - before
        services, pids = LocalRewards(["brightness"], tmp_path / "services.log"), set()

        def fail() -> None:
            with services:
                pids.update(below_this_process() - before - others)
                assert services.urls["brightness"] != other.urls["brightness"]
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert len(pids) == 4
        assert_gone(pids, port_of(services.urls["brightness"]))
        assert listens(port_of(other.urls["brightness"]))


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A Python process that has started services and waits."""
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "services.log")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        yield process
        if process.poll() is None:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_death_of_their_run_stops_them(parent: subprocess.Popen[str], number: signal.Signals) -> None:
    """Even SIGKILL, which no program can handle, leaves no process and no port."""
    assert parent.stdout is not None
    url = json.loads(parent.stdout.readline())["brightness"]
    pids = set(descendants(parent.pid))
    assert len(pids) == 4
    assert listens(port_of(url))
    parent.send_signal(number)
    assert parent.wait(60) != 0
    assert_gone(pids, port_of(url))


def test_an_unknown_reward_is_said_in_the_services_own_words(tmp_path: Path) -> None:
    """The name, the known names, and where the log is; no process is left."""
    before = below_this_process()
    with pytest.raises(LocalRewardsError, match=r"unknown reward 'brigthness'; known: .*brightness") as caught:
        LocalRewards(["brigthness"], tmp_path / "services.log").__enter__()
    assert str(tmp_path / "services.log") in str(caught.value)
    assert below_this_process() == before


def test_services_that_are_not_ready_in_time_are_stopped(tmp_path: Path) -> None:
    """The wait has an end, and leaves no process."""
    before = below_this_process()
    with pytest.raises(LocalRewardsError, match="not ready after 0 s"):
        LocalRewards(["brightness"], tmp_path / "services.log", timeout_s=0.001).__enter__()
    wait_until(lambda: below_this_process() == before)


def test_a_run_whose_services_die_is_told_at_once(tmp_path: Path) -> None:
    """What is in flight fails, and what is sent later; the error says how they ended and names their log."""
    rewards = [RewardConfig(name="brightness")]
    before = below_this_process()
    with (
        LocalRewards(["brightness"], tmp_path / "services.log") as services,
        Scorer(rewards, services.urls, timeout_s=60) as scorer,
    ):
        services.when_dead(scorer.abort)
        pids = below_this_process() - before
        os.kill(process_of(pids, b"\0worker\0"), signal.SIGSTOP)
        pending = scorer.submit(random_images(3, 8, 8, 3))
        wait_until(lambda: queued_images(services.urls["brightness"]) == 3)  # the API waits for them
        os.kill(process_of(pids, b"\0serve\0"), signal.SIGKILL)
        words = r"exit code -9; log: .*services\.log"
        with pytest.raises(LocalRewardsError, match=words):
            pending.result(20)
        with pytest.raises(LocalRewardsError, match=words):
            scorer.submit(random_images(3, 8, 8, 3)).result(20)


def test_a_worker_that_dies_costs_a_run_nothing(tmp_path: Path) -> None:
    """It is started again, and what it had in hand is scored."""
    before = below_this_process()
    images_BHWC = random_images(3, 8, 8, 3)
    with (
        LocalRewards(["brightness"], tmp_path / "services.log") as services,
        Scorer([RewardConfig(name="brightness")], services.urls, timeout_s=60) as scorer,
    ):
        worker = process_of(below_this_process() - before, b"\0worker\0")
        os.kill(worker, signal.SIGSTOP)
        pending = scorer.submit(images_BHWC)
        wait_until(lambda: queued_images(services.urls["brightness"]) == 3)
        os.kill(worker, signal.SIGKILL)
        assert np.array_equal(pending.result(60).reward, Brightness().score(images_BHWC, None))
    assert "worker brightness: died with exit code -9; it is started again" in (tmp_path / "services.log").read_text()


def test_the_token_of_the_environment_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Services that a run starts inherit it, so the run must send it; without it they refuse."""
    monkeypatch.setenv("REWARD_TOKEN", "a-secret")
    rewards, images_BHW3 = [RewardConfig(name="brightness")], random_images(2, 8, 8, 3)
    with LocalRewards(["brightness"], tmp_path / "services.log") as services:
        with Scorer(rewards, services.urls, timeout_s=60, token=Settings().token) as scorer:
            assert scorer.submit(images_BHW3).result(60).reward.shape == (2,)
        with pytest.raises(RewardRefused, match="401"):
            Scorer(rewards, services.urls, timeout_s=60)
    assert "a-secret" not in (tmp_path / "services.log").read_text()


def test_no_name_starts_nothing(tmp_path: Path) -> None:
    """A run whose rewards all have a url needs no service here."""
    before = below_this_process()
    with LocalRewards([], tmp_path / "services.log") as services:
        assert services.urls == {}
        assert below_this_process() == before
    assert not (tmp_path / "services.log").exists()
