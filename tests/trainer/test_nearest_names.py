"""A name that is not known is refused before any work, and the nearest one that would do is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.trainer.conftest import Outcome
from tests.trainer.test_run import assert_failed
from trainer.config import ConfigError
from trainer.nearest import nearest_name
from trainer.options import load_config, parse_overrides
from trainer.sweep.__main__ import main as sweep

RunHere = Callable[..., Outcome]


def classes(value: str, *options: str, recipe: str = "mini-bright") -> tuple[int, ...]:
    """The labels that a run draws from."""
    return load_config(recipe, parse_overrides(["--rollout.classes", value, *options])).rollout.classes


def said(*options: str, recipe: str = "mini-bright") -> str:
    """What is said of settings that are refused: one line."""
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, parse_overrides(options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("optim.minibach", "1", ("optim.minibach: unknown key", "the nearest is 'minibatch'")),
        ("optm.lr", "1", ("optm: unknown key", "the nearest is 'optim'")),
        ("lr", "1", ("lr: unknown key", "the nearest is 'optim.lr'")),
        ("rollout.minibatch", "4", ("rollout.minibatch: unknown key", "the nearest is 'optim.minibatch'")),
        ("model.lora.rnk", "4", ("model.lora.rnk: unknown key", "the nearest is 'rank'", "known here: rank, alpha")),
        ("rewards.0.wieght", "4", ("rewards.0.wieght: unknown key", "the nearest is 'weight'")),
        ("eval.rewards", "[{name: x, promt: y}]", ("eval.rewards.0.promt: unknown key", "the nearest is 'prompt'")),
        ("rewards.0.shape", "{at_leest: 0.8}", ("rewards.0.shape", "the nearest to 'at_leest' is 'at_least'")),
        ("rewards.0.shape.belwo", "0.8", ("rewards.0.shape", "the nearest to 'belwo' is 'below'")),
        ("model.classifier", "imagnet", ("model.classifier: 'imagnet'", "the nearest is 'imagenet'")),
        ("run.loggers", "[tensorbord]", ("run.loggers.0: 'tensorbord'", "the nearest is 'tensorboard'")),
        ("rollout.classes", "bal", ("rollout.classes: unknown label 'bal'", "the nearest is 'ball'")),
        ("rollout.classes", "[star, hart]", ("rollout.classes: unknown label 'hart'", "the nearest is 'heart'")),
        ("rollout.classes", "3-16", ("rollout.classes: there is no label 16", "the nearest is 15")),
        ("rollout.classes", "[3, 16]", ("rollout.classes: there is no label 16", "the nearest is 15")),
    ],
)
def test_an_unknown_name_is_told_the_nearest(option: str, value: str, words: tuple[str, ...]) -> None:
    """Its place, and one name that would do; the list has no entry of what was wrong in it only."""
    text = said(f"--{option}", value)
    assert all(each in text for each in words), text
    assert "at least 1 item" not in text


def test_a_key_of_a_file_is_told_the_nearest_as_well(tmp_path: Path) -> None:
    """Not only an option's."""
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"rewards": [{"name": "brightness"}], "grpo": {"bata": 0.1}}))
    assert "recipe mine: grpo.bata: unknown key; the nearest is 'beta'" in said(recipe=str(path))


def test_an_unknown_recipe_is_told_the_nearest(tmp_path: Path) -> None:
    """Of the project's by name, of the folder's by path."""
    assert "unknown recipe 'mini-brigth'; the nearest is 'mini-bright'" in said(recipe="mini-brigth")
    (tmp_path / "mine.yaml").write_text("")
    assert f"the nearest is '{tmp_path / 'mine.yaml'}'" in said(recipe=str(tmp_path / "mien.yaml"))


def test_labels_may_be_named() -> None:
    """The miniature's always, ImageNet's where its classifier is the model's; indices and ranges as before."""
    assert classes("ball,heart") == (0, 2)
    assert classes("[Ice Cream, 3, 5-6]") == (15, 3, 5, 6)
    assert classes("ball", "--model.classifier", "none") == (0,)
    imagenet = ("--model.var", "some/file.pth", "--model.classifier", "imagenet")
    assert classes("tench,999", *imagenet) == (0, 999)
    assert "the nearest is 'tench'" in said("--rollout.classes", "tensh", *imagenet)
    assert "the nearest is 999" in said("--rollout.classes", "0-1000", *imagenet)
    assert "'cardigan' names the labels 264, 474; give the index" in said("--rollout.classes", "cardigan", *imagenet)


def test_labels_of_an_unknown_world_are_indices() -> None:
    """Only the model knows how many there are."""
    unknown = ("--model.var", "some/file.pth", "--model.classifier", "none")
    assert classes("0-2,500000", *unknown) == (0, 1, 2, 500000)
    assert "these labels have no names" in said("--rollout.classes", "ball", *unknown)


def test_the_nearest_name_is_by_its_letters() -> None:
    """Whatever their case, and however far."""
    assert nearest_name("BAL", ["star", "ball"]) == "ball"
    assert nearest_name("xyz", ["one"]) == "one"


WRONG: list[tuple[tuple[str, str], int, tuple[str, ...]]] = [
    (("rewards.0.name", "brightnes"), 2, ("rewards.0.name: unknown reward 'brightnes'", "the nearest is 'brightness'")),
    (("eval.rewards", "[{name: mini-clp}]"), 2, ("eval.rewards.0.name: unknown reward", "the nearest is 'mini-clip'")),
    (("model.var", "minature"), 1, ("minature: no such file; model.var", "the nearest is 'miniature'")),
    (
        ("model.var", "FoundationVision/var:var_d17.pth"),
        1,
        ("no such published checkpoint; model.var", "the nearest is 'FoundationVision/var:var_d16.pth'"),
    ),
    (
        ("model.vqvae", "FoundationVision/var:var_d16.pth"),
        1,
        ("no such published checkpoint; model.vqvae", "the nearest is 'FoundationVision/var:vae_ch160v4096z32.pth'"),
    ),
    (
        ("model.vqvae", "{models}/vqva.safetensors"),
        1,
        ("vqva.safetensors: no such file; model.vqvae", "the nearest is '{models}/vqvae.safetensors'"),
    ),
    (("model.var", "{models}"), 1, ("this is a folder; model.var", "{models}/var.safetensors")),
]


def filled(text: str, models: dict[str, str]) -> str:
    return text.replace("{models}", str(Path(models["var"]).parent))


@pytest.mark.parametrize(("option", "code", "words"), WRONG)
def test_a_run_is_told_before_any_work(
    run_here: RunHere, recipe: Path, models: dict[str, str], option: tuple[str, str], code: int, words: tuple[str, ...]
) -> None:
    """No weights are loaded and no service is started, for there is no folder with its log; one line."""
    outcome = run_here(recipe, f"--{option[0]}", filled(option[1], models))
    assert_failed(outcome, *(filled(each, models) for each in words), code=code)
    assert len(outcome.err.splitlines()) == 1
    assert not (recipe.parent / "runs").exists()


@pytest.mark.parametrize("command", ["--dry-run", "--summary", "--jobs=1"])
@pytest.mark.parametrize(("option", "words"), [(option, words) for option, _, words in WRONG[:3]])
def test_a_sweep_is_told_before_any_run(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: tuple[str, str],
    words: tuple[str, ...],
    command: str,
) -> None:
    """Of its last point, by the point's name."""
    points: list[dict[str, Any]] = [
        {"name": "good"},
        {"name": "bad", "settings": {option[0]: yaml.safe_load(option[1])}},
    ]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"summary": "Two.", "recipe": str(recipe), "points": points}))
    assert sweep([str(path), "--dir", str(tmp_path / "sweeps"), command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(each in line for each in ("point bad", *words)), line
    assert not (tmp_path / "sweeps").exists()


def test_rewards_with_an_address_need_no_known_name(run_here: RunHere, recipe: Path) -> None:
    """A stranger's reward is known to its service alone; that it is not there is found next."""
    options = ("--rewards.0.name", "strangers", "--rewards.0.url", "http://127.0.0.1:9", "--run.score_timeout_s", "1")
    assert_failed(run_here(recipe, *options), "http://127.0.0.1:9")


def test_a_wrong_variable_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of an evaluation as of a run."""
    from trainer.evaluate.__main__ import main

    monkeypatch.setenv("TRAINER_METRICS_POTR", "1")
    arguments = ["miniature", "--labels", "ball", "--per-class", "1", "--reward", "strangers=http://127.0.0.1:9"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "TRAINER_METRICS_POTR is no setting of the trainer: did you mean TRAINER_METRICS_PORT?" in line
