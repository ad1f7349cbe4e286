"""Evaluations that are stopped, killed or shared by ranks end with the numbers of one that was not."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.services.conftest import descendants, wait_until
from tests.trainer.conftest import ROOT
from trainer.evaluate.__main__ import main
from trainer.local_rewards import LocalRewards

pytestmark = pytest.mark.redis
Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real service of brightness."""
    with LocalRewards(["brightness"], tmp_path_factory.mktemp("services") / "log") as services:
        yield services.urls["brightness"]


@pytest.fixture
def arguments(models: dict[str, str], url: str) -> list[str]:
    """160 chunks of a tiny model, drawn on the CPU."""
    few = ["--per-class", "80", "--chunk", "2", "--top-k", "20", "--device", "cpu", "--seen", "0-1"]
    return [f"tiny={models['var']}", "--vqvae", models["vqvae"], *few, "--reward", f"brightness={url}"]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the processes that are compared with, for the last bits depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the command as a process; all are ended with the test."""
    processes: list[subprocess.Popen[bytes]] = []

    def starter(arguments: list[str], *, ranks: int = 1) -> subprocess.Popen[bytes]:
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
        with (tmp_path / f"err-{len(processes)}").open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", *torchrun, "trainer.evaluate", *arguments],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=err,
            )
        processes.append(process)
        return process

    yield starter
    for process in processes:
        for pid in [*descendants(process.pid), process.pid] if process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        process.wait()


def rows(out: Path) -> list[dict[str, Any]]:
    """The rows of an evaluation's result."""
    content: dict[str, Any] = json.loads((out / "evaluation.json").read_text())
    found: list[dict[str, Any]] = content["rows"]
    return found


def chunk_files(out: Path) -> dict[str, int]:
    """The chunks that are there, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in out.rglob("chunk_*.safetensors")}


def test_a_stopped_and_killed_evaluation_goes_on_bit_for_bit(
    start: Start, arguments: list[str], one_thread: None, tmp_path: Path
) -> None:
    """SIGTERM exits 75 and says how to go on; SIGKILL leaves whole chunks alone; none of them is measured again."""
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    process = start([*arguments, "--out", str(parts)])
    wait_until(lambda: len(chunk_files(parts)) >= 3 or process.poll() is not None, 60)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    said = (tmp_path / "err-0").read_text().splitlines()[-1]
    assert said.startswith("error: interrupted; what is done is kept: go on with: python -m trainer.evaluate tiny=")
    stopped = chunk_files(parts)
    assert 3 <= len(stopped) < 160
    process = start([*arguments, "--out", str(parts)])
    wait_until(lambda: len(chunk_files(parts)) >= len(stopped) + 3 or process.poll() is not None, 60)
    process.kill()
    process.wait()
    killed = chunk_files(parts)
    assert len(stopped) + 3 <= len(killed) < 160
    for out in (parts, whole):
        assert main([*arguments, "--out", str(out)]) == 0
    assert rows(parts) == rows(whole)
    assert stopped.items() <= killed.items() <= chunk_files(parts).items()
    assert len(chunk_files(parts)) == 160


def test_two_ranks_are_one(start: Start, arguments: list[str], one_thread: None, tmp_path: Path) -> None:
    """Each measures a share, the first joins them: the numbers of one process, bit for bit."""
    two, one = tmp_path / "two", tmp_path / "one"
    process = start([*arguments, "--out", str(two)], ranks=2)
    assert process.wait(120) == 0, (tmp_path / "err-0").read_text()
    assert main([*arguments, "--out", str(one)]) == 0
    assert rows(two) == rows(one)
    assert len(chunk_files(two)) == 160


@pytest.mark.slow
def test_a_lost_rank_suspends_the_others(start: Start, arguments: list[str], tmp_path: Path) -> None:
    """The one that is left says how to go on, and one process goes on with what both have done."""
    out = tmp_path / "out"
    long = [*arguments, "--per-class", "20000", "--out", str(out)]
    process = start(long, ranks=2)
    wait_until(lambda: len(chunk_files(out)) >= 4 or process.poll() is not None, 60)
    (rank,) = (
        pid
        for pid in descendants(process.pid)
        if {b"RANK=1", b"WORLD_SIZE=2"} <= set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    )
    os.kill(rank, signal.SIGKILL)
    assert process.wait(120) != 0
    said = (tmp_path / "err-0").read_text()
    assert "go on with: torchrun --nproc-per-node 2 -m trainer.evaluate" in said, said
