"""`python -m trainer.run`, as people run it: what it leaves behind, and how it fails."""

import json
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.services.conftest import wait_until
from tests.trainer.conftest import Run, make_var, same_weights, weights
from trainer.config import load_config, recipe_names
from trainer.models.checkpoints import load_var, read_metadata

Start = Callable[..., Run]
TIMINGS = ("seconds/", "images_per_second")
EVALUATED = {"reward", "raw_score", "success_rate", "label_accuracy"}


def lines(path: Path) -> list[dict[str, Any]]:
    """The metrics of a run, without timings."""
    read = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(TIMINGS)} for line in read]


def files(folder: Path) -> set[str]:
    """All files below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def assert_failed(run: Run, *words: str, code: int = 1) -> str:
    """It ended with a code that is not 0 and one line that begins with `error:`, without a traceback or a process."""
    assert run.wait() == code, run.err()
    errors = [line for line in run.err().splitlines() if line.startswith("error:")]
    assert errors == run.err().splitlines()[-1:], run.err()
    assert "Traceback" not in run.err()
    for word in words:
        assert word in errors[0]
    return errors[0]


def assert_nothing_saved(recipe: Path) -> None:
    """No checkpoint, no summary, nothing half-written."""
    left = files(recipe.parent / "runs") if (recipe.parent / "runs").exists() else set()
    assert not {name for name in left if "checkpoint" in name or "summary" in name or name.endswith(".tmp")}, left


@pytest.mark.redis
def test_a_run_from_start_to_end(start: Start, recipe: Path) -> None:
    """Exit 0, every file in its place, and the same numbers from the same seed."""
    first, second = start(recipe), start(recipe, "--run.name", "again")
    for run in (first, second):
        assert run.wait() == 0, run.err()
        assert "error" not in run.err()
        assert len(run.children) >= 4, "supervisor, Redis, API and worker"
    folder = recipe.parent / "runs" / "tiny"

    found = files(folder)
    boards = {name for name in found if name.startswith("tensorboard/events.")}
    assert len(boards) == 1
    assert found - boards == {
        "config.yaml",
        "versions.json",
        "metrics.jsonl",
        "services.log",
        "summary.json",
        "checkpoint/var.safetensors",
        *(f"grids/step_{step:06d}.png" for step in (0, 1, 2)),
    }
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written == load_config(str(recipe), {}).to_dict()
    assert {"python", "torch", "device"} <= set(json.loads((folder / "versions.json").read_text()))

    metrics = lines(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2]
    assert metrics == lines(recipe.parent / "runs" / "again" / "metrics.jsonl")

    var = load_var(folder / "checkpoint" / "var.safetensors")
    assert not same_weights(weights(var), weights(make_var()))
    assert read_metadata(folder / "checkpoint" / "var.safetensors")["steps"] == "2"

    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) == {"recipe", "seed", "steps", "seconds", "before", "after"}
    assert (summary["recipe"], summary["seed"], summary["steps"]) == (str(recipe), 0, 2)
    assert summary["seconds"] > 0
    for when in ("before", "after"):
        assert set(summary[when]) >= EVALUATED
        assert summary[when]["success_rate"] == summary[when]["reward"]
        assert summary[when]["label_accuracy"] is None
    for step in (0, 1, 2):
        with Image.open(folder / "grids" / f"step_{step:06d}.png") as grid:
            assert grid.size == (4 * 8 + 3 * 2, 4 * 8 + 3 * 2)

    for words in ("before", "after", "success rate", str(folder / "metrics.jsonl"), "A tiny run [of tests]."):
        assert words in first.err(), words


@pytest.mark.redis
def test_two_runs_of_a_name_do_not_share_a_folder(start: Start, recipe: Path) -> None:
    """The second goes to `name-2`; what the first wrote stays as it is."""
    (recipe.parent / "runs" / "tiny").mkdir(parents=True)
    run = start(recipe, "--run.steps", "1")
    assert run.wait() == 0, run.err()
    assert not files(recipe.parent / "runs" / "tiny")
    assert (recipe.parent / "runs" / "tiny-2" / "summary.json").exists()


def test_list_shows_each_recipe_in_a_line(start: Start) -> None:
    """Name and summary, whatever the width of the terminal."""
    run = start("--list")
    assert run.wait() == 0
    assert run.err() == ""
    shown = run.out().splitlines()
    assert len(shown) == len(recipe_names())
    for name, line in zip(recipe_names(), shown, strict=True):
        assert line.startswith(name)
        assert load_config(name, {}).summary in line


def test_help_names_the_form_of_the_options(start: Start) -> None:
    """`-h` explains and does not train."""
    run = start("-h")
    assert run.wait() == 0
    assert "--run.steps" in run.out()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mini-brigth"], ("unknown recipe 'mini-brigth'", "mini-bright")),
        (["mini-bright", "--optim.learning", "1"], ("optim.learning: unknown key", "lr")),
        (["mini-bright", "--grpo.clip", "1.5"], ("grpo.clip: 1.5", "less than 1")),
        (["mini-bright", "--rollout.group_size", "1"], ("rollout.group_size: 1", "greater than or equal to 2")),
        (["mini-bright", "--rollout.classes", "[-1]"], ("rollout.classes.0: -1", "greater than or equal to 0")),
        (["mini-bright", "--rewards.0.shape", "[/bold]"], ("rewards.0.shape", "at_least: T")),
        (["mini-bright", "steps", "5"], ("unexpected argument 'steps'", "--section.key value")),
        (["--run.steps"], ("--run.steps needs a value",)),
    ],
)
def test_wrong_settings_are_one_line(start: Start, arguments: list[str], words: tuple[str, ...]) -> None:
    """Value and limit, before anything is loaded or written."""
    run = start(*arguments)
    assert_failed(run, *words, code=2)
    assert len(run.err().splitlines()) == 1
    assert not run.children


def test_a_label_outside_the_classes_is_one_line(start: Start, recipe: Path) -> None:
    """The model says how many there are; nothing is started or written."""
    run = start(recipe, "--rollout.classes", "[0, 4]")
    assert_failed(run, "rollout.classes holds 4", "labels 0 to 3", code=2)
    assert not run.children
    assert not (recipe.parent / "runs").exists()


def test_missing_weights_are_one_line(start: Start, recipe: Path) -> None:
    """The file and the remedy, before any folder is made."""
    run = start(recipe, "--model.var", recipe.parent / "none.safetensors")
    assert_failed(run, "none.safetensors: no such file")
    assert not (recipe.parent / "runs").exists()


def test_a_service_that_is_down_is_one_line(start: Start, recipe: Path) -> None:
    """Its address and the remedy, within the timeout."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    run = start(recipe, "--rewards.0.url", f"http://127.0.0.1:{port}", "--run.score_timeout_s", "1")
    assert_failed(run, f"http://127.0.0.1:{port} is not ready after 1 s", "start the service")
    assert_nothing_saved(recipe)


@pytest.mark.redis
def test_a_reward_that_cannot_be_started_is_one_line(start: Start, recipe: Path) -> None:
    """In the services' own words."""
    run = start(recipe, "--rewards.0.name", "brigthness")
    assert_failed(run, "unknown reward 'brigthness'", "services.log")
    assert_nothing_saved(recipe)


@pytest.mark.redis
def test_a_full_disk_while_writing_the_checkpoint_is_one_line(start: Start, recipe: Path) -> None:
    """A limit on the size of files between all others and the checkpoint: the file, its size, and nothing of it."""
    run = start(recipe, file_limit=64 * 1024)
    assert_failed(run, "var.safetensors: cannot be written", "bytes", "make room")
    assert_nothing_saved(recipe)
    assert len(lines(recipe.parent / "runs" / "tiny" / "metrics.jsonl")) == 2


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_one_line(start: Start, recipe: Path, name: str) -> None:
    """Where a file is in its place."""
    (recipe.parent / "file").write_text("")
    run = start(recipe, "--run.dir", recipe.parent / name)
    assert_failed(run, str(recipe.parent / name), "--run.dir")


@pytest.mark.redis
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_one_line_and_leaves_no_process(
    start: Start, recipe: Path, number: signal.Signals
) -> None:
    """Ctrl-C and SIGTERM in the middle of the training."""
    run = start(recipe, "--run.steps", "100000", "--run.grid_every", "0")
    metrics = recipe.parent / "runs" / "tiny" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 1, 120)
    assert len(run.note_children()) >= 4
    run.send(number)
    assert_failed(run, "interrupted", code=130)
    assert_nothing_saved(recipe)
    assert lines(metrics)
