"""torchrun with an exit code that says whether the run goes on: real torchruns of small shell scripts as ranks."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.launch import EXIT_ALONE, code_of

LAUNCH = [sys.executable, "-m", "trainer.launch"]


@pytest.mark.parametrize(
    ("ended", "code"),
    [
        ([75], 75),
        ([75, 75], 75),
        ([75, 1], 1),
        ([1, 2, -9], 2),
        ([-9], 137),
        ([75, -9], 137),
        ([-9, -15, 75], 137),
        ([75, -15], 75),
        ([-15], 75),
    ],
)
def test_the_worst_that_a_rank_says_is_what_the_machine_says(ended: list[int], code: int) -> None:
    """A failure before a death, a death before what passes."""
    assert code_of(ended) == code


def ranks(script: str, *options: str) -> list[str]:
    """A torchrun of two ranks that are shell scripts."""
    return [*LAUNCH, *options, "--nproc-per-node=2", "--no-python", "sh", "-c", script]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("exit 0", 0),
        ("exit 75", 75),
        ("test $LOCAL_RANK = 0 && sleep 30; exit 1", 1),
        ("test $LOCAL_RANK = 0 && sleep 30; kill -s KILL $$$$", 137),
    ],
)
def test_the_exit_code_is_that_of_the_ranks(script: str, code: int) -> None:
    """Of the one that failed; the other is ended. (torchrun makes one dollar of two.)"""
    assert subprocess.run(ranks(script), capture_output=True, timeout=60, check=False).returncode == code


@pytest.mark.slow
def test_a_machine_that_is_told_to_stop_tells_its_ranks_and_goes_on_later(tmp_path: Path) -> None:
    """The ranks have the time that they need."""
    script = (
        f"trap 'sleep 1; touch {tmp_path}/$RANK; exit 75' TERM; touch {tmp_path}/up$RANK; while :; do sleep 0.1; done"
    )
    with subprocess.Popen(ranks(script, "--shutdown-timeout=20"), stderr=subprocess.PIPE, text=True) as process:
        gives_up_s = time.monotonic() + 60
        while len(list(tmp_path.glob("up*"))) < 2:
            assert time.monotonic() < gives_up_s
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "up0", "up1"}
    assert "the ranks were told" in errors


@pytest.mark.slow
def test_others_that_do_not_come_are_told_apart() -> None:
    """The first machine is not there, and its name does not even exist."""
    options = ["--nnodes=2", "--node-rank=1", "--master-addr=nowhere.invalid", "--rdzv-conf=timeout=5"]
    done = subprocess.run(ranks("exit 0", *options), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == EXIT_ALONE
    assert "the other machines are not to be reached" in done.stderr.splitlines()[-1]
