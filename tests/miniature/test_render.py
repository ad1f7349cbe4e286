"""The miniature's renderer: what a (seed, index) pair names, and that its sets keep apart."""

import numpy as np
import pytest

from trainer.miniature.objects import CLASSES, SHAPES
from trainer.miniature.quality import BRIGHT, DARK, brightness
from trainer.miniature.render import HELD_OUT_SEED, POLICY_WORLD, STYLES, WIDE_WORLD, draw_scene, render, render_set


def test_a_seed_names_a_picture_for_ever() -> None:
    """The same seed gives the same pictures and captions, however many are asked for; another seed gives others."""
    few, many, other = render_set(5, 8, WIDE_WORLD), render_set(5, 24, WIDE_WORLD), render_set(6, 8, WIDE_WORLD)
    assert (few.images == many.images[:8]).all()
    assert few.captions == many.captions[:8]
    assert not (few.images == other.images).all(axis=(1, 2, 3)).any()


def test_pictures_are_uint8_of_64_pixels_and_classes_take_turns() -> None:
    """A set holds uint8 (N, 64, 64, 3) and each class equally often."""
    renders = render_set(1, 32, WIDE_WORLD)
    assert renders.images.shape == (32, 64, 64, 3)
    assert renders.images.dtype == np.uint8
    assert (np.bincount(renders.labels) == 2).all()


def test_the_policy_sees_few_old_pictures_and_no_painting() -> None:
    """Pre-training of the policy: photos, a few per cent of old pictures, nothing else."""
    styles = np.bincount(render_set(2, 800, POLICY_WORLD).styles, minlength=len(STYLES)) / 800
    assert styles[STYLES.index("painting")] == styles[STYLES.index("sketch")] == 0
    assert 0.01 < styles[STYLES.index("old picture")] < 0.08


def test_captions_name_style_colour_and_object() -> None:
    """A caption says the style and the object; a photo's also the colour."""
    for label, style in ((0, "photo"), (8, "old picture"), (15, "painting")):
        rng = np.random.default_rng((3, label))
        scene = draw_scene(label, style, np.random.default_rng((3, label)), WIDE_WORLD.lighting)
        _, text = render(label, style, rng)
        assert style in text
        assert CLASSES[label] in text
        assert (scene.hue in text) == (style != "old picture")


@pytest.mark.parametrize("label", range(len(CLASSES)))
def test_an_object_stands_out_from_its_background(label: int) -> None:
    """Every photo has visible contrast, in bright and in dark scenes."""
    for index in range(6):
        image, _ = render(label, "photo", np.random.default_rng((11, label, index)))
        assert image.astype(float).mean(axis=2).std() > 4


def test_some_renders_are_bright_and_some_dark() -> None:
    """Both targets of the brightness experiments are in the training distribution, neither is common."""
    luma = brightness(render_set(HELD_OUT_SEED, 480, POLICY_WORLD).images)
    assert 0.04 < (luma >= BRIGHT).mean() < 0.2
    assert 0.04 < (luma < DARK).mean() < 0.2


def test_there_are_sixteen_objects() -> None:
    """Each class has a shape with at least one part inside about [−1, 1]²."""
    assert len(CLASSES) == 16
    for make in SHAPES.values():
        points = np.concatenate([part.points for part in make()])
        assert np.abs(points).max() <= 1.05
