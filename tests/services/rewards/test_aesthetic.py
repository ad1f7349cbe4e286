"""The aesthetic reward: the same over tensors as over PIL images, and the scores of fixed pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

from services.rewards import create_reward
from services.rewards.aesthetic import Aesthetic, MiniatureAesthetic
from services.rewards.clip import MINIATURE_MODEL, miniature_source
from services.rewards.head import load_head
from services.rewards.openclip import load_clip
from services.rewards.options import RewardOptions, Runtime
from services.rewards.sources import Source, WeightsError
from tests.services.rewards.models import SMALL_NAME, noise, photograph
from trainer.miniature.render import HELD_OUT_SEED, WIDE_WORLD, render_set

PINNED = [3.9157, 3.368, 8.4595, 3.9192, 8.7136, 7.5883, 3.3605, 5.3363]
HALF_BOUNDS = {"bfloat16": 0.1, "float16": 0.01}
"""By which a score in half precision may differ, as docs/clip_and_aesthetic.md states it."""
PICTURES = [make(*size) for make in (photograph, noise) for size in ((32, 32), (64, 64), (224, 224), (300, 400))]


@pytest.fixture(scope="module")
def aesthetic() -> MiniatureAesthetic:
    """The miniature's."""
    reward = MiniatureAesthetic.configured(RewardOptions())
    reward.warmup()
    return reward


def test_the_scores_of_fixed_pictures_are_pinned(aesthetic: MiniatureAesthetic) -> None:
    """Of the miniature's weights: another score would need another version."""
    images = render_set(HELD_OUT_SEED, 8, WIDE_WORLD).images
    assert aesthetic.score(images, None) == pytest.approx(PINNED, abs=2e-3)


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: "x".join(map(str, picture.shape)))
def test_scores_agree_with_open_clips_own_pipeline(picture: NDArray[np.uint8], aesthetic: MiniatureAesthetic) -> None:
    """Within 0.05 of the PIL image through open_clip's transform and model, then layer by layer through the head."""
    clip: Any
    clip, _, transform = load_clip(MINIATURE_MODEL, miniature_source("clip"))
    path = miniature_source("aesthetic").path
    assert path is not None
    with torch.no_grad():
        vector = clip.encode_image(transform(Image.fromarray(picture))[None], normalize=True)
    assert aesthetic.score(picture[None], None) == pytest.approx(load_head(path)(vector), abs=0.05)


def test_the_batch_never_changes_a_score(aesthetic: MiniatureAesthetic) -> None:
    """By more than 1e-5."""
    images = np.stack([(photograph if seed % 2 else noise)(64, 64, seed=seed) for seed in range(13)])
    whole = aesthetic.score(images, None)
    assert whole == pytest.approx([aesthetic.score(image[None], None)[0] for image in images], abs=1e-5)
    assert aesthetic.score(images[::-1].copy(), None) == pytest.approx(whole[::-1], abs=1e-5)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_stays_within_its_bound(precision: Any, aesthetic: MiniatureAesthetic) -> None:
    """On pictures of both kinds, scaled up and down; and so does what the batch changes."""
    half = MiniatureAesthetic.configured(RewardOptions(runtime=Runtime(device="cpu", precision=precision)))
    half.warmup()
    images = np.stack([(photograph if seed % 2 else noise)(64, 64, seed=seed) for seed in range(32)])
    whole = half.score(images, None)
    differences = [whole - aesthetic.score(images, None)]
    differences += [half.score(picture[None], None) - aesthetic.score(picture[None], None) for picture in PICTURES]
    assert 0 < np.abs(np.concatenate(differences)).max() < HALF_BOUNDS[precision]
    alone = [half.score(image[None], None)[0] for image in images[:8]]
    assert alone == pytest.approx(whole[:8], rel=0, abs=HALF_BOUNDS[precision])


def test_the_settings_name_head_and_model(small_source: Source, tmp_path: Path) -> None:
    """Each by a path; the version is of both."""
    generator = torch.Generator().manual_seed(0)
    weights = {"layers.0.weight": torch.randn(1, 32, generator=generator), "layers.0.bias": torch.zeros(1)}
    save_file(weights, tmp_path / "head.safetensors")
    options = RewardOptions(aesthetic_weights=str(small_source.path), aesthetic_head=str(tmp_path / "head.safetensors"))
    first = create_reward("aesthetic", options)
    assert first.version != create_reward("aesthetic", RewardOptions()).version
    with pytest.raises(WeightsError, match="are not of ViT-L-14-quickgelu"):
        first.warmup()
    save_file({**weights, "layers.0.bias": torch.ones(1)}, tmp_path / "head.safetensors")
    assert create_reward("aesthetic", options).version != first.version
    with pytest.raises(WeightsError, match=r"head.safetensors have sha256 .*altered"):
        first.warmup()
    reward = Aesthetic(SMALL_NAME, small_source, Source(None, tmp_path / "head.safetensors"))
    reward.warmup()
    assert reward.score(noise(64, 64)[None], None).shape == (1,)
    wrong = Aesthetic(MINIATURE_MODEL, miniature_source("clip"), Source(None, tmp_path / "head.safetensors"))
    with pytest.raises(WeightsError, match="the head takes 32 dimensions, mini-clip's embeddings have 128"):
        wrong.warmup()


def test_the_head_is_looked_for_first(tmp_path: Path) -> None:
    """It is small: whoever lacks it learns so before gigabytes are loaded."""
    reward = create_reward("aesthetic", RewardOptions(aesthetic_head="laion-v3", runtime=Runtime(cache_dir=tmp_path)))
    with pytest.raises(WeightsError, match="no head 'laion-v3': give laion-v2, or a path"):
        reward.warmup()
    (tmp_path / "sac+logos+ava1-l14-linearMSE.pth").write_bytes(b"altered")
    reward = create_reward("aesthetic", RewardOptions(runtime=Runtime(cache_dir=tmp_path)))
    with pytest.raises(WeightsError, match=r"expected 21dd590f.*altered or cut short"):
        reward.warmup()
