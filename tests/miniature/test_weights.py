"""The shipped weights: small, loadable, and as good as docs/miniature.md says, on pictures nothing was trained on."""

import json

import numpy as np
import pytest

from trainer.miniature import quality
from trainer.miniature.classifiers import accuracy, predict
from trainer.miniature.objects import CLASSES
from trainer.miniature.quality import BRIGHT, DARK
from trainer.miniature.render import POLICY_WORLD, STYLES, Renders
from trainer.miniature.weights import FOLDER, METRICS_FILE, VAR_FILE, VQVAE_FILE, load_classifier
from trainer.models.checkpoints import check_pair, load_var, load_vqvae
from trainer.models.var import VAR
from trainer.models.vqvae import VQVAE


@pytest.fixture(scope="module")
def models() -> tuple[VAR, VQVAE]:
    """The shipped policy and tokenizer."""
    return load_var(VAR_FILE), load_vqvae(VQVAE_FILE)


@pytest.fixture(scope="module")
def renders() -> Renders:
    """A few held-out pictures of all styles."""
    return quality.held_out(160)


def test_all_weights_together_are_small() -> None:
    """The files stay under 25 MB together."""
    assert sum(file.stat().st_size for file in FOLDER.glob("*.safetensors")) <= 25 * 2**20


def test_every_weight_has_its_record() -> None:
    """Command, seed, schedule, seconds, hardware and metrics stand beside the weights."""
    records = json.loads(METRICS_FILE.read_text())
    for stage in ("vqvae", "var", "label", "style"):
        assert {"command", "seed", "schedule", "seconds", "hardware", "metrics"} <= records[stage].keys()


def test_policy_and_tokenizer_fit_together(models: tuple[VAR, VQVAE]) -> None:
    """Vocabulary, latent and scales agree."""
    check_pair(*models)


def test_reconstruction_reaches_24_db(models: tuple[VAR, VQVAE], renders: Renders) -> None:
    """Mean PSNR on held-out pictures of all styles."""
    assert quality.tokenizer_quality(models[1], renders)["psnr_db"] >= 24


def test_the_label_classifier_knows_renders(renders: Renders) -> None:
    """At least 97 % of held-out renders get their label."""
    assert accuracy(load_classifier("label"), renders.images, renders.labels) >= 0.97


def test_the_style_classifier_knows_styles(renders: Renders) -> None:
    """Held-out renders get their style."""
    assert accuracy(load_classifier("style"), renders.images, renders.styles) >= 0.97


def test_samples_are_recognised_varied_and_no_paintings(models: tuple[VAR, VQVAE]) -> None:
    """At temperature 1: 85 % keep their label, the variety is within 20 % of the renders', none is a painting."""
    images = quality.draw(*models, 160)
    targets = np.arange(160) % len(CLASSES)
    assert accuracy(load_classifier("label"), images, targets) >= 0.85
    renders = quality.held_out(160, POLICY_WORLD)
    assert quality.diversity(images) == pytest.approx(quality.diversity(renders.images), rel=0.2)
    assert not (predict(load_classifier("style"), images).argmax(axis=1) == STYLES.index("painting")).any()


def test_the_reward_has_something_to_climb(models: tuple[VAR, VQVAE]) -> None:
    """At the temperature of RL some plain samples are bright and some dark, and most are neither."""
    luma = quality.brightness(quality.draw(*models, 320, temperature=quality.RL_TEMPERATURE))
    assert 0.01 <= (luma >= BRIGHT).mean() <= 0.22
    assert 0.01 <= (luma < DARK).mean() <= 0.22
