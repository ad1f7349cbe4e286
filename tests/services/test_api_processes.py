"""Several API processes of one reward behind one port: whichever is asked, it is one service."""

import asyncio
import functools
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from services import supervisor
from services.folders import LOCK_NAME
from services.images import encode_batch
from services.processes import StartError
from services.rewards.brightness import Brightness
from services.supervisor import METRICS_PREFIX
from tests.services.conftest import (
    Process,
    command_line,
    descendants,
    is_alive,
    random_images,
    wait_until,
    wait_until_async,
)
from tests.services.serving import SAFETENSORS

Start = Callable[..., Process]
SERVE = ("serve", "--port", "0", "--announce", "--until-stdin-closes")
TWO = {"REWARD_API_PROCESSES": "2"}
IMAGES_BHWC = random_images(3, 8, 8, 3)
REQUESTS = 16

pytestmark = [pytest.mark.redis, pytest.mark.anyio]


def folder_of(process: Process) -> Path:
    """Where its API processes count together."""
    arguments = command_line(process.children(b"api")[0]).decode().split("\0")
    folder = Path(arguments[arguments.index("--metrics-folder") + 1]).parent
    assert folder.name.startswith(METRICS_PREFIX)
    assert (folder / LOCK_NAME).exists()
    return folder


def score(url: str, key: str | None = None) -> httpx.Response:
    """Ask over a new connection, which any of the processes may take."""
    headers = SAFETENSORS if key is None else {**SAFETENSORS, "Idempotency-Key": key}
    answer = httpx.post(f"{url}/score", content=encode_batch(IMAGES_BHWC), headers=headers, timeout=30)
    assert answer.status_code == 200, answer.text
    assert answer.json()["scores"] == Brightness().score(IMAGES_BHWC, None).tolist()
    return answer


def counts(url: str) -> dict[str, float]:
    """What a process tells that was picked by chance: requests, images, and what was observed."""
    names = ("reward_requests_total", "reward_images_total", "reward_request_images_count")
    text = httpx.get(f"{url}/metrics", timeout=30).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert all(sample.labels["reward"] == "brightness" for sample in samples)
    return {sample.name: sample.value for sample in samples if sample.name in names}


def processes_that_answered(process: Process) -> set[int]:
    """Those of them whose log has a request."""
    lines = [line for line in process.errors().splitlines() if "request answered" in line]
    return {int(line.split("[")[1].split("]")[0]) for line in lines}


def test_two_processes_are_one_service(start: Start) -> None:
    """Requests come to both, one key has one answer, and each tells what both have counted."""
    process = start(*SERVE, "brightness", "--verbose", **TWO)
    url = process.url()
    assert len(process.children(b"api")) == 2
    for _ in range(20):
        score(url)
    replayed = [score(url, key="one").headers.get("idempotency-replayed") for _ in range(20)]
    assert replayed == [None] + 19 * ["true"]
    assert processes_that_answered(process) == set(process.children(b"api"))
    seen = [counts(url) for _ in range(12)]
    assert seen == 12 * [{"reward_requests_total": 40, "reward_images_total": 63, "reward_request_images_count": 40}]
    folder = folder_of(process)
    process.close_stdin()
    assert process.wait() == 0
    assert not folder.exists()


def test_a_process_that_dies_is_started_again_and_no_count_falls(start: Start) -> None:
    """Requests sent meanwhile are answered, each by whoever has its connection."""
    process = start(*SERVE, "brightness", **TWO)
    url = process.url()
    for _ in range(10):
        score(url)
    first = set(process.children(b"api"))

    def are_new(count: int) -> bool:
        return len(set(process.children(b"api")) - first) == count

    for number, pid in enumerate(first, start=1):
        os.kill(pid, signal.SIGKILL)
        for _ in range(10):
            score(url)
        wait_until(functools.partial(are_new, number))
    assert [counts(url)["reward_requests_total"] for _ in range(8)] == 8 * [30]
    process.close_stdin()
    assert process.wait() == 0


async def test_requests_in_hand_are_answered_when_all_are_told_to_stop(start: Start) -> None:
    """By both processes, while the worker still takes their jobs."""
    process = start(*SERVE, "tests.services.dummies:Slow", "--verbose", **TWO)
    url = process.url()
    async with httpx.AsyncClient(timeout=30) as client:

        async def is_in_hand() -> bool:
            text = (await client.get(f"{url}/metrics")).text
            return sum(map(float, re.findall(r"^reward_queue_images\{.*\} (.+)$", text, re.MULTILINE))) == 3 * REQUESTS

        request = {"content": encode_batch(IMAGES_BHWC), "headers": SAFETENSORS}
        asking = asyncio.gather(*(client.post(f"{url}/score", **request) for _ in range(REQUESTS)))
        await wait_until_async(is_in_hand)
        process.send(signal.SIGTERM)
        assert [answer.status_code for answer in await asking] == REQUESTS * [200]
    assert process.wait() == 0
    assert len(processes_that_answered(process)) == 2


def test_what_a_killed_service_leaves_the_next_one_removes(start: Start) -> None:
    """SIGKILL leaves the folder of its metrics."""
    process = start(*SERVE, "brightness", **TWO)
    process.announced()
    left = folder_of(process)
    pids = descendants(process.pid)
    process.send(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(is_alive(pid) for pid in pids))
    os.utime(left / LOCK_NAME, (0, 0))
    second = start(*SERVE, "brightness", **TWO)
    second.announced()
    assert not left.exists()
    second.close_stdin()
    assert second.wait() == 0


def test_a_reward_that_brings_torch_into_its_api_is_told(start: Start) -> None:
    """It costs each API process some hundred megabytes."""
    process = start(*SERVE, "tests.services.heavy:Heavy")
    process.announced()
    assert "tests.services.heavy:Heavy brings torch into its API" in process.errors()
    light = start(*SERVE, "mini-clip")
    light.announced()
    assert "brings torch" not in light.errors()


def test_a_folder_that_is_removed_under_a_service_costs_its_sums_alone(start: Start) -> None:
    """As systemd does with what a user who has logged out left in memory (RemoveIPC)."""
    process = start(*SERVE, "brightness", **TWO)
    url = process.url()
    shutil.rmtree(folder_of(process))
    score(url)
    assert counts(url)["reward_images_total"] in {0, 3}
    for pid in process.children(b"api"):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: len(process.children(b"api")) == 2)
    score(url)
    assert [counts(url)["reward_images_total"] for _ in range(8)] == 8 * [3]
    process.close_stdin()
    assert process.wait() == 0


def test_a_file_that_is_just_being_made_spoils_no_metrics(start: Start) -> None:
    """It is empty for some microseconds, or for ever where its process was killed just then."""
    process = start(*SERVE, "brightness", PROMETHEUS_MULTIPROC_DIR="/nowhere", **TWO)
    url = process.url()
    (folder_of(process) / "0" / "counter_1.db").touch()
    score(url)
    assert counts(url)["reward_images_total"] == 3
    process.close_stdin()
    assert process.wait() == 0


def test_without_room_in_memory_it_counts_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where there is none either, it is said what is missing where."""
    monkeypatch.setattr(supervisor, "MEMORY_ROOT", tmp_path / "none")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with supervisor._metrics_folder() as folder:
        assert folder.path.parent == tmp_path
        assert folder.path.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(supervisor, "METRICS_SPARE_BYTES", 2**62)
    wrong = (
        f"no folder for metrics \\({tmp_path}/none: No such file or directory; {tmp_path} has \\d+ bytes left, needs"
    )
    with pytest.raises(StartError, match=wrong):
        supervisor._metrics_folder()
