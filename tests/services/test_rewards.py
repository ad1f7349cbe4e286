"""Anyone's class becomes a reward: what it leaves out has a default, what cannot be served is refused in one line."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.rewards import ENTRY_POINT_GROUP, REWARDS, UnknownReward, create_reward
from services.rewards.anyone import Completed, UnfitReward, complete, default_name
from services.rewards.base import Reward
from services.rewards.brightness import Brightness
from tests.services.conftest import ROOT, random_images

IMAGES = random_images(3, 4, 5, 3)


class Bare:
    """No more than a score."""

    def score(self, images: Any, prompts: Any) -> list[float]:
        return [float(image.mean()) + len(prompt) for image, prompt in zip(images, prompts or [""] * 9, strict=False)]


class Outer:
    """Holds a reward."""

    Inner = Bare


class Talkative(Bare):
    """Says everything but whether it needs a warm-up."""

    name, version, low, high = "talk", "7b", 0, 255.5
    higher_is_better, uses_prompts = False, True


class Warm(Bare):
    """Loads something."""

    def __init__(self) -> None:
        self.loaded = 0

    def warmup(self) -> None:
        self.loaded += 1


class Needy(Bare):
    """Wants an argument."""

    def __init__(self, model: str) -> None:
        self.model = model


class Failing(Bare):
    """Fails when it is created."""

    def __init__(self) -> None:
        raise FileNotFoundError("/weights\nare missing")


class Asynchronous:
    """Scores in a coroutine."""

    async def score(self, images: Any, prompts: Any) -> list[float]:
        return []


class OneArgument:
    """Takes no prompts."""

    def score(self, images: Any) -> list[float]:
        return []


class Numberless:
    """Has a score that is no method."""

    score = 0.5


class Größe(Bare):  # noqa: PLC2401 - that is the case
    """Has a name that no identifier may hold as it is."""


def here(name: str) -> str:
    """A class of this file as `module:Class`."""
    return f"{__name__}:{name}"


def test_a_score_is_enough() -> None:
    """The rest has defaults, and the scores are the class's own."""
    reward = create_reward(here("Bare"))
    assert (reward.name, reward.version, reward.low, reward.high) == ("bare", "0", None, None)
    assert reward.higher_is_better is True
    assert reward.uses_prompts is False
    reward.warmup()
    prompts = ["", "a", "ab"]
    assert reward.score(IMAGES, prompts) == Bare().score(IMAGES, prompts)
    assert create_reward(here("Outer.Inner")).name == "bare"
    assert create_reward(here("Größe")).name == "gre"


def test_what_a_class_says_is_kept() -> None:
    """Every member but the missing one, and a warm-up is called."""
    reward = create_reward(here("Talkative"))
    assert (reward.name, reward.version, reward.low, reward.high) == ("talk", "7b", 0, 255.5)
    assert (reward.higher_is_better, reward.uses_prompts) == (False, True)
    warm = Warm()
    complete(warm).warmup()
    assert warm.loaded == 1


def test_a_whole_reward_is_left_as_it_is() -> None:
    """No layer between the worker and a class that has every member."""
    brightness = Brightness()
    assert complete(brightness) is brightness
    assert isinstance(complete(Bare()), Completed)


@pytest.mark.parametrize(
    ("class_name", "name"),
    [
        ("JpegCompressibility", "jpeg-compressibility"),
        ("HPSReward", "hps-reward"),
        ("ClipV2", "clip-v2"),
        ("my_reward", "my-reward"),
        ("_Private", "private"),
        ("A" * 99, "a" * 64),
    ],
)
def test_a_name_is_made_of_the_classes(class_name: str, name: str) -> None:
    """Lower case with dashes, as recipes have it."""
    assert default_name(class_name) == name


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Needy", "takes (model: str) and is created without arguments (missing a required argument: 'model')"),
        ("Failing", "cannot be created: FileNotFoundError: /weights are missing; what may fail belongs in its warmup"),
        ("Asynchronous", "its score is async"),
        ("OneArgument", "its score takes (images: Any), but is called as score(images, prompts)"),
        ("Numberless", "no method score(images, prompts)"),
        ("ROOT", "is no class but a PosixPath"),
        ("Nowhere", "cannot be imported: AttributeError"),
        ("install", "takes (folder: pathlib.Path, package: str, points: str) and is created without arguments"),
        ("random_images", "no method score(images, prompts)"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(name: str, words: str) -> None:
    """The line names the class, what is wrong, and what to do."""
    with pytest.raises(UnknownReward) as caught:
        create_reward(here(name))
    assert words in str(caught.value)
    assert here(name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("name", "two words"),
        ("name", None),
        ("name", ""),
        ("version", 1),
        ("low", float("nan")),
        ("low", True),
        ("high", "1"),
        ("high", np.float32(1)),
        ("low", 2.0),
        ("higher_is_better", 1),
        ("uses_prompts", None),
        ("needs_prompts", "yes"),
        ("scale", 10),
        ("warmup", "soon"),
    ],
)
def test_a_member_that_is_wrong_is_refused_with_its_value(member: str, value: object) -> None:
    """Before anything is served by it."""
    reward = type("Wrong", (Bare,), {"high": 1.0, member: value})()
    with pytest.raises(UnfitReward, match=f"its {member} is"):
        complete(reward)


def test_a_reward_that_needs_prompts_uses_them() -> None:
    """Else its `/info` would contradict itself."""
    with pytest.raises(UnfitReward, match="needs prompts and does not use them"):
        complete(type("Wrong", (Bare,), {"needs_prompts": True})())


def test_the_defaults_make_a_reward() -> None:
    """`Completed` has every member that `Reward` names."""
    members = {name for name in vars(Reward) if not name.startswith("_")}
    reward = complete(Bare())
    assert members == {
        "name",
        "version",
        "low",
        "high",
        "higher_is_better",
        "uses_prompts",
        "needs_prompts",
        "scale",
        "warmup",
        "score",
    }
    assert all(hasattr(reward, member) for member in members)


def install(folder: Path, package: str, points: str) -> None:
    """What an installer leaves of a package with entry points, and its module."""
    metadata = folder / f"{package}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{ENTRY_POINT_GROUP}]\n{points}\n")
    (folder / f"{package}.py").write_text("class Plain:\n    def score(self, images, prompts):\n        return [1.0]\n")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that offer rewards."""
    install(
        tmp_path, "pack_a", "plain = pack_a:Plain\ntwice = pack_a:Plain\nbrightness = pack_a:Plain\ngone = pack_a:No"
    )
    install(tmp_path, "pack_b", "twice = pack_b:Plain [extra]")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_an_installed_reward_goes_by_its_name(installed: Path) -> None:
    """Unless two packages offer it; a built-in one cannot be replaced, and an unknown name is told all."""
    assert create_reward("plain").score(IMAGES[:1], None) == [1.0]
    assert isinstance(create_reward("brightness"), Brightness)
    with pytest.raises(UnknownReward, match=r"offered by pack_a \(pack_a:Plain\) and pack_b \(pack_b:Plain\)"):
        create_reward("twice")
    with pytest.raises(UnknownReward, match="'gone' cannot be imported: AttributeError"):
        create_reward("gone")
    with pytest.raises(UnknownReward, match=r"known: aesthetic, brightness, .*plain, twice, or module:Class"):
        create_reward("plane")


def run_services(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """`python -m services` with a folder on the path."""
    return subprocess.run(
        [sys.executable, "-m", "services", *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_list_shows_every_reward_that_has_a_name(installed: Path) -> None:
    """A line each with name, origin and class; nothing is imported, so that a broken package spoils nothing."""
    (installed / "pack_a.py").write_text("raise RuntimeError('imported')")
    done = run_services("list", folder=installed)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[: len(REWARDS)] == [[name, "built", "in", target] for name, target in REWARDS.items()]
    assert lines[len(REWARDS) :] == [
        ["gone", "pack_a", "pack_a:No"],
        ["plain", "pack_a", "pack_a:Plain"],
        ["twice", "pack_a", "pack_a:Plain"],
        ["twice", "pack_b", "pack_b:Plain"],
    ]
