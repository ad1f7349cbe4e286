"""Rollouts: groups by slot, the same whatever the chunk, and one distribution for sampling and scoring."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.trainer.conftest import TINY, Submit, make_var, make_vqvae
from trainer.models.var import VAR
from trainer.models.vqvae import VQVAE
from trainer.policy import log_probs
from trainer.rollout import Experience, draw_labels, roll_out

LABELS = (2, 0, 2, 3, 2)
G = 4


@pytest.fixture(scope="module")
def var() -> VAR:
    return make_var()


@pytest.fixture(scope="module")
def vqvae() -> VQVAE:
    return make_vqvae()


def rolled(var: VAR, vqvae: VQVAE, *, chunk: int = 8, seed: int = 1, step: int = 5) -> tuple[Experience, Submit]:
    submit = Submit()
    experience, pending = roll_out(
        var,
        vqvae,
        torch.tensor(LABELS),
        submit,
        group_size=G,
        temperature=0.7,
        chunk=chunk,
        seed=seed,
        step=step,
    )
    assert len(pending) == len(submit.batches)
    return experience, submit


def test_groups_are_adjacent_and_in_slot_order(var: VAR, vqvae: VQVAE) -> None:
    """G images of the first label, then G of the second, and so on."""
    experience, _ = rolled(var, vqvae)
    assert experience.labels_B.tolist() == [label for label in LABELS for _ in range(G)]
    assert experience.tokens_BL.shape == experience.log_probs_BL.shape == (len(LABELS) * G, TINY.length)
    assert experience.images_BHW3.shape == (len(LABELS) * G, 8, 8, 3)
    assert experience.images_BHW3.dtype == np.uint8


def test_a_label_drawn_twice_makes_two_groups(var: VAR, vqvae: VQVAE) -> None:
    """A group is keyed by its slot: repeated labels are sampled anew, and no two images of a step share numbers."""
    tokens_NGL = rolled(var, vqvae)[0].tokens_BL.view(len(LABELS), G, -1)
    for first, second in ((0, 2), (2, 4)):
        assert not torch.equal(tokens_NGL[first], tokens_NGL[second])
    assert len(tokens_NGL.flatten(0, 1).unique(dim=0)) == len(LABELS) * G


@pytest.mark.parametrize("chunk", [G, 3 * G, 100 * G])
def test_the_chunk_does_not_change_what_is_sampled(var: VAR, vqvae: VQVAE, chunk: int) -> None:
    """It is a matter of memory and speed alone."""
    expected, _ = rolled(var, vqvae, chunk=2 * G)
    found, submit = rolled(var, vqvae, chunk=chunk)
    assert torch.equal(found.tokens_BL, expected.tokens_BL)
    assert torch.equal(found.labels_B, expected.labels_B)
    torch.testing.assert_close(found.log_probs_BL, expected.log_probs_BL, atol=1e-5, rtol=0)
    assert np.abs(found.images_BHW3.astype(int) - expected.images_BHW3.astype(int)).max() <= 1
    assert [len(batch) for batch in submit.batches] == [len(part) for part in torch.arange(20).split(chunk)]


def test_every_image_is_sent_once_and_in_order(var: VAR, vqvae: VQVAE) -> None:
    """The rewards see exactly the images of the experience."""
    experience, submit = rolled(var, vqvae)
    assert np.array_equal(np.concatenate(submit.batches), experience.images_BHW3)


def test_seed_and_step_set_the_samples(var: VAR, vqvae: VQVAE) -> None:
    """The same ones give the same images, others give others."""
    tokens_BL = rolled(var, vqvae)[0].tokens_BL
    assert torch.equal(rolled(var, vqvae)[0].tokens_BL, tokens_BL)
    assert not torch.equal(rolled(var, vqvae, seed=2)[0].tokens_BL, tokens_BL)
    assert not torch.equal(rolled(var, vqvae, step=6)[0].tokens_BL, tokens_BL)


@torch.no_grad()
def test_recorded_log_probs_are_the_policys(var: VAR, vqvae: VQVAE) -> None:
    """At the temperature of the sampling, and at no other."""
    experience, _ = rolled(var, vqvae)

    def recomputed(temperature: float) -> Tensor:
        return log_probs(
            var,
            experience.labels_B,
            experience.var_input_BLmC,
            experience.tokens_BL,
            temperature=temperature,
        )[0]

    torch.testing.assert_close(recomputed(0.7), experience.log_probs_BL, atol=1e-4, rtol=0)
    assert (recomputed(1.0) - experience.log_probs_BL).abs().max() > 0.05


def test_labels_are_uniform_with_repetition() -> None:
    """Drawn from the given classes alone, each about as often, set by seed and step."""
    labels_N = draw_labels(0, 0, 4000, (1, 5, 7, 9))
    values, counts = labels_N.unique(return_counts=True)
    assert values.tolist() == [1, 5, 7, 9]
    assert bool(((counts - 1000).abs() < 120).all())
    assert labels_N.dtype == torch.int64
    assert torch.equal(draw_labels(0, 0, 4000, (1, 5, 7, 9)), labels_N)
    for seed, step in ((1, 0), (0, 1)):
        assert not torch.equal(draw_labels(seed, step, 4000, (1, 5, 7, 9)), labels_N)
