"""The aesthetic head: linear layers in a row are one affine map; the published one scores as it was published."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from services.rewards.aesthetic import DEFAULT_CACHE, PUBLISHED
from services.rewards.head import fold, load_head
from services.rewards.sources import WeightsError, check_file
from tests.services.conftest import ROOT

LAION_SIZES = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
"""Number in the published predictor, and inputs and outputs, of each linear layer; dropout has the other numbers."""
NAME = "sac+logos+ava1-l14-linearMSE.pth"
SHARED = ROOT.parent / "shared" / "data"


def unit_vectors(count: int, dimensions: int) -> Tensor:
    """Rows of a seeded normal distribution, normalised in float64."""
    rows = np.random.RandomState(0).standard_normal((count, dimensions))
    return torch.from_numpy((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))


def layers(seed: int = 0) -> dict[str, Tensor]:
    """Random layers in the shape of the published head."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for number, (inputs, outputs) in LAION_SIZES.items():
        state[f"layers.{number}.weight"] = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        state[f"layers.{number}.bias"] = torch.randn(outputs, generator=generator)
    return state


def test_the_fold_scores_as_the_layers_do() -> None:
    """To 1e-4, as the published predictor computes it: layer after layer in float32."""
    state = layers()
    chain = nn.Sequential(*(nn.Linear(*sizes) for sizes in LAION_SIZES.values()))
    chain.load_state_dict(
        {
            f"{place}.{part}": state[f"layers.{n}.{part}"]
            for place, n in enumerate(LAION_SIZES)
            for part in ("weight", "bias")
        }
    )
    vectors = unit_vectors(64, 768)
    with torch.no_grad():
        expected = chain(vectors)[:, 0].numpy()
    assert fold(state)(vectors) == pytest.approx(expected, abs=1e-4)


def published_head() -> Path | None:
    """The published file where it is at hand: `LAION_HEAD` names it, or it lies beside the checkout or in the cache."""
    places = [Path(os.environ.get("LAION_HEAD", "")), SHARED / NAME, DEFAULT_CACHE.expanduser() / NAME]
    return next((place for place in places if place.is_file()), None)


@pytest.mark.skipif(published_head() is None, reason="the LAION head is not at hand: LAION_HEAD may name it")
def test_the_published_head_scores_as_published() -> None:
    """Pinned scores of four fixed embeddings; the file is held to its digest."""
    path = published_head()
    assert path is not None
    head = load_head(check_file(path, PUBLISHED["laion-v2"].sha256))
    assert path.stat().st_size == PUBLISHED["laion-v2"].size_bytes
    assert head(unit_vectors(4, 768)) == pytest.approx([4.962260, 5.035243, 6.029986, 6.253081], abs=1e-4)


def test_a_head_is_read_from_either_kind_of_file(tmp_path: Path) -> None:
    """safetensors, or what torch.save wrote."""
    state, vectors = layers(), unit_vectors(3, 768)
    save_file(state, tmp_path / "head.safetensors")
    torch.save(state, tmp_path / "head.pth")
    expected = fold(state)(vectors)
    for name in ("head.safetensors", "head.pth"):
        assert np.array_equal(load_head(tmp_path / name)(vectors), expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layers.7.weight": torch.ones(2, 16), "layers.7.bias": torch.ones(2)}, "do not lead to one score"),
        ({"layers.4.weight": torch.ones(64, 127)}, "do not lead to one score"),
        ({"layers.6.bias": torch.ones(17)}, "do not lead to one score"),
        ({"layers.6.bias": torch.full((16,), torch.nan)}, "no finite number"),
        ({"layers.1.running_mean": torch.ones(1)}, "expected layers.N.weight"),
    ],
)
def test_what_is_no_head_is_refused(change: dict[str, Tensor], reason: str, tmp_path: Path) -> None:
    """One line that names the file and what is wrong with it."""
    save_file(layers() | change, tmp_path / "head.safetensors")
    with pytest.raises(WeightsError, match=reason) as caught:
        load_head(tmp_path / "head.safetensors")
    assert str(tmp_path / "head.safetensors") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_head_for_another_model_is_refused() -> None:
    """Its dimensions tell."""
    head = fold(layers())
    head.check(768, "ViT-L-14's")
    with pytest.raises(WeightsError, match="768 dimensions, mini-clip's embeddings have 128"):
        head.check(128, "mini-clip's")
