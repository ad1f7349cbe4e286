"""The mathematics of GRPO: cases computed by hand, and rules that hold for any rewards."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from trainer.grpo import clipped_objective, group_advantages, grpo_loss, is_equal_group, k3_kl

CLIP, BETA = 0.2, 0.2
groups = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 5), st.integers(2, 16)),
    elements=st.integers(-1000, 1000).map(lambda n: n / 8),
)


def test_advantages_by_hand() -> None:
    """A = (r − mean) / population std: 1, 2, 3, 4 have mean 2.5 and deviation √1.25; 0, 0, 0, 1 have 1/4 and √3/4."""
    found_NG = group_advantages(torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 1.0]]))
    s = math.sqrt(1.25)
    third = 1 / math.sqrt(3)
    expected_NG = torch.tensor([[-1.5 / s, -0.5 / s, 0.5 / s, 1.5 / s], [-third, -third, -third, math.sqrt(3)]])
    torch.testing.assert_close(found_NG, expected_NG)
    assert found_NG.dtype == torch.float32


@settings(deadline=None)
@given(groups)
def test_advantages_sum_to_zero_with_deviation_one(rewards: np.ndarray) -> None:
    """Each group has mean 0, and deviation 1 unless its rewards are equal."""
    rewards_NG = torch.from_numpy(rewards)
    found_NG = group_advantages(rewards_NG).double()
    torch.testing.assert_close(found_NG.sum(dim=1), torch.zeros(len(rewards), dtype=torch.float64), atol=1e-4, rtol=0)
    deviation_N = found_NG.std(dim=1, unbiased=False)
    torch.testing.assert_close(deviation_N, (~is_equal_group(rewards_NG)).double(), atol=1e-5, rtol=0)


@settings(deadline=None)
@given(groups, st.integers(-100, 100), st.integers(1, 64).map(lambda n: n / 8))
def test_advantages_ignore_a_shift_and_a_positive_scale(rewards: np.ndarray, shift: float, scale: float) -> None:
    """Only the order and the proportions within a group matter."""
    rewards_NG = torch.from_numpy(rewards)
    torch.testing.assert_close(
        group_advantages(scale * rewards_NG + shift), group_advantages(rewards_NG), atol=1e-5, rtol=0
    )


@settings(deadline=None)
@given(
    st.floats(-1000, 1000),
    st.integers(2, 16),
    st.lists(st.floats(-1e-7, 1e-7), min_size=16, max_size=16),
)
def test_equal_rewards_give_exactly_no_gradient(value: float, size: int, residue: list[float]) -> None:
    """A group of equal rewards, up to rounding, has advantage exactly 0, and the objective no gradient."""
    rewards_1G = torch.tensor([[value + value * part for part in residue[:size]]], dtype=torch.float64)
    advantages_1G = group_advantages(rewards_1G)
    assert torch.equal(advantages_1G, torch.zeros(1, size))
    ratio_BL = torch.linspace(0.5, 1.5, 3 * size).view(size, 3).requires_grad_()
    clipped_objective(ratio_BL, advantages_1G[0], CLIP).mean().backward()
    assert ratio_BL.grad is not None
    assert torch.equal(ratio_BL.grad, torch.zeros(size, 3))


def test_float_residue_is_not_amplified() -> None:
    """0.1 + 0.2 and 0.3 are the same reward; 0.3 and 0.31 are not."""
    equal_NG = torch.tensor([[0.1 + 0.2, 0.3], [0.1 + 0.7, 0.8]], dtype=torch.float64)
    assert not torch.equal(equal_NG[:, 0], equal_NG[:, 1])
    assert torch.equal(group_advantages(equal_NG), torch.zeros(2, 2))
    torch.testing.assert_close(group_advantages(torch.tensor([[0.3, 0.31]])), torch.tensor([[-1.0, 1.0]]))


def test_huge_rewards_keep_their_proportions() -> None:
    """Rewards whose squares are beyond the floating-point range have the advantages of any others."""
    rewards_1G = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards_1G * 1e200), group_advantages(rewards_1G))


def test_groups_do_not_see_each_other() -> None:
    """Each group has its own mean and deviation."""
    rewards_NG = torch.tensor([[0.0, 1.0, 2.0], [100.0, 100.0, 130.0], [5.0, 5.0, 5.0]])
    together_NG = group_advantages(rewards_NG)
    alone_NG = torch.cat([group_advantages(row_1G) for row_1G in rewards_NG.split(1)])
    assert torch.equal(together_NG, alone_NG)
    assert torch.equal(together_NG[2], torch.zeros(3))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_not_finite_are_refused(bad: float) -> None:
    """They never become an advantage."""
    with pytest.raises(ValueError, match="1 of 4 rewards are not finite"):
        group_advantages(torch.tensor([[0.0, 1.0], [bad, 2.0]]))


@pytest.mark.parametrize("shape", [(3, 1), (4,), (2, 2, 2)])
def test_a_group_needs_two_samples(shape: tuple[int, ...]) -> None:
    """One sample has nothing to be compared with."""
    with pytest.raises(ValueError, match="at least 2 samples"):
        group_advantages(torch.zeros(shape))


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (1.0, 2.0, 2.0, 2.0),
        (1.1, 2.0, 2.2, 2.0),
        (1.5, 2.0, 2.4, 0.0),  # a good sample, already likelier than 1 + ε: no more
        (0.5, 2.0, 1.0, 2.0),  # a good sample that became unlikely is pulled back
        (1.1, -2.0, -2.2, -2.0),
        (1.5, -2.0, -3.0, -2.0),  # a bad sample that became likely is pushed down
        (0.5, -2.0, -1.6, 0.0),  # a bad sample, already less likely than 1 − ε: no more
        (0.9, -2.0, -1.8, -2.0),
    ],
)
def test_clipped_objective_by_hand(ratio: float, advantage: float, value: float, slope: float) -> None:
    """min(ρA, clamp(ρ)A) and its slope, for both signs of A and on both sides of the clip, for each token."""
    ratio_BL = torch.full((1, 3), ratio, requires_grad=True)
    objective_BL = clipped_objective(ratio_BL, torch.tensor([advantage]), CLIP)
    torch.testing.assert_close(objective_BL, torch.full((1, 3), value))
    objective_BL.sum().backward()
    assert ratio_BL.grad is not None
    torch.testing.assert_close(ratio_BL.grad, torch.full((1, 3), slope))


def test_k3_by_hand() -> None:
    """ρ − log ρ − 1 with ρ = π_ref / π_θ: 2 gives 1 − log 2, 1/2 gives log 2 − 1/2, 1 gives exactly 0."""
    log_probs_BL = torch.tensor([[-2.0, -2.0, -2.0]])
    reference_BL = log_probs_BL + torch.tensor([[math.log(2), -math.log(2), 0.0]])
    found_BL = k3_kl(log_probs_BL, reference_BL)
    torch.testing.assert_close(found_BL, torch.tensor([[1 - math.log(2), math.log(2) - 0.5, 0.0]]))
    assert found_BL[0, 2] == 0


def test_k3_averages_to_the_kl() -> None:
    """Its expectation under the policy is KL(π_θ ‖ π_ref)."""
    policy_V, reference_V = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    expected = (policy_V * (policy_V / reference_V).log()).sum()
    torch.testing.assert_close((policy_V * k3_kl(policy_V.log(), reference_V.log())).sum(), expected)


@settings(deadline=None)
@given(
    hnp.arrays(np.float64, (2, 3), elements=st.floats(-20, 0)),
    hnp.arrays(np.float64, (2, 3), elements=st.floats(-20, 0)),
)
def test_k3_is_never_negative(first: np.ndarray, second: np.ndarray) -> None:
    """Whichever token was sampled."""
    assert bool((k3_kl(torch.from_numpy(first), torch.from_numpy(second)) >= 0).all())


def test_loss_by_hand() -> None:
    """−mean(objective − β·KL) over images and tokens, and the diagnostics beside it."""
    ratio_BL = torch.tensor([[1.5, 1.0], [0.5, 1.1]])
    rho_BL = torch.tensor([[2.0, 1.0], [1.0, 0.5]])
    old_BL = torch.full((2, 2), -3.0)
    log_probs_BL = old_BL + ratio_BL.log()
    terms = grpo_loss(
        log_probs_BL, old_BL, log_probs_BL + rho_BL.log(), torch.tensor([1.0, -2.0]), clip=CLIP, beta=BETA
    )
    objective = (1.2 + 1.0 - 1.6 - 2.2) / 4
    kl = ((1 - math.log(2)) + (math.log(2) - 0.5)) / 4
    assert float(terms.loss) == pytest.approx(-(objective - BETA * kl), abs=1e-6)
    assert float(terms.kl) == pytest.approx(kl, abs=1e-6)
    assert float(terms.ratio_mean) == pytest.approx(4.1 / 4, abs=1e-6)
    assert float(terms.ratio_max) == pytest.approx(1.5, abs=1e-6)
    assert float(terms.clip_fraction) == 0.5


def log_probs_of(logits_BLV: Tensor, tokens_BL: Tensor) -> Tensor:
    """log π of the tokens."""
    return logits_BLV.log_softmax(dim=-1).gather(-1, tokens_BL[..., None])[..., 0]


def loss_gradient(logits_BLV: Tensor, reference_BLV: Tensor, advantages_B: Tensor, beta: float) -> Tensor:
    """The gradient of the loss by the logits, on the first update (π_old = π_θ)."""
    logits_BLV = logits_BLV.clone().requires_grad_()
    tokens_BL = torch.arange(8).view(2, 4) % logits_BLV.shape[-1]
    log_probs_BL = log_probs_of(logits_BLV, tokens_BL)
    reference_BL = log_probs_of(reference_BLV, tokens_BL)
    terms = grpo_loss(log_probs_BL, log_probs_BL.detach(), reference_BL, advantages_B, clip=CLIP, beta=beta)
    (gradient_BLV,) = torch.autograd.grad(terms.loss, logits_BLV)
    return gradient_BLV


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_first_update_is_the_plain_policy_gradient(logits: Tensor) -> None:
    """At ratio 1 the gradient is that of −mean(A · log π), and the loss −mean(A)."""
    advantages_B = torch.tensor([1.5, -0.5], dtype=torch.float64)
    found_BLV = loss_gradient(logits, logits, advantages_B, beta=0.0)
    leaf_BLV = logits.clone().requires_grad_()
    log_probs_BL = log_probs_of(leaf_BLV, torch.arange(8).view(2, 4) % 5)
    (expected_BLV,) = torch.autograd.grad(-(advantages_B[:, None] * log_probs_BL).mean(), leaf_BLV)
    torch.testing.assert_close(found_BLV, expected_BLV)
    # Descent makes the tokens of the image with A > 0 likelier, and those of the other less likely.
    after_BL = log_probs_of(logits - found_BLV, torch.arange(8).view(2, 4) % 5) - log_probs_BL.detach()
    assert bool((after_BL[0] > 0).all())
    assert bool((after_BL[1] < 0).all())


def test_beta_pulls_towards_the_reference(logits: Tensor) -> None:
    """Without advantages, descent lowers the KL to the reference, and a greater β pulls harder."""
    reference_BLV = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens_BL = torch.arange(8).view(2, 4) % 5
    nothing_B = torch.zeros(2, dtype=torch.float64)

    def kl_after(beta: float) -> float:
        moved_BLV = logits - loss_gradient(logits, reference_BLV, nothing_B, beta)
        return float(k3_kl(log_probs_of(moved_BLV, tokens_BL), log_probs_of(reference_BLV, tokens_BL)).mean())

    kls = [kl_after(beta) for beta in (0.0, 0.1, 0.2, 0.4)]
    assert kls == sorted(kls, reverse=True)
    assert kls[-1] < kls[0]
    assert not loss_gradient(logits, reference_BLV, nothing_B, 0.0).any()
