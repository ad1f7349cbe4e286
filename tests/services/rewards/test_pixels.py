"""Pre-processing on tensors agrees with open_clip's own on PIL images."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from services.rewards.base import UnfitImage
from services.rewards.pixels import Preprocessing
from tests.services.rewards.models import noise, photograph

SIZES = [(64, 64), (224, 224), (512, 512), (300, 400), (768, 500), (37, 91)]


def both(image: NDArray[np.uint8], **settings: object) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture as open_clip's transform makes it, and as ours."""
    transform = image_transform_v2(PreprocessCfg(**settings), is_train=False)  # type: ignore[arg-type]
    ours = Preprocessing(transform)(torch.from_numpy(image)[None])[0]
    return transform(Image.fromarray(image)), ours


@pytest.mark.parametrize("make", [photograph, noise])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_it_is_pils_but_for_a_few_levels(make, height: int, width: int) -> None:  # type: ignore[no-untyped-def]
    """Up and down, square and not; PIL's weights are rounded, so that a few pixels differ by a level or two."""
    theirs, ours = both(make(height, width))
    levels = (theirs - ours).abs() * 255 * 0.2758  # CLIP's largest deviation
    assert theirs.shape == ours.shape == (3, 224, 224)
    assert levels.max() < 2.2
    assert levels.mean() < 0.01


def test_a_picture_of_the_right_size_is_untouched() -> None:
    """Neither resized nor rounded: equal to float32's last place."""
    theirs, ours = both(noise(224, 224))
    assert torch.allclose(theirs, ours, atol=1e-6)


@pytest.mark.parametrize("mode", ["squash", "longest", "shortest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_every_way_of_open_clip_is_followed(mode: str, interpolation: str) -> None:
    """Squashed, fitted and padded, or cropped; SigLIP's are the first."""
    theirs, ours = both(
        photograph(120, 200), size=(96, 96), resize_mode=mode, interpolation=interpolation, mean=(0.5,) * 3
    )
    assert theirs.shape == ours.shape == (3, 96, 96)
    assert (theirs - ours).abs().mean() < 1e-3


def test_a_batch_is_its_pictures() -> None:
    """Bit for bit."""
    transform = image_transform_v2(PreprocessCfg(size=56), is_train=False)
    images = torch.from_numpy(np.stack([noise(70, 90, seed=seed) for seed in range(3)]))
    preprocess = Preprocessing(transform)
    assert torch.equal(preprocess(images), torch.cat([preprocess(image[None]) for image in images]))


@pytest.mark.parametrize(("height", "width"), [(1, 2000), (4_000_000, 1)])
def test_an_elongated_picture_is_refused_before_it_fills_the_memory(height: int, width: int) -> None:
    """All of it would be resized, and then cropped to a square; the message says what to do."""
    transform = image_transform_v2(PreprocessCfg(), is_train=False)
    with pytest.raises(UnfitImage, match=f"{width}×{height} pixels is more than 32 times as long as wide: crop it"):
        Preprocessing(transform)(torch.zeros(2, height, width, 3, dtype=torch.uint8))
    assert Preprocessing(transform)(torch.zeros(2, 10, 300, 3, dtype=torch.uint8)).shape == (2, 3, 224, 224)
