"""Several ranks: they share the work, agree on failures, and change nothing that is sampled or learnt."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.services.conftest import wait_until
from tests.trainer.conftest import ROOT, Run, alone
from tests.trainer.test_run import RunHere, lines, trains
from trainer.config import ConfigError
from trainer.distributed import Group, RankLost
from trainer.options import load_config

Start = Callable[..., Run]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]


def on_two_ranks(name: str) -> subprocess.CompletedProcess[str]:
    """Run a function of `tests.trainer.ranks` on two ranks."""
    return subprocess.run(
        [*TORCHRUN, "tests.trainer.ranks", name],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def results(done: subprocess.CompletedProcess[str]) -> list[Any]:
    """What each rank found, in their order."""
    assert done.returncode == 0, done.stderr
    return [result for _, result in sorted(map(json.loads, done.stdout.splitlines()), key=lambda each: int(each[0]))]


def test_a_group_of_one_does_nothing() -> None:
    """No process group is made; every method gives back what it was given, and an error is raised as it is."""
    group = alone()
    assert (group.leads, group.share(6), group.mean(0.5), group.any(False)) == (True, range(6), 0.5, False)
    assert group.tell("alone") == "alone"
    with pytest.raises(KeyError), group.together():
        raise KeyError
    group.close()


def test_ranks_share_rows_numbers_and_words() -> None:
    """Rows in the order of the ranks, also where there are none; means and maxima over both; the first one's words."""
    first, second = results(on_two_ranks("collectives"))
    assert (first.pop("share"), second.pop("share")) == ([0, 3], [3, 6])
    assert first == second
    assert first == {
        "gathered": [0, 1, 2, 3, 4, 5],
        "empty": [6, 0],
        "mean": 0.5,
        "greatest": [1.0],
        "any": [True, False],
        "told": "für alle",
    }


def test_accumulated_gradients_are_averaged_at_once() -> None:
    """(1 + 10 + 2 · rank), over both ranks; cleared they are zero and in place."""
    for found in results(on_two_ranks("gradients")):
        assert found == {"averaged": [[12.0] * 2, [12.0] * 6], "cleared": [0.0, 0.0]}


def test_a_failure_is_agreed_by_all_before_anyone_raises() -> None:
    """The failed rank raises its own error, the other one names it and knows whether it passes; then both go on."""
    first, second = results(on_two_ranks("failure"))
    assert first == [
        ["rank 1 failed: the service is away", True],
        ["rank 1 failed: a bad value in two lines", False],
        "goes on",
    ]
    assert second == [["LocalRewardsError", True], ["ValueError", True], "goes on"]


@pytest.mark.slow
def test_a_rank_that_falls_silent_ends_the_others() -> None:
    """Within 30 s, though a collective would wait for it longer; the message names it."""
    began_s = time.monotonic()
    done = on_two_ranks("silence")
    assert time.monotonic() - began_s < 60
    assert done.returncode != 0
    assert "rank 1 is gone; rank 0 ends" in done.stderr


@pytest.mark.redis
def test_two_ranks_equal_one(start: Start, recipe: Path) -> None:
    """The same tokens, and so the same rewards; weights after three steps to 1e-6, relative, of each parameter to 1e-4.

    Of a bias that began at 0 a single gradient may be near 0, in which only rounding is left: AdamW makes a step of it.
    """
    settings = ("--run.steps", "3", "--run.grid_every", "0", "--optim.minibatch", "8")
    folders = []
    for ranks in (1, 2):
        outcome = start(recipe, *settings, "--run.name", f"ranks-{ranks}", ranks=ranks).outcome()
        assert outcome.code == 0, outcome.err
        folders.append(recipe.parent / "runs" / f"ranks-{ranks}")
    one, two = (lines(folder / "metrics.jsonl") for folder in folders)
    for alone_line, shared in zip(one, two, strict=True):
        assert shared.keys() == alone_line.keys()
        for name, value in alone_line.items():
            exact = name.startswith(("raw_", "shaped", "reward", "success", "zero"))
            assert shared[name] == (value if exact or value is None else pytest.approx(value, rel=1e-4, abs=1e-6)), name
    states = [load_file(folder / "states" / "step_00000003" / "state.safetensors") for folder in folders]
    first, second = ({k: v for k, v in state.items() if k.startswith("policy/")} for state in states)
    apart = {name: float((second[name] - entry).norm()) for name, entry in first.items()}
    norms = {name: float(entry.norm()) for name, entry in first.items()}
    assert math.hypot(*apart.values()) <= 1e-6 * math.hypot(*norms.values())
    for name, norm in norms.items():
        assert apart[name] <= 1e-4 * norm, name


@pytest.mark.redis
@pytest.mark.slow
def test_a_rank_that_dies_leaves_the_others_exiting(start: Start, recipe: Path) -> None:
    """Within 30 s, with a message that names it; what was before the step is saved, and the services are gone."""
    run = start(recipe, "--run.steps", "100000", "--run.grid_every", "0", ranks=2)
    wait_until(lambda: trains(recipe), 120)
    run.note_children()
    began_s = time.monotonic()
    os.kill(run.rank(1), signal.SIGKILL)
    outcome = run.outcome()
    assert time.monotonic() - began_s < 30
    assert outcome.code != 0
    (line,) = (line for line in outcome.err.splitlines() if line.startswith("error:"))
    assert "rank 1 is gone" in line
    assert "is saved" in line
    assert "torchrun --nproc-per-node 2 -m trainer.run" in line


@pytest.mark.redis
@pytest.mark.slow
def test_a_frozen_rank_costs_no_finished_step(start: Start, recipe: Path) -> None:
    """The first rank waits in a collective that never ends; its watching thread saves, names the other, and ends it."""
    run = start(recipe, "--run.steps", "100000", "--run.grid_every", "0", "--checkpoint.every", "100000", ranks=2)
    folder = recipe.parent / "runs" / "tiny"
    wait_until(lambda: len(metrics(folder)) >= 3, 120)
    frozen = run.rank(1)
    run.note_children()
    os.kill(frozen, signal.SIGSTOP)
    try:
        wait_until(lambda: "rank 1 is gone" in run.error(), 30)
        wait_until(lambda: "is saved" in run.error(), 10)
    finally:
        os.kill(frozen, signal.SIGKILL)
    run.outcome()
    (line,) = (line for line in run.error().splitlines() if line.startswith("error:"))
    done = metrics(folder)[-1]["step"]
    assert f"rank 1 is gone; rank 0 ends; the state after step {done} is saved; go on with: torchrun" in line
    assert (folder / "states" / f"step_{done:08d}").is_dir()


@pytest.mark.redis
def test_a_rank_that_is_lost_after_a_step_costs_none(
    run_here: RunHere, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is in the metrics, and its state is saved, though the ranks never came to agree what to do next."""
    asked = 0

    def lost(self: Group, mine: bool) -> bool:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise RankLost("rank 1 is gone")
        return mine

    monkeypatch.setattr(Group, "any", lost)
    outcome = run_here(recipe, "--run.steps", "5", "--run.grid_every", "0", "--checkpoint.every", "100")
    folder = recipe.parent / "runs" / "tiny"
    assert outcome.code == 75
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3]
    assert "rank 1 is gone; the state after step 3 is saved" in " ".join(outcome.err.split())


@pytest.mark.redis
def test_a_rank_that_is_lost_after_an_earlier_state_was_resumed(
    run_here: RunHere, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps that were given up are gone: what is saved, and gone on from, is what was done since."""
    settings = ("--run.grid_every", "0", "--checkpoint.every", "1", "--checkpoint.keep", "9")
    assert run_here(recipe, "--run.steps", "4", *settings).code == 0
    folder = recipe.parent / "runs" / "tiny"

    def lost(self: Group, mine: bool) -> bool:
        raise RankLost("rank 1 is gone")

    monkeypatch.setattr(Group, "any", lost)
    states = folder / "states"
    outcome = run_here(recipe, "--run.steps", "4", *settings, "--resume", str(states / "step_00000001"))
    assert "rank 1 is gone; the state after step 2 is saved" in " ".join(outcome.err.split())
    assert sorted(path.name for path in states.iterdir()) == [f"step_{step:08d}" for step in range(3)]


@pytest.mark.redis
@pytest.mark.slow
@pytest.mark.parametrize(("steps", "by_address"), [(0, False), (3, True)])
def test_torchrun_starts_a_run_again_in_its_own_folder(
    start: Start, recipe: Path, steps: int, by_address: bool
) -> None:
    """A rank is killed before the first state, or after: the run is whole, and another of its name is left alone.

    By an address every start has the same name for torchrun, so that the other's folder could be taken for its own.
    """
    settings = ("--run.steps", "8", "--run.grid_every", "0", "--checkpoint.every", "1")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"localhost:{listener.getsockname()[1]}"
    meets = ("--nnodes=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={address}") if by_address else ("--standalone",)
    assert start(recipe, "--run.steps", "1", ranks=2, meets=meets).outcome().code == 0
    other = (recipe.parent / "runs" / "tiny" / "metrics.jsonl").read_text()
    run = start(recipe, *settings, ranks=2, restarts=1, meets=meets)
    folder = recipe.parent / "runs" / "tiny-2"
    wait_until(lambda: (folder / "services.log").exists() and len(metrics(folder)) >= steps, 120)
    run.note_children()
    os.kill(run.rank(1), signal.SIGKILL)
    outcome = run.outcome()
    assert outcome.code == 0, outcome.err
    assert [line["step"] for line in metrics(folder)] == list(range(1, 9))
    assert (recipe.parent / "runs" / "tiny" / "metrics.jsonl").read_text() == other


def metrics(folder: Path) -> list[dict[str, Any]]:
    """What a run has written so far."""
    path = folder / "metrics.jsonl"
    return lines(path) if path.exists() else []


@pytest.mark.redis
@pytest.mark.slow
def test_one_signal_stops_all_ranks_together(start: Start, recipe: Path) -> None:
    """Whichever rank gets it: the step is finished by both, saved once, and both exit with 75."""
    run = start(recipe, "--run.steps", "100000", "--run.grid_every", "0", ranks=2)
    wait_until(lambda: trains(recipe), 120)
    os.kill(run.rank(1), signal.SIGTERM)
    outcome = run.outcome()
    assert outcome.err.count("is saved, go on with") == 2
    assert outcome.err.count("exitcode  : 75") == 2
    done = lines(recipe.parent / "runs" / "tiny" / "metrics.jsonl")[-1]["step"]
    states = (recipe.parent / "runs" / "tiny" / "states").iterdir()
    assert max(state.name for state in states) == f"step_{done:08d}"


def test_work_that_cannot_be_shared_is_refused(recipe: Path) -> None:
    """Labels and minibatch must be multiples of the ranks; the message says which is not."""
    load_config(str(recipe), {}).check_ranks(2)
    with pytest.raises(ConfigError, match=r"rollout.labels is 2, which 4 ranks cannot share evenly"):
        load_config(str(recipe), {}).check_ranks(4)
    with pytest.raises(ConfigError, match=r"optim.minibatch is 4"):
        load_config(str(recipe), {"rollout.labels": 8}).check_ranks(8)


def test_a_failing_rank_is_one_line_each(start: Start, recipe: Path) -> None:
    """Weights that are missing for all: nobody hangs."""
    outcome = start(recipe, "--model.var", "none.safetensors", ranks=2).outcome()
    assert outcome.code != 0
    assert outcome.err.count("error: none.safetensors: no such file") == 2
