"""Settings: what is refused, how it is said, and what the recipes hold."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.config import Config, ConfigError
from trainer.options import load_config, parse_overrides, read_recipe, recipe_names
from trainer.shaping import Affine, AtLeast, Below

RECIPES = Path(__file__).resolve().parents[2] / "trainer" / "recipes"


def load(*options: str, recipe: str = "mini-bright") -> Config:
    """A recipe with options on top."""
    return load_config(recipe, parse_overrides(options))


def message(*options: str, recipe: str = "mini-bright") -> str:
    """What is said about options that are refused: one line."""
    with pytest.raises(ConfigError) as caught:
        load(*options, recipe=recipe)
    text = str(caught.value)
    assert "\n" not in text
    return text


def write(path: Path, content: Any) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_the_defaults_are_the_papers() -> None:
    """32 labels × 16 images, minibatch 32, learning rate 1e-4, β 0.2, τ 0.7, ε 0.2, weight decay 0."""
    config = Config.model_validate({"rewards": [{"name": "brightness"}]})
    assert (config.rollout.labels, config.rollout.group_size, config.optim.minibatch) == (32, 16, 32)
    assert (config.optim.lr, config.optim.weight_decay) == (1e-4, 0.0)
    assert (config.grpo.beta, config.grpo.clip, config.rollout.temperature) == (0.2, 0.2, 0.7)
    assert config.rewards[0].shape == Affine()


def test_the_recipes_of_the_main_job_exist() -> None:
    """The miniature's two and the paper's two."""
    assert {"mini-bright", "mini-dark", "bright-d16", "dark-d16"} <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_says_what_it_takes(name: str) -> None:
    """Its head comment holds command, hardware, time and result; its summary is one line."""
    config = load(recipe=name)
    assert config.run.name == name
    head = re.match(r"(#.*\n)+", (RECIPES / f"{name}.yaml").read_text())
    assert head is not None
    for word in ("Command:", "Hardware:", "Time:", "Result:"):
        assert word in head[0], word
    assert f" -m trainer.run {name}" in head[0]  # by python, or by torchrun
    assert config.summary
    assert "\n" not in config.summary


@pytest.mark.parametrize(("name", "shape"), [("bright-d16", AtLeast(at_least=0.8)), ("dark-d16", Below(below=0.2))])
def test_the_d16_recipes_have_the_papers_settings(name: str, shape: AtLeast | Below) -> None:
    """Objective, sizes and thresholds; the published weights."""
    config, defaults = load(recipe=name), Config.model_validate({"rewards": [{"name": "brightness"}]})
    assert config.rewards[0].shape == shape
    assert (config.grpo, config.optim) == (defaults.grpo, defaults.optim)
    assert config.rollout == defaults.rollout
    assert config.model.var == "FoundationVision/var:var_d16.pth"


def test_an_unknown_recipe_is_told_the_known_ones() -> None:
    """The value, and all names that would do."""
    text = message(recipe="mini-brigth")
    assert "'mini-brigth'" in text
    assert all(name in text for name in recipe_names())


@pytest.mark.parametrize(
    ("option", "where", "known"),
    [
        ("--optim.learning_rate", "optim.learning_rate", ("lr", "minibatch", "micro_batch")),
        ("--optimizer.lr", "optimizer", ("optim", "rewards", "rollout")),
        ("--rewards.0.wait", "rewards.0.wait", ("weight", "shape", "prompt")),
        ("--run.overwrite", "run.overwrite", ("steps", "seed", "dir")),
        ("--lr", "lr", ("optim",)),
    ],
)
def test_an_unknown_key_is_told_the_known_ones(option: str, where: str, known: tuple[str, ...]) -> None:
    """At its place, by the names of its section."""
    text = message(option, "1")
    assert f"{where}: unknown key" in text
    assert all(name in text for name in known)


@pytest.mark.parametrize(
    ("option", "value", "limit"),
    [
        ("rollout.group_size", "1", "greater than or equal to 2"),
        ("rollout.labels", "0", "greater than or equal to 1"),
        ("rollout.temperature", "0", "greater than 0"),
        ("rollout.classes", "[3, -1]", "greater than or equal to 0"),
        ("rollout.classes", "5-3", "runs backwards; write 3-5"),
        ("rollout.classes", "all", "the nearest is 'ball'"),
        ("rollout.classes", "0-99999999999", "the nearest is 15"),
        ("grpo.clip", "0", "greater than 0"),
        ("grpo.clip", "1", "less than 1"),
        ("grpo.beta", "-0.1", "greater than or equal to 0"),
        ("optim.lr", "0", "greater than 0"),
        ("optim.minibatch", "0", "greater than or equal to 1"),
        ("optim.betas", "[0.9]", "missing"),
        ("run.steps", "0", "greater than or equal to 1"),
        ("run.steps", "1.5", "valid integer"),
        ("run.steps", "many", "valid integer"),
        ("run.steps", "yes", "number"),
        ("run.seed", "-1", "greater than or equal to 0"),
        ("run.device", "tpu", "'auto', 'cpu' or 'cuda'"),
        ("run.name", "../escape", "pattern"),
        ("eval.seed", "-1", "greater than or equal to 0"),
        ("eval.samples", "[1]", "valid integer"),
        ("rewards.0.name", "Bad Name", "pattern"),
        ("rewards.0.weight", "heavy", "valid number"),
        ("rewards.0.url", "localhost:8000", "http://HOST:PORT"),
        ("rewards.0.url", "http://", "http://HOST:PORT"),
        ("rewards.0.url", "http://host:99999", "http://HOST:PORT"),
        ("rewards.0.url", "http://-é-:80", "http://HOST:PORT"),
        ("rewards.0.url", "http://[v1.x]:80", "http://HOST:PORT"),
        ("rewards.0.shape", "{at_least: true}", "give a number"),
        ("rollout.classes", "[yes]", "give a number"),
        ("rewards.0.shape", "bright", "at_least: T"),
        ("rewards.0.shape.at_least", "much", "valid number"),
        ("rewards", "[]", "at least 1 item"),
        ("optim", "5", "valid dictionary"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_limit(option: str, value: str, limit: str) -> None:
    """The key, the value and the limit, once."""
    text = message(f"--{option}", value)
    assert option.partition(".")[0] in text
    assert limit in text
    assert text.count(limit) == 1


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
@pytest.mark.parametrize(
    "option",
    [
        *("rollout.temperature", "grpo.beta", "optim.lr", "optim.weight_decay", "optim.grad_clip"),
        *("run.score_timeout_s", "rewards.0.weight", "rewards.0.shape.at_least"),
    ],
)
def test_numbers_must_be_finite(option: str, value: str) -> None:
    """Neither NaN nor infinity is a setting."""
    assert option in message(f"--{option}", value).replace("shape.at_least.at_least", "shape.at_least")


def test_sizes_must_fit_each_other() -> None:
    """Minibatches divide a step, micro-batches a minibatch, chunks hold whole groups; the numbers are named."""
    assert "optim.minibatch is 48, which does not divide the 128 images" in message("--optim.minibatch", "48")
    assert "optim.micro_batch is 5, which does not divide optim.minibatch 64" in message("--optim.micro_batch", "5")
    assert "rollout.chunk is 24" in message("--rollout.chunk", "24")


def test_a_reward_stands_once(tmp_path: Path) -> None:
    """Two of one name could not be told apart."""
    recipe = write(tmp_path / "twice.yaml", {"rewards": [{"name": "brightness"}, {"name": "brightness"}]})
    assert "['brightness', 'brightness']" in message(recipe=recipe)


def test_rewards_are_required(tmp_path: Path) -> None:
    """A run without a reward has nothing to learn from."""
    assert "rewards: missing" in message(recipe=write(tmp_path / "none.yaml", {"run": {"steps": 1}}))


def test_all_faults_are_named_at_once() -> None:
    """Nobody should have to start five times."""
    text = message("--rollout.labels", "0", "--grpo.clip", "7", "--run.speed", "9")
    assert "rollout.labels: 0" in text
    assert "grpo.clip: 7" in text
    assert "run.speed: unknown key" in text


def test_options_reach_nested_keys_and_entries_of_lists() -> None:
    """`--section.key value`, `--section.key=value`, `--rewards.0.key value`; values are YAML."""
    config = load(
        *("--optim.lr", "1e-5", "--rollout.classes", "[1, 3]", "--run.name=x-1", "--optim.betas", "[0.5, 0.6]"),
        *("--rewards.0.weight", "-2", "--rewards.0.url", "http://127.0.0.1:9", "--rewards.0.shape.at_least=0.5"),
        *("--optim.micro_batch", "8", "--optim.grad_clip", "null"),
    )
    assert config.optim.lr == 1e-5
    assert config.rollout.classes == (1, 3)
    assert config.run.name == "x-1"
    assert config.optim.betas == (0.5, 0.6)
    assert config.optim.micro_batch == 8
    assert config.optim.grad_clip is None
    (reward,) = config.rewards
    assert (reward.weight, reward.url, reward.shape) == (-2.0, "http://127.0.0.1:9", AtLeast(at_least=0.5))
    assert load("--rewards", "[{name: brightness}, {name: other}]").rewards[1].name == "other"
    assert load("--rollout.classes", "2-5").rollout.classes == (2, 3, 4, 5)
    assert load("--rollout.classes", "2").rollout.classes == (2,)


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        *((text, text) for text in ("a painting #2 by hand", "#2", "a  b", "two\nlines", 'it\'s "it"')),
        *(("'a #2'", "a #2"), ('"a\\n#2"', "a\n#2"), ("!!str 5", "5"), ("''", ""), ("|\n a #2", "a #2")),
        *((text, None) for text in ("", "~", "null", "null # none")),
    ],
)
def test_a_text_is_taken_as_it_stands(text: str, prompt: str | None) -> None:
    """Without quotes nothing in it is a comment, as in a prompt of `trainer.evaluate`; with them it is YAML."""
    assert load("--rewards.0.prompt", text).rewards[0].prompt == prompt


def test_what_is_no_text_stays_yaml() -> None:
    """Lists, mappings, numbers and booleans, with comments as they may have them."""
    texts = ("[1, 3] # two", "{at_least: 0.5} # half", "5 # five", "yes", "a: b")
    assert [*parse_overrides([part for index, text in enumerate(texts) for part in (f"--{index}", text)]).values()] == [
        *([1, 3], {"at_least": 0.5}, 5, True, {"a": "b"}),
    ]
    assert load("--run.dir", "/tmp/my runs #1").run.dir == Path("/tmp/my runs #1")


def test_an_option_does_not_change_the_others() -> None:
    """What is not named stays as the recipe has it."""
    plain, changed = load().to_dict(), load("--optim.lr", "0.5").to_dict()
    assert changed["optim"].pop("lr") == 0.5
    del plain["optim"]["lr"]
    assert changed == plain


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["run.steps", "5"], "unexpected argument 'run.steps'"),
        (["--run.steps"], "--run.steps needs a value"),
        (["--run.steps", "--run.seed", "1"], "--run.steps needs a value"),
        (["--"], "unexpected argument '--'"),
        (["--run.name", "[1"], "is not a value"),
        (["--run.steps.more", "1"], "run.steps is a value, not a section"),
        (["--rewards.1.weight", "1"], "entries 0 to 0, not '1'"),
        (["--rewards.first.weight", "1"], "not 'first'"),
        (["--rewards.0", "x"], "name the field"),
    ],
)
def test_a_malformed_option_is_one_line(options: list[str], words: str) -> None:
    """And says what form it should have."""
    assert words in message(*options)


def test_a_file_that_is_no_recipe_is_one_line(tmp_path: Path) -> None:
    """Missing, not text, not YAML, not a mapping."""
    assert "No such file" in message(recipe=str(tmp_path / "none.yaml"))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in message(recipe=str(tmp_path / "bytes.yaml"))
    (tmp_path / "broken.yaml").write_text("a: [1\nb: 2\n")
    assert "is not YAML" in message(recipe=str(tmp_path / "broken.yaml"))
    assert "holds a list" in message(recipe=write(tmp_path / "list.yaml", [1, 2]))
    assert "holds a NoneType" in message(recipe=write(tmp_path / "empty.yaml", None))


def test_a_recipe_file_names_its_run(tmp_path: Path) -> None:
    """The file's stem, unless it says otherwise."""
    content = {"rewards": [{"name": "brightness"}]}
    assert load(recipe=write(tmp_path / "mine.yaml", content)).run.name == "mine"
    content["run"] = {"name": "other"}  # type: ignore[assignment]
    assert load(recipe=write(tmp_path / "mine.yaml", content)).run.name == "other"


@pytest.mark.parametrize("name", recipe_names())
def test_the_resolved_settings_are_a_recipe(tmp_path: Path, name: str) -> None:
    """What a run writes down gives the same settings again."""
    config = load(recipe=name)
    assert load(recipe=write(tmp_path / "config.yaml", config.to_dict())) == config


def test_settings_cannot_be_changed_afterwards() -> None:
    """One source, read once."""
    with pytest.raises(ValueError, match="frozen"):
        load().optim.lr = 1.0


def test_reading_a_recipe_does_not_share_state() -> None:
    """Options of one run do not reach the next."""
    load("--run.steps", "7")
    assert read_recipe("mini-bright")[1]["run"]["steps"] != 7
    assert math.isfinite(load().optim.lr)
