"""The CLIP reward: prompts of request and settings, versions, and the scores of fixed pictures."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from services.protocol import IDENTIFIER_PATTERN
from services.rewards import create_reward
from services.rewards.brightness import Brightness
from services.rewards.clip import Clip, MiniatureClip, miniature_source, version_of
from services.rewards.options import STANDARD, RewardOptions, Runtime
from services.rewards.sources import PIN, Source, WeightsError, sha256_of
from tests.services.rewards.models import SMALL_NAME, noise
from trainer.miniature.render import HELD_OUT_SEED, WIDE_WORLD, render_set

PINNED_BRIGHTNESS = [0.391118, 0.876559, 0.635803, 0.889681, 0.479803, 0.533267, 0.746024, 0.335743]
PINNED_CLIP = [0.123078, 0.235537, 0.309983, 0.509644, 0.502933, 0.236107, 0.05887, 0.122008]


@pytest.fixture(scope="module")
def clip() -> MiniatureClip:
    """The miniature's, without a prompt of its own."""
    reward = MiniatureClip.configured(RewardOptions())
    reward.warmup()
    return reward


@pytest.fixture(scope="module")
def pictures() -> NDArray[np.uint8]:
    """Eight held-out renders."""
    return render_set(HELD_OUT_SEED, 8, WIDE_WORLD).images


def test_the_scores_of_fixed_pictures_are_pinned(clip: MiniatureClip, pictures: NDArray[np.uint8]) -> None:
    """Of brightness and of the miniature's CLIP: another score would need another version."""
    prompts = ["a painting", "an old picture", "a photo of a heart", "a sketch"] * 2
    assert Brightness().score(pictures, None) == pytest.approx(PINNED_BRIGHTNESS, abs=1e-6)
    assert clip.score(pictures, prompts) == pytest.approx(PINNED_CLIP, abs=2e-4)


def test_each_picture_is_compared_with_its_own_prompt(clip: MiniatureClip, pictures: NDArray[np.uint8]) -> None:
    """And the batch never changes a score by more than 1e-5."""
    prompts = ["a painting", "an old picture", "a photo", "a sketch"] * 2
    whole = clip.score(pictures, prompts)
    alone = [clip.score(pictures[i : i + 1], prompts[i : i + 1])[0] for i in range(8)]
    order = np.random.default_rng(0).permutation(8)
    assert whole == pytest.approx(alone, abs=1e-5)
    assert clip.score(pictures[order], [prompts[i] for i in order]) == pytest.approx(whole[order], abs=1e-5)
    assert not np.allclose(whole, clip.score(pictures, prompts[::-1]), atol=1e-3)
    assert (np.abs(whole) <= 1).all()
    assert whole.dtype == np.float64


def test_the_prompt_of_the_settings_is_for_pictures_without() -> None:
    """A request's own prompts go before it; without either there is no score."""
    reward = MiniatureClip.configured(RewardOptions(clip_prompt="a painting"))
    reward.warmup()
    images = np.stack([noise(64, 64), noise(64, 64, seed=1)])
    assert reward.score(images, None) == pytest.approx(reward.score(images, ["a painting"] * 2), abs=1e-7)
    assert reward.score(images, ["a sketch"] * 2) != pytest.approx(reward.score(images, None), abs=1e-4)
    assert not reward.needs_prompts
    bare = MiniatureClip.configured(RewardOptions())
    bare.warmup()
    assert bare.needs_prompts
    with pytest.raises(ValueError, match="REWARD_CLIP_PROMPT"):
        bare.score(images, None)


@pytest.mark.parametrize("prompts", [["one"], ["one", "two"], ["one"] * 4, []])
def test_another_number_of_prompts_than_of_images_is_refused(clip: MiniatureClip, prompts: list[str]) -> None:
    """One prompt is not silently every image's."""
    images = np.stack([noise(64, 64, seed=seed) for seed in range(3)])
    with pytest.raises(ValueError, match=f"^3 images with {len(prompts)} prompts: give one for each image"):
        clip.score(images, prompts)


def test_the_version_changes_with_whatever_changes_a_score(tmp_path: Path) -> None:
    """Model, weights, prompt and precision; nothing that does not."""
    (tmp_path / "a.pt").write_bytes(b"a")
    (tmp_path / "b.pt").write_bytes(b"b")
    base = RewardOptions()
    changed = [
        {"clip_model": "ViT-B-32-quickgelu"},
        {"clip_weights": "metaclip_400m"},
        {"clip_prompt": "a painting"},
        {"clip_weights": str(tmp_path / "a.pt")},
        {"clip_weights": str(tmp_path / "b.pt")},
        {"clip_weights": str(tmp_path / "missing.pt")},
        {"runtime": Runtime(precision="bfloat16")},
    ]
    versions = [Clip.configured(dataclasses.replace(base, **change)).version for change in changed]
    versions.append(Clip.configured(base).version)
    assert len(set(versions)) == len(versions)
    same = dataclasses.replace(base, runtime=Runtime(device="cpu", compiled=True, max_batch=3))
    assert Clip.configured(same).version == Clip.configured(base).version
    pinned = dataclasses.replace(base, clip_weights=f"{tmp_path / 'a.pt'}{PIN}{sha256_of(tmp_path / 'a.pt')}")
    assert Clip.configured(pinned).version == versions[3]


@pytest.mark.parametrize("name", ["ViT-L-14", "a/b c", "Ä" * 80, "-.-"])
def test_a_version_is_an_identifier(name: str, tmp_path: Path) -> None:
    """Whatever model and weights are called."""
    for source in (Source(name, None), Source(None, tmp_path / name)):
        assert re.fullmatch(IDENTIFIER_PATTERN, version_of(name, source, "1"))


def test_a_version_is_of_the_content_and_not_of_the_place(tmp_path: Path) -> None:
    """So that two machines that keep the same weights elsewhere serve the same reward."""
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).write_bytes(b"the same")
    versions = {version_of("ViT-L-14", Source(None, tmp_path / name)) for name in ("a.pt", "b.pt")}
    assert len(versions) == 1


def test_the_api_describes_a_reward_without_its_weights() -> None:
    """The constructor needs no file and no torch; the worker's warm-up says what is missing."""
    reward = create_reward("clip", RewardOptions(clip_weights="/nowhere/clip.pt"))
    assert reward.name == "clip"
    assert "cosine" in reward.scale
    with pytest.raises(WeightsError, match=r"/nowhere/clip\.pt: the file does not exist"):
        reward.warmup()


def test_the_packages_weights_are_held_to_their_record() -> None:
    """An altered package is found out."""
    source = miniature_source("clip")
    assert source.sha256 is not None
    with pytest.raises(WeightsError, match="altered"):
        Clip("mini-clip", Source(None, source.path, "0" * 64), None, STANDARD).warmup()


def test_any_open_clip_checkpoint_serves(small_source: Source) -> None:
    """By its path, as HPSv2.1 is."""
    reward = create_reward("clip", RewardOptions(clip_model=SMALL_NAME, clip_weights=str(small_source.path)))
    reward.warmup()
    scores = reward.score(np.stack([noise(300, 200)]), ["a painting"])
    assert scores.shape == (1,)
    assert np.abs(scores).max() <= 1
