"""Runs that are killed, stopped or held up go on as if nothing had been."""

import json
import os
import random
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.services.conftest import Process, wait_until
from tests.trainer.conftest import Outcome, Run, make_var
from tests.trainer.test_run import FailsAtLast, assert_failed, lines
from trainer.distributed import Group
from trainer.evaluation import Evaluator
from trainer.metrics import Metrics
from trainer.models.checkpoints import save_var
from trainer.options import load_config
from trainer.run_folder import describe, mark, open_folder

pytestmark = pytest.mark.redis

Start = Callable[..., Run]
RunHere = Callable[..., Outcome]
STEPS = 12
SETTINGS = ("--run.steps", STEPS, "--run.grid_every", 0, "--checkpoint.every", 3)


def done_steps(folder: Path) -> int:
    """How many lines of metrics a run has."""
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for(folder: Path, steps: int, run: Run | None = None) -> None:
    """Wait until so many steps are done; a run that has ended will not do them."""
    wait_until(lambda: done_steps(folder) >= steps or (run is not None and not run.is_running()), 120)
    assert done_steps(folder) >= steps, run and run.error()


def kill_in_the_middle(start: Start, recipe: Path, *, after: int, ranks: int, more: Sequence[object]) -> None:
    """Start a run and kill all of it, once so many steps are done."""
    run = start(recipe, *SETTINGS, *more, "--run.name", "parts", ranks=ranks)
    wait_for(recipe.parent / "runs" / "parts", after, run)
    run.note_children()
    for pid in [*run.children, run.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    run.outcome()


def check_killed_and_resumed(
    start: Start, recipe: Path, *, ranks: int = 1, more: Sequence[object] = (), rel: float = 0.0
) -> None:
    """Killed at a random step and resumed, twice, the metrics are those of a run that was never killed."""
    assert start(recipe, *SETTINGS, *more, "--run.name", "whole", ranks=ranks).outcome().code == 0
    generator = random.Random()
    for after in (generator.randint(1, 6), generator.randint(7, STEPS - 1)):
        resume = ("--resume",) if after > 6 else ()
        kill_in_the_middle(start, recipe, after=after, ranks=ranks, more=(*more, *resume))
    outcome = start(recipe, *SETTINGS, *more, "--run.name", "parts", "--resume", ranks=ranks).outcome()
    assert outcome.code == 0, outcome.err
    assert "resumed after step" in outcome.err
    runs = recipe.parent / "runs"
    whole, parts = (lines(runs / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert [line["step"] for line in parts] == list(range(1, STEPS + 1))
    if rel:
        for one, other in zip(whole, parts, strict=True):
            assert other == {k: v if v is None else pytest.approx(v, rel=rel, abs=rel) for k, v in one.items()}
    else:
        assert parts == whole
    summaries = [json.loads((runs / name / "summary.json").read_text()) for name in ("whole", "parts")]
    for when in ("before", "after"):
        expected = {k: v if v is None else pytest.approx(v, rel=rel) for k, v in summaries[0][when].items()}
        assert summaries[1][when] == expected


def test_a_killed_run_goes_on_bit_for_bit(start: Start, recipe: Path) -> None:
    """SIGKILL to all of it, at a random step."""
    check_killed_and_resumed(start, recipe)


@pytest.mark.slow
def test_two_killed_ranks_go_on_bit_for_bit(start: Start, recipe: Path) -> None:
    """The same with two of them."""
    check_killed_and_resumed(start, recipe, ranks=2)


@pytest.mark.slow
def test_a_killed_run_with_clip_goes_on(start: Start, recipe: Path) -> None:
    """Scores of a network may differ in the last digits: within 1e-5."""
    clip = ("--rewards.0.name", "mini-clip", "--rewards.0.prompt", "a painting", "--rewards.0.shape", "identity")
    check_killed_and_resumed(start, recipe, more=clip, rel=1e-5)


def test_a_stopped_run_goes_on_with_the_command_that_it_names(start: Start, run_here: RunHere, recipe: Path) -> None:
    """SIGTERM, exit 75; the named folder is resumed, later steps may be added, and nothing is repeated."""
    folder = recipe.parent / "runs" / "tiny"
    run = start(recipe, "--run.steps", 100_000, "--run.grid_every", 0)
    wait_until(lambda: done_steps(folder) >= 2, 120)
    run.send(signal.SIGTERM)
    outcome = run.outcome()
    assert outcome.code == 75
    done = done_steps(folder)
    assert f"--resume {folder}" in outcome.err.splitlines()[-1]
    resumed = run_here(recipe, "--run.steps", done + 2, "--run.grid_every", 0, "--resume", folder)
    assert resumed.code == 0, resumed.err
    assert [line["step"] for line in lines(folder / "metrics.jsonl")] == list(range(1, done + 3))


def test_a_second_signal_ends_it_at_once(start: Start, recipe: Path) -> None:
    """Whoever cannot wait for the step."""
    run = start(
        recipe, "--run.steps", 100_000, "--rollout.labels", 64, "--rollout.chunk", 256, "--optim.minibatch", 256
    )
    wait_until(lambda: done_steps(recipe.parent / "runs" / "tiny") >= 1, 120)
    run.send(signal.SIGTERM)
    wait_until(lambda: "once more ends the run at once" in run.error())
    time.sleep(1.1)  # a moment later it is another signal
    if run.is_running():
        run.send(signal.SIGTERM)
    assert run.outcome().code in {75, 130}  # the step may have been done by then


def test_a_folder_is_one_runs_at_a_time(start: Start, run_here: RunHere, recipe: Path) -> None:
    """A cluster may start the same command twice; the second says so, and leaves the first alone."""
    folder = recipe.parent / "runs" / "tiny"
    run = start(recipe, "--run.steps", 100_000, "--run.grid_every", 0, "--checkpoint.every", 1)
    wait_for(folder, 2)
    assert_failed(run_here(recipe, "--run.resume", "auto"), "another run is at work there", code=2)
    run.send(signal.SIGTERM)
    assert run.outcome().code == 75


def test_fewer_steps_than_are_done_is_one_line(run_here: RunHere, recipe: Path) -> None:
    """The policy would not be that of so few steps."""
    assert run_here(recipe).code == 0
    settings = recipe.parent / "runs" / "tiny" / "config.yaml"
    began = settings.read_text()
    assert_failed(run_here(recipe, "--run.steps", 1, "--resume"), "run.steps is 1, and 2 are done", code=2)
    assert settings.read_text() == began


def test_a_service_that_is_away_in_an_evaluation_leaves_a_run_that_goes_on(run_here: RunHere, recipe: Path) -> None:
    """The steps before it are saved, and exit 75 says so."""
    with ThreadingHTTPServer(("127.0.0.1", 0), FailsAtLast) as server:
        server.posts, server.last_status = 0, 503  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        outcome = run_here(recipe, "--rewards.0.url", url, "--run.score_timeout_s", 2)
        server.shutdown()
        thread.join()
    folder = recipe.parent / "runs" / "tiny"
    assert_failed(outcome, url, "the state after step 2 is saved", f"--resume {folder}", code=75)
    assert run_here(recipe, "--resume", folder).code == 0
    assert (folder / "summary.json").exists()


def test_a_step_that_fails_right_after_a_resume_leaves_its_state_the_score(run_here: RunHere, recipe: Path) -> None:
    """The best state is chosen by it."""
    manifest = recipe.parent / "runs" / "tiny" / "states" / "step_00000002" / "manifest.json"
    scores = []
    with ThreadingHTTPServer(("127.0.0.1", 0), FailsAtLast) as server:
        server.posts, server.last_status = 0, 503  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = ("--rewards.0.url", f"http://127.0.0.1:{server.server_port}", "--run.score_timeout_s", 2)
        for more in ((), ("--run.steps", 3, "--resume")):
            assert_failed(run_here(recipe, *url, *more), "the state after step 2 is saved", code=75)
            scores.append(json.loads(manifest.read_text())["score"])
        server.shutdown()
        thread.join()
    assert scores[0] == scores[1] is not None


def test_what_was_due_when_a_run_stopped_is_made_up_for(
    run_here: RunHere, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation and the grid after the step in which it was told to stop; the line that goes on can be typed."""
    settings = ("--run.steps", 6, "--run.grid_every", 2, "--eval.every", 2, "--run.dir", recipe.parent / "my runs")
    folder = recipe.parent / "my runs" / "tiny"
    with monkeypatch.context() as patch:
        patch.setattr(Group, "any", lambda *_: done_steps(folder) == 2)
        stopped = run_here(recipe, *settings)
    assert_failed(stopped, "the state after step 2 is saved", f"--resume '{folder}'", code=75)
    assert run_here(recipe, *settings, "--resume").code == 0
    assert sorted(path.stem for path in (folder / "evaluations").iterdir()) == ["step_000002", "step_000004"]
    assert sorted(path.stem for path in (folder / "grids").iterdir()) == [f"step_{n:06d}" for n in (0, 2, 4, 6)]


def test_sigterm_in_an_evaluation_in_between_ends_the_run_at_once(
    run_here: RunHere, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state before it is saved, and it is made when the run goes on."""
    measure, calls = Evaluator.measure, 0

    def told_to_stop(self: Evaluator) -> Metrics:
        nonlocal calls
        calls += 1
        if calls == 2:
            signal.raise_signal(signal.SIGTERM)
        return measure(self)

    monkeypatch.setattr(Evaluator, "measure", told_to_stop)
    folder = recipe.parent / "runs" / "tiny"
    assert_failed(run_here(recipe, "--eval.every", 1), "interrupted", code=75)
    assert (calls, done_steps(folder)) == (2, 1)
    assert run_here(recipe, "--eval.every", 1, "--resume").code == 0
    assert [path.stem for path in (folder / "evaluations").iterdir()] == ["step_000001"]


def test_steps_that_were_given_up_leave_nothing(
    run_here: RunHere, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run that goes on from an earlier state is that of this state, though it is killed before the next.

    Nor does what an earlier kill left half written.
    """
    settings = ("--checkpoint.every", 1, "--checkpoint.keep", 9, "--eval.every", 2, "--run.steps")
    assert run_here(recipe, *settings, 4).code == 0
    folder = recipe.parent / "runs" / "tiny"
    (folder / "grids" / ".step_000003.png.1.tmp").touch()
    (folder / "grids" / "step_000003 (copy).png").touch()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trainer.session.train_step", killed)
        state = folder / "states" / "step_00000001"
        assert_failed(run_here(recipe, *settings, 4, "--resume", state), "interrupted", code=130)
    assert not (folder / "summary.json").exists()
    assert not (folder / "checkpoint").exists()
    assert sorted(path.name for path in (folder / "states").iterdir()) == ["step_00000000", "step_00000001"]
    assert sorted(path.name for path in (folder / "grids").iterdir()) == [
        *("step_000000.png", "step_000001.png", "step_000003 (copy).png")
    ]
    assert not list((folder / "evaluations").iterdir())
    assert run_here(recipe, *settings, 5, "--resume").code == 0
    assert [line["step"] for line in lines(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert (folder / "checkpoint" / "var.safetensors").exists()


def test_a_run_of_another_name_is_not_gone_on_with(run_here: RunHere, recipe: Path) -> None:
    """`tiny-2` may be the second run named `tiny`, or one that was given that name."""
    assert run_here(recipe, "--run.name", "tiny-2", "--optim.lr", 0.01).code == 0
    assert_failed(run_here(recipe, "--resume"), "no run named tiny", code=2)
    assert [run_here(recipe).code, run_here(recipe).code] == [0, 0]
    assert run_here(recipe, "--resume", "--run.steps", 3).code == 0
    assert [done_steps(recipe.parent / "runs" / name) for name in ("tiny", "tiny-2", "tiny-3")] == [2, 2, 3]


def test_a_restart_goes_on_in_the_folder_of_its_own_run(tmp_path: Path, recipe: Path) -> None:
    """One start of torchrun may be of several runs, and `--resume` may name a folder that was moved or renamed."""
    config = load_config(str(recipe), {"run.name": "one", "run.dir": str(tmp_path / "runs")})
    folder, _ = open_folder(config, None, "", must_resume=False)
    mark(folder, "a start")
    describe(folder, config, torch.device("cpu"))
    assert open_folder(config, None, "a start", must_resume=False) == (folder, None)
    other = load_config(str(recipe), {"run.name": "two", "run.dir": str(tmp_path / "runs")})
    assert open_folder(other, None, "a start", must_resume=False) == (tmp_path / "runs" / "two", None)
    moved = folder.rename(tmp_path / "elsewhere")
    state = moved / "states" / "step_00000001"
    assert open_folder(config, state, "a start", must_resume=True) == (moved, None)
    state.mkdir(parents=True)
    assert open_folder(config, state, "", must_resume=True) == (moved, state)
    named = moved.rename(tmp_path / "runs" / "best")
    best = load_config(str(recipe), {"run.name": "best", "run.dir": str(tmp_path / "runs")})
    assert open_folder(best, None, "", must_resume=True) == (named, None)


def test_resume_without_a_run_is_one_line(run_here: RunHere, recipe: Path) -> None:
    """By name and by folder."""
    assert_failed(run_here(recipe, "--resume"), "no run named tiny", code=2)
    assert_failed(run_here(recipe, "--resume", recipe.parent), "no run's folder", code=2)


def test_auto_begins_where_there_is_nothing_and_goes_on_where_there_is(run_here: RunHere, recipe: Path) -> None:
    """As a cluster starts the same command again and again."""
    for steps in (2, 3):
        outcome = run_here(recipe, "--run.resume", "auto", "--run.steps", steps)
        assert outcome.code == 0, outcome.err
    assert [line["step"] for line in lines(recipe.parent / "runs" / "tiny" / "metrics.jsonl")] == [1, 2, 3]
    assert [path.name for path in (recipe.parent / "runs").iterdir()] == ["tiny"]


def test_another_runs_state_is_refused(run_here: RunHere, recipe: Path) -> None:
    """A recipe that would learn otherwise cannot go on from it; where the work is done may change."""
    assert run_here(recipe).code == 0
    folder = recipe.parent / "runs" / "tiny"
    outcome = run_here(recipe, "--optim.lr", 0.01, "--rewards.0.weight", 2, "--run.steps", 3, "--resume", folder)
    changes = "optim.lr was 0.001 and is 0.01; rewards.0.weight was 1.0 and is 2.0"
    assert_failed(outcome, changes, "resume with the settings that the run began with")
    assert yaml.safe_load((folder / "config.yaml").read_text())["optim"]["lr"] == 0.001
    outcome = run_here(recipe, "--eval.samples", 9, "--eval.every", 1, "--run.steps", 3, "--resume", folder)
    assert_failed(outcome, f"{folder}: eval.samples was 8 and is 9; resume with")
    assert run_here(recipe, "--rollout.chunk", 4, "--run.steps", 3, "--resume", folder).code == 0


def test_weights_may_move_and_not_change(run_here: RunHere, recipe: Path) -> None:
    """The reference is what the run began with, wherever it is read."""
    moved, other = recipe.parent / "moved.safetensors", recipe.parent / "other.safetensors"
    save_var(moved, make_var())
    save_var(other, make_var(seed=1))
    assert run_here(recipe).code == 0
    more = ("--run.steps", 3, "--resume", "--model.var")
    assert_failed(
        run_here(recipe, *more, other), f"model.var {other}", "other weights than those that the run began with"
    )
    outcome = run_here(recipe, *more, moved)
    assert outcome.code == 0, outcome.err


def test_sigterm_in_an_evaluation_ends_the_run_at_once(start: Start, recipe: Path) -> None:
    """Nothing is lost by it: exit 75 has a cluster start the same command again."""
    run = start(recipe, "--eval.samples", 100_000)
    wait_until(lambda: "reward brightness: http" in run.error(), 60)
    run.send(signal.SIGTERM)
    assert_failed(run.outcome(), "interrupted", code=75)


def test_a_damaged_state_is_refused_and_the_one_before_offered(run_here: RunHere, recipe: Path) -> None:
    """The line names it; resuming from it works."""
    assert run_here(recipe, "--checkpoint.every", 1).code == 0
    states = recipe.parent / "runs" / "tiny" / "states"
    file = states / "step_00000002" / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    outcome = run_here(recipe, "--run.steps", 3, "--resume")
    assert_failed(outcome, "it was altered", f"resume with --resume {states / 'step_00000001'}")
    outcome = run_here(recipe, "--run.steps", 3, "--resume", states / "step_00000001")
    assert outcome.code == 0, outcome.err
    assert [line["step"] for line in lines(states.parent / "metrics.jsonl")] == [1, 2, 3]


def test_a_service_that_stays_away_leaves_a_run_that_goes_on(start: Start, run_here: RunHere, recipe: Path) -> None:
    """Exit 75 after its budget, with the service and what resumes the run; the state is the last step's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    folder = recipe.parent / "runs" / "tiny"
    url = ("--rewards.0.url", f"http://127.0.0.1:{port}")
    with (recipe.parent / "service").open("w+b") as stderr:
        service = Process(("serve", "brightness", "--port", str(port), "--announce"), {}, stderr)
        service.announced()
        run = start(recipe, *url, "--run.steps", 100_000, "--run.grid_every", 0, "--run.score_timeout_s", 3)
        wait_until(lambda: done_steps(folder) >= 2, 120)
        service.send(signal.SIGTERM)
        service.wait()
        service.close()
    outcome = run.outcome()
    assert_failed(outcome, f"127.0.0.1:{port}", f"--resume {folder}", code=75)
    done = done_steps(folder)
    assert max(path.name for path in (folder / "states").iterdir()) == f"step_{done:08d}"
    resumed = run_here(recipe, "--run.steps", done + 1, "--run.grid_every", 0, "--resume", folder)
    assert resumed.code == 0, resumed.err


def test_a_service_that_is_killed_in_a_step_changes_nothing(start: Start, recipe: Path) -> None:
    """Worker and API die under a run, and are started again: the run goes on, with the same scores."""
    results: list[list[dict[str, Any]]] = []
    for kills in (False, True):
        name = f"kills-{kills}"
        with (recipe.parent / name).open("w+b") as stderr:
            service = Process(("serve", "brightness", "--port", "0", "--announce"), {}, stderr)
            url = service.url()
            run = start(recipe, *SETTINGS, "--rewards.0.url", url, "--run.name", name)
            for after, role in ((2, b"worker"), (5, b"api")) if kills else ():
                wait_for(recipe.parent / "runs" / name, after)
                for pid in service.children(role):
                    os.kill(pid, signal.SIGKILL)
            outcome = run.outcome()
            assert outcome.code == 0, outcome.err
            service.send(signal.SIGTERM)
            service.wait()
            service.close()
        results.append(lines(recipe.parent / "runs" / name / "metrics.jsonl"))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "clip",
    [
        ("--rewards.0.name", "mini-clip", "--rewards.0.prompt", "a painting", "--rewards.0.shape", "identity"),
        ("--eval.rewards", "[{name: mini-clip, prompt: a painting}]"),
    ],
)
def test_a_reward_of_another_version_does_not_go_on(run_here: RunHere, recipe: Path, clip: tuple[str, ...]) -> None:
    """What the run began with is kept in its state, of those that are only looked at, too."""
    assert run_here(recipe, *clip).code == 0
    states = recipe.parent / "runs" / "tiny" / "states"
    values = json.loads((states / "step_00000002" / "values.json").read_text())
    assert values["models"]["mini-clip"].startswith("mini-clip mini-clip-")
    os.environ["REWARD_CLIP_PROMPT"] = "a sketch"  # which changes the version, and not these scores
    try:
        outcome = run_here(recipe, *clip, "--run.steps", 3, "--resume")
    finally:
        del os.environ["REWARD_CLIP_PROMPT"]
    assert_failed(outcome, "was scored by mini-clip", "bring the first back, or start a new run")


def test_a_loss_that_is_not_finite_keeps_its_minibatch(run_here: RunHere, recipe: Path, models: dict[str, str]) -> None:
    """For study, beside the state before the step; the message names the file."""
    var = make_var()
    with torch.no_grad():
        var.head.bias[3] = torch.nan
    save_var(recipe.parent / "nan.safetensors", var)
    outcome = run_here(recipe, "--model.var", recipe.parent / "nan.safetensors")
    assert_failed(outcome, "step 1: loss nan", "its minibatch is in")
    folder = recipe.parent / "runs" / "tiny"
    minibatch = load_file(folder / "not_finite" / "step_000001.safetensors")
    assert minibatch.keys() == {"conditions", "tokens", "log_probs", "reference", "advantages"}
    assert minibatch["tokens"].shape == (4, 21)
    assert (folder / "states" / "step_00000000").is_dir()


def test_a_bound_on_the_kl_stops_the_run(run_here: RunHere, recipe: Path) -> None:
    """Not 0, for not all steps are done; the state is there."""
    outcome = run_here(recipe, "--grpo.max_kl", 1e-9, "--optim.lr", 0.01, "--run.steps", 50)
    assert_failed(outcome, "grpo.max_kl is 1e-09")
    assert list((recipe.parent / "runs" / "tiny" / "states").iterdir())


def test_lora_trains_goes_on_and_is_saved_merged(run_here: RunHere, recipe: Path) -> None:
    """Only adapters are in the state; the checkpoint is a plain VAR."""
    lora = ("--model.lora", "{rank: 2, alpha: 4}")
    assert run_here(recipe, *lora).code == 0
    folder = recipe.parent / "runs" / "tiny"
    state = load_file(folder / "states" / "step_00000002" / "state.safetensors")
    assert 0 < len([name for name in state if name.startswith("policy/")]) == 2 * 2 * 4
    outcome = run_here(recipe, *lora, "--run.steps", 3, "--resume")
    assert outcome.code == 0, outcome.err
    merged = shutil.copy(folder / "checkpoint" / "var.safetensors", recipe.parent / "merged.safetensors")
    assert run_here(recipe, "--model.var", merged, "--run.steps", 1, "--run.name", "after").code == 0


def test_every_switch_trains(run_here: RunHere, recipe: Path) -> None:
    """No reference, blocking order, several epochs, a falling rate, activations computed again, evaluations between."""
    content = yaml.safe_load(recipe.read_text())
    content["grpo"] = {"beta": 0.0, "epochs": 2, "combine": "normalize_then_sum"}
    content["rollout"] |= {"blocking": True}
    content["optim"] |= {"schedule": "cosine", "warmup_steps": 1}
    content["model"] |= {"recompute": True}
    content["eval"] |= {"every": 1, "inference": True, "top_k": 8, "rewards": [{"name": "mini-aesthetic"}]}
    recipe.write_text(yaml.safe_dump(content))
    outcome = run_here(recipe, "--run.steps", 3)
    assert outcome.code == 0, outcome.err
    folder = recipe.parent / "runs" / "tiny"
    metrics = lines(folder / "metrics.jsonl")
    assert [line["kl"] for line in metrics] == [None] * 3
    assert metrics[0]["learning_rate"] == metrics[1]["learning_rate"] > metrics[2]["learning_rate"] > 0
    between = [json.loads(path.read_text()) for path in sorted((folder / "evaluations").iterdir())]
    assert len(between) == 2
    for measured in between:
        assert {"raw_score/mini-aesthetic", "inference/raw_score/mini-aesthetic", "inference/reward"} <= measured.keys()
