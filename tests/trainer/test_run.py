"""The command line, as people run it: what a run leaves behind, and how it fails."""

import json
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from services.protocol import MEDIA_JSON, Info, Limits
from tests.services.conftest import descendants, wait_until
from tests.trainer.conftest import Outcome, Run, make_var, same_weights, weights
from trainer.checkpoint import MANIFEST, TENSORS, VALUES
from trainer.miniature.weights import FILES
from trainer.models.checkpoints import load_var, read_metadata
from trainer.options import load_config, recipe_names
from trainer.run_folder import describe

Start = Callable[..., Run]
RunHere = Callable[..., Outcome]
TIMINGS = ("seconds/", "images_per_second")
ENDLESS = ("--run.steps", "100000", "--run.grid_every", "0")
EVALUATED = {"reward", "raw_score", "success_rate", "label_accuracy"}


def lines(path: Path) -> list[dict[str, Any]]:
    """The metrics of a run, without timings."""
    read = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(TIMINGS)} for line in read]


def files(folder: Path) -> set[str]:
    """All files below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def assert_failed(outcome: Outcome, *words: str, code: int = 1) -> None:
    """It ended with a code that is not 0, and the last thing it said is one line that begins with `error:`."""
    said = outcome.err.splitlines()
    assert outcome.code == code, outcome.err
    assert [line for line in said if line.startswith("error:")] == said[-1:], outcome.err
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in said[-1]


def assert_nothing_saved(recipe: Path, *, states: int = 0) -> None:
    """No checkpoint, no summary, nothing half-written, and so many states to go on from."""
    left = files(recipe.parent / "runs") if (recipe.parent / "runs").exists() else set()
    assert not {name for name in left if "checkpoint" in name or "summary" in name or name.endswith(".tmp")}, left
    assert len({name for name in left if name.endswith("manifest.json")}) == states, left


def assert_complete(folder: Path) -> None:
    """Every file of a run of two steps with a grid at each is there, and no other."""
    found = files(folder)
    boards = {name for name in found if name.startswith("tensorboard/events.")}
    assert len(boards) == 1
    assert found - boards == {
        ".lock",
        "config.yaml",
        "versions.json",
        "metrics.jsonl",
        "services.log",
        "summary.json",
        "checkpoint/var.safetensors",
        *(f"states/step_0000000{step}/{name}" for step in (0, 2) for name in (TENSORS, VALUES, MANIFEST)),
        *(f"grids/step_{step:06d}.png" for step in (0, 1, 2)),
    }


@pytest.mark.redis
def test_a_run_from_start_to_end(start: Start, run_here: RunHere, recipe: Path) -> None:
    """Exit 0, every file in its place, and the same numbers from the same seed."""
    run = start(recipe)
    outcome = run.outcome()
    assert outcome.code == 0, outcome.err
    assert "error" not in outcome.err
    assert len(run.note_children()) == 4  # supervisor, Redis, API, worker
    folder = recipe.parent / "runs" / "tiny"
    assert_complete(folder)
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written == load_config(str(recipe), {}).to_dict()
    assert {"python", "torch", "device"} <= set(json.loads((folder / "versions.json").read_text()))
    for words in ("before", "after", "success rate", str(folder / "metrics.jsonl"), "A tiny run [of tests]."):
        assert words in outcome.err, words

    var = load_var(folder / "checkpoint" / "var.safetensors")
    assert not same_weights(weights(var), weights(make_var()))
    assert read_metadata(folder / "checkpoint" / "var.safetensors")["steps"] == "2"
    for step in (0, 1, 2):
        with Image.open(folder / "grids" / f"step_{step:06d}.png") as grid:
            assert grid.size == (4 * 8 + 3 * 2, 4 * 8 + 3 * 2)

    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) == {"recipe", "seed", "steps", "seconds", "before", "after"}
    assert (summary["recipe"], summary["seed"], summary["steps"]) == (str(recipe), 0, 2)
    assert summary["seconds"] > 0
    for when in ("before", "after"):
        assert set(summary[when]) >= EVALUATED
        assert summary[when]["success_rate"] == summary[when]["reward"]
        assert summary[when]["label_accuracy"] is None

    # Again under the same name: another folder, the same numbers.
    assert run_here(recipe).code == 0
    again = recipe.parent / "runs" / "tiny-2"
    assert_complete(again)
    metrics = lines(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2]
    assert lines(again / "metrics.jsonl") == metrics
    repeated = json.loads((again / "summary.json").read_text())
    assert {**repeated, "seconds": None} == {**summary, "seconds": None}


def test_list_shows_each_recipe_in_a_line(start: Start) -> None:
    """Name and summary, whatever the width of the terminal."""
    outcome = start("--list").outcome()
    assert (outcome.code, outcome.err) == (0, "")
    for name, line in zip(recipe_names(), outcome.out.splitlines(), strict=True):
        assert line.startswith(name)
        assert load_config(name, {}).summary in line


def test_help_names_the_form_of_the_options(start: Start) -> None:
    """`-h` explains and does not train."""
    outcome = start("-h").outcome()
    assert outcome.code == 0
    assert "--run.steps" in outcome.out


def test_a_mistyped_option_is_one_line_at_once(start: Start) -> None:
    """Nothing else is said, and nothing is started."""
    run = start("mini-bright", "--optim.learning", "1")
    outcome = run.outcome()
    assert_failed(outcome, "optim.learning: unknown key", "lr", code=2)
    assert len(outcome.err.splitlines()) == 1
    assert not run.children


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mini-brigth"], ("unknown recipe 'mini-brigth'", "mini-bright")),
        (["mini-bright", "--grpo.clip", "1.5"], ("grpo.clip: 1.5", "less than 1")),
        (["mini-bright", "--rollout.group_size", "1"], ("rollout.group_size: 1", "greater than or equal to 2")),
        (["mini-bright", "--rollout.classes", "[-1]"], ("rollout.classes.0: -1", "greater than or equal to 0")),
        (["mini-bright", "--rewards.0.shape", "'[/bold]'"], ("'[/bold]'", "at_least: T")),
        (["mini-bright", "steps", "5"], ("unexpected argument 'steps'", "--section.key value")),
        (["--run.steps"], ("--run.steps needs a value",)),
    ],
)
def test_wrong_settings_are_one_line(run_here: RunHere, arguments: list[str], words: tuple[str, ...]) -> None:
    """Value and limit, before anything is loaded or written."""
    outcome = run_here(*arguments)
    assert_failed(outcome, *words, code=2)
    assert len(outcome.err.splitlines()) == 1


def test_a_label_outside_the_classes_is_one_line(run_here: RunHere, recipe: Path) -> None:
    """The model says how many there are; nothing is started or written."""
    outcome = run_here(recipe, "--rollout.classes", "[0, 4]")
    assert_failed(outcome, "rollout.classes holds 4", "labels 0 to 3", code=2)
    assert not (recipe.parent / "runs").exists()


def test_a_classifier_of_other_labels_is_one_line(run_here: RunHere, recipe: Path) -> None:
    """Its accuracy would be a number that means nothing."""
    outcome = run_here(recipe, "--model.classifier", "miniature")
    assert_failed(outcome, "model.classifier miniature knows 16 labels, this policy has 4", "none", code=2)
    assert not (recipe.parent / "runs").exists()


def test_weights_are_written_down_by_paths_that_hold_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is no file stays as it was given."""
    monkeypatch.chdir(tmp_path)
    Path("var.safetensors").touch()
    describe(tmp_path, load_config("mini-bright", {"model.var": "var.safetensors"}), torch.device("cpu"))
    model = yaml.safe_load(Path("config.yaml").read_text())["model"]
    assert (model["var"], model["vqvae"]) == (str(tmp_path / "var.safetensors"), "miniature")


def test_missing_weights_are_one_line(run_here: RunHere, recipe: Path) -> None:
    """The file and the remedy, before any folder is made."""
    outcome = run_here(recipe, "--model.var", recipe.parent / "none.safetensors")
    assert_failed(outcome, "none.safetensors: no such file")
    assert not (recipe.parent / "runs").exists()


def test_a_service_that_is_down_is_one_line(run_here: RunHere, recipe: Path) -> None:
    """Its address and the remedy, within the timeout."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    outcome = run_here(recipe, "--rewards.0.url", f"http://127.0.0.1:{port}", "--run.score_timeout_s", "1")
    assert_failed(outcome, f"http://127.0.0.1:{port} is not ready after 1 s", "start the service")
    assert_nothing_saved(recipe)


def test_a_logger_that_is_not_installed_is_one_line(
    run_here: RunHere, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package to install, before anything is loaded or made."""
    monkeypatch.setattr("trainer.loggers.find_spec", lambda name: None)
    assert_failed(run_here(recipe, "--run.loggers", "[wandb]"), "pip install wandb", code=2)
    assert not (recipe.parent / "runs").exists()


@pytest.mark.redis
@pytest.mark.slow
def test_weights_and_biases_get_the_same_numbers(start: Start, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, by the real package; a run that goes on is the same one there."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for more in ((), ("--run.steps", "3", "--resume")):
        outcome = start(recipe, "--run.loggers", "[wandb]", *more).outcome()
        assert outcome.code == 0, outcome.err
    folder = recipe.parent / "runs" / "tiny"
    logged = list((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(logged) == 2
    assert len({path.name for path in logged}) == 1
    content = b"".join(path.read_bytes() for path in logged)
    assert b"label_accuracy" not in content  # this recipe has no classifier
    for name in (b"reward_std", b"seconds/step"):
        assert content.count(name) >= 3


@pytest.mark.redis
def test_a_reward_that_cannot_be_started_is_one_line(
    run_here: RunHere, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the services' own words."""
    monkeypatch.setenv("REWARD_CLIP_WEIGHTS", str(tmp_path / "missing.pt"))
    shape = ("--rewards.0.shape", "{scale: 1}")
    outcome = run_here(recipe, "--rewards.0.name", "clip", "--rewards.0.prompt", "a painting", *shape)
    assert_failed(outcome, "missing.pt", "services.log")
    assert_nothing_saved(recipe)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process or its children can grow beyond a size, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.redis
def test_a_full_disk_while_writing_the_checkpoint_is_one_line(run_here: RunHere, recipe: Path) -> None:
    """The file, its size and the remedy, and nothing of it is left; the smaller files before it were written."""
    with largest_file(256 * 1024):  # room for the state before the first step, which has nothing of the optimizer
        outcome = run_here(recipe)
    assert_failed(outcome, "state.safetensors", "File too large", "make room")
    assert_nothing_saved(recipe, states=1)
    assert len(lines(recipe.parent / "runs" / "tiny" / "metrics.jsonl")) == 2


@pytest.mark.redis
def test_a_full_disk_is_found_before_the_first_step(run_here: RunHere, recipe: Path) -> None:
    """The state that a run begins with is saved first."""
    with largest_file(64 * 1024):
        outcome = run_here(recipe)
    assert_failed(outcome, "state.safetensors", "File too large", "make room")
    assert_nothing_saved(recipe)
    assert not (recipe.parent / "runs" / "tiny" / "metrics.jsonl").exists()


@pytest.mark.redis
def test_a_full_disk_in_the_middle_of_training_is_one_line(run_here: RunHere, recipe: Path) -> None:
    """TensorBoard's writing thread meets it first; its traceback is not shown beside the error."""
    with largest_file(160 * 1024):
        outcome = run_here(recipe, *ENDLESS, "--checkpoint.every", "100000")
    assert_failed(outcome, "run.dir", "File too large", "make room")
    assert_nothing_saved(recipe, states=1)


class FailsAtLast(BaseHTTPRequestHandler):
    """A reward service that scores the evaluation before and the two steps, and then no more."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        info = Info(name="brightness", version="1", bodies=[MEDIA_JSON], limits=Limits())
        self._answer(200, info.model_dump_json())

    def do_POST(self) -> None:
        images = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["images"]
        self.server.posts += 1  # type: ignore[attr-defined]
        timing = {"queue": 0.0, "score": 0.0}
        answer = {"scores": [i % 4 / 4 for i in range(len(images))], "reward": "brightness", "version": "1"}
        if self.server.posts <= 3:  # type: ignore[attr-defined]
            self._answer(200, json.dumps(answer | {"timing_ms": timing}))
        else:
            status = getattr(self.server, "last_status", 500)
            self._answer(status, json.dumps({"title": "scoring failed", "detail": "out of order"}))

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments: object) -> None:
        """Quiet."""


def test_what_was_trained_is_saved_before_it_is_measured(run_here: RunHere, recipe: Path) -> None:
    """A reward that fails in the closing evaluation does not cost the training."""
    with ThreadingHTTPServer(("127.0.0.1", 0), FailsAtLast) as server:
        server.posts = 0  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        outcome = run_here(recipe, "--rewards.0.url", f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
        thread.join()
    assert_failed(outcome, "500", "scoring failed")
    folder = recipe.parent / "runs" / "tiny"
    assert not same_weights(weights(load_var(folder / "checkpoint" / "var.safetensors")), weights(make_var()))
    assert not (folder / "summary.json").exists()


def test_the_miniatures_weights_missing_are_one_line(
    run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The remedy is the command that makes them."""
    monkeypatch.setitem(FILES, "var", tmp_path / "var.safetensors")
    outcome = run_here("mini-bright", "--run.dir", tmp_path / "runs")
    assert_failed(outcome, "var.safetensors: no such file", "python -m trainer.miniature.pretrain var")


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_one_line(run_here: RunHere, recipe: Path, name: str) -> None:
    """Where a file is in its place."""
    (recipe.parent / "file").write_text("")
    outcome = run_here(recipe, "--run.dir", recipe.parent / name)
    assert_failed(outcome, f"run.dir {recipe.parent / name}", "set another --run.dir")


def trains(recipe: Path) -> bool:
    """Whether the run of a recipe is in the middle of its training."""
    metrics = recipe.parent / "runs" / "tiny" / "metrics.jsonl"
    return metrics.exists() and metrics.read_text().count("\n") > 1


@pytest.mark.redis
def test_ctrl_c_is_one_line_and_leaves_no_process(start: Start, recipe: Path) -> None:
    """In the middle of the training."""
    run = start(recipe, *ENDLESS)
    wait_until(lambda: trains(recipe), 120)
    assert len(run.note_children()) == 4
    run.send(signal.SIGINT)
    folder = recipe.parent / "runs" / "tiny"
    assert_failed(run.outcome(), "interrupted", "is saved", f"--resume {folder}", code=75)
    assert_nothing_saved(recipe, states=2)
    assert lines(recipe.parent / "runs" / "tiny" / "metrics.jsonl")


@pytest.mark.redis
def test_sigterm_is_one_line_and_leaves_no_process(run_here: RunHere, recipe: Path) -> None:
    """As an orchestrator stops a run; whoever called it gets its own handler back."""
    before = signal.getsignal(signal.SIGTERM)
    children: list[int] = []

    def terminate() -> None:
        wait_until(lambda: trains(recipe), 120)
        children.extend(descendants(os.getpid()))
        os.kill(os.getpid(), signal.SIGTERM)

    orchestrator = threading.Thread(target=terminate)
    orchestrator.start()
    outcome = run_here(recipe, *ENDLESS)
    orchestrator.join()
    assert_failed(outcome, "interrupted", "is saved", code=75)
    assert len(children) >= 4
    assert_nothing_saved(recipe, states=2)
    assert signal.getsignal(signal.SIGTERM) is before
