"""Rollouts: groups by slot, the same whatever the chunk, and one distribution for sampling and scoring."""

from concurrent.futures import Future

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.trainer.conftest import TINY, Submit, make_var, make_vqvae
from trainer.rollout import RolledOut, roll_out
from trainer.scoring import Scored
from trainer.var_policy import VarPolicy

LABELS = (2, 0, 2, 3, 2)
G = 4


@pytest.fixture(scope="module")
def policy() -> VarPolicy:
    return VarPolicy(make_var(), make_vqvae(), range(TINY.num_classes))


def rolled(
    policy: VarPolicy, *, chunk: int = 8, seed: int = 1, step: int = 5, slots: range = range(len(LABELS))
) -> tuple[RolledOut, Submit]:
    submit = Submit()
    out = roll_out(
        policy,
        torch.tensor(LABELS),
        slots,
        submit,
        group_size=G,
        temperature=0.7,
        chunk=chunk,
        seed=seed,
        step=step,
    )
    assert len(out.pending) == len(submit.batches)
    return out, submit


def test_groups_are_adjacent_and_in_slot_order(policy: VarPolicy) -> None:
    """G images of the first label, then G of the second, and so on."""
    (experience, images_BHW3, _), _ = rolled(policy)
    assert experience.conditions_B.tolist() == [label for label in LABELS for _ in range(G)]
    assert experience.tokens_BL.shape == experience.log_probs_BL.shape == (len(LABELS) * G, TINY.length)
    assert images_BHW3.shape == (len(LABELS) * G, 8, 8, 3)
    assert images_BHW3.dtype == np.uint8


def test_a_label_drawn_twice_makes_two_groups(policy: VarPolicy) -> None:
    """A group is keyed by its slot: repeated labels are sampled anew, and no two images of a step share numbers."""
    tokens_NGL = rolled(policy)[0].experience.tokens_BL.view(len(LABELS), G, -1)
    for first, second in ((0, 2), (2, 4)):
        assert not torch.equal(tokens_NGL[first], tokens_NGL[second])
    assert len(tokens_NGL.flatten(0, 1).unique(dim=0)) == len(LABELS) * G


@pytest.mark.parametrize("chunk", [G, 3 * G, 100 * G])
def test_the_chunk_does_not_change_what_is_sampled(policy: VarPolicy, chunk: int) -> None:
    """It is a matter of memory and speed alone."""
    expected, _ = rolled(policy, chunk=2 * G)
    found, submit = rolled(policy, chunk=chunk)
    assert torch.equal(found.experience.tokens_BL, expected.experience.tokens_BL)
    assert torch.equal(found.experience.conditions_B, expected.experience.conditions_B)
    torch.testing.assert_close(found.experience.log_probs_BL, expected.experience.log_probs_BL, atol=1e-5, rtol=0)
    assert np.abs(found.images_BHW3.astype(int) - expected.images_BHW3.astype(int)).max() <= 1
    assert [len(batch) for batch in submit.batches] == [len(part) for part in torch.arange(20).split(chunk)]


def test_every_image_is_sent_once_and_in_order(policy: VarPolicy) -> None:
    """The rewards see exactly the images of the experience."""
    (_, images_BHW3, _), submit = rolled(policy)
    assert np.array_equal(np.concatenate(submit.batches), images_BHW3)


def test_seed_and_step_set_the_samples(policy: VarPolicy) -> None:
    """The same ones give the same images, others give others."""
    tokens_BL = rolled(policy)[0].experience.tokens_BL
    assert torch.equal(rolled(policy)[0].experience.tokens_BL, tokens_BL)
    assert not torch.equal(rolled(policy, seed=2)[0].experience.tokens_BL, tokens_BL)
    assert not torch.equal(rolled(policy, step=6)[0].experience.tokens_BL, tokens_BL)


@torch.no_grad()
def test_recorded_log_probs_are_the_policys(policy: VarPolicy) -> None:
    """At the temperature of the sampling, and at no other."""
    (experience, _, _), _ = rolled(policy)

    def recomputed(temperature: float) -> Tensor:
        return policy.log_probs(experience.conditions_B, experience.tokens_BL, temperature=temperature)[0]

    torch.testing.assert_close(recomputed(0.7), experience.log_probs_BL, atol=1e-4, rtol=0)
    assert (recomputed(1.0) - experience.log_probs_BL).abs().max() > 0.05


def test_labels_are_uniform_with_repetition() -> None:
    """Drawn from the given classes alone, each about as often, set by seed and step."""
    policy = VarPolicy(make_var(), make_vqvae(), (1, 5, 7, 9))

    def drawn(seed: int, step: int) -> Tensor:
        return policy.draw_conditions(seed, step, 4000)

    labels_N = drawn(0, 0)
    values, counts = labels_N.unique(return_counts=True)
    assert values.tolist() == [1, 5, 7, 9]
    assert bool(((counts - 1000).abs() < 120).all())
    assert labels_N.dtype == torch.int64
    assert torch.equal(drawn(0, 0), labels_N)
    for seed, step in ((1, 0), (0, 1)):
        assert not torch.equal(drawn(seed, step), labels_N)


def test_a_rank_samples_its_own_slots_as_if_it_were_alone(policy: VarPolicy) -> None:
    """Which ranks there are changes nothing: the shares laid end to end are the whole."""
    whole = rolled(policy)[0]
    parts = [rolled(policy, slots=slots)[0] for slots in (range(2), range(2, 5))]
    assert torch.equal(torch.cat([part.experience.tokens_BL for part in parts]), whole.experience.tokens_BL)
    assert torch.equal(torch.cat([part.experience.conditions_B for part in parts]), whole.experience.conditions_B)


def test_blocking_waits_for_each_chunk() -> None:
    """The next chunk is sampled once the scores of the one before it are there; what is sampled is the same."""
    policy = VarPolicy(make_var(), make_vqvae(), range(TINY.num_classes))
    order: list[str] = []

    class Slow(Future[Scored]):
        """A score that is there once it is asked for."""

        def exception(self, timeout: float | None = None) -> BaseException | None:
            order.append("waited")
            return None

    def submit(images_BHW3: np.ndarray) -> Future[Scored]:
        order.append("sent")
        return Slow()

    settings = {"group_size": G, "temperature": 0.7, "chunk": 2 * G, "seed": 1, "step": 5}
    blocked = roll_out(policy, torch.tensor(LABELS), range(5), submit, blocking=True, **settings)  # type: ignore[arg-type]
    assert order == ["sent", "waited"] * 3
    assert torch.equal(blocked.experience.tokens_BL, rolled(policy)[0].experience.tokens_BL)
