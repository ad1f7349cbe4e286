"""Paintings are told by their pixels: renders and what the tokenizer leaves of them."""

import numpy as np
import pytest

from trainer.miniature.quality import reconstruct
from trainer.miniature.render import HELD_OUT_SEED, STYLES, WIDE_WORLD, World, render_set
from trainer.miniature.strokes import ground_relief, is_painted
from trainer.miniature.weights import FILES
from trainer.models.checkpoints import load_vqvae

ALL_ALIKE = World(styles=dict.fromkeys(STYLES, 0.25), lighting=WIDE_WORLD.lighting)


def test_a_smooth_ground_has_no_relief_and_stripes_have_theirs() -> None:
    """A gradient is fitted away; stripes of ±0.1 luma are 0.1 from their middle."""
    ramp = np.tile(np.linspace(40, 200, 64).round(), (64, 1))
    stripes = 128 + 25.5 * np.where(np.add.outer(np.arange(64), np.arange(64)) % 8 < 4, 1, -1)
    images = np.stack([ramp, stripes])[..., None].repeat(3, axis=3).astype(np.uint8)
    smooth, striped = ground_relief(images)
    assert smooth < 0.002
    assert striped == pytest.approx(0.1, abs=0.01)


def test_an_object_that_reaches_into_the_frame_is_no_ground() -> None:
    """White that crosses the frame at one side, an eighth of that side wide, leaves the ground smooth."""
    image = np.full((1, 64, 64, 3), 120, np.uint8)
    image[:, 20:28, :30] = 255
    assert ground_relief(image)[0] < 0.025


@pytest.mark.parametrize("restored", [False, True], ids=["renders", "reconstructions"])
def test_paintings_are_told_from_every_other_style(restored: bool) -> None:
    """Of held-out pictures at least 97 % of the paintings are called painted, and below 1 % of the rest."""
    renders = render_set(HELD_OUT_SEED, 800, ALL_ALIKE)
    images = reconstruct(load_vqvae(FILES["vqvae"]), renders.images) if restored else renders.images
    painted = is_painted(images)
    is_painting = renders.styles == STYLES.index("painting")
    assert painted[is_painting].mean() >= 0.97
    assert painted[~is_painting].mean() < 0.01
