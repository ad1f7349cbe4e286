"""Group Relative Policy Optimization for next-scale models: the mathematics, as pure functions of tensors.

Source: arXiv 2505.23331, Eq. 1 and §4.2. As printed, Eq. 1 is a ratio of whole sequences and multiplies only the
clipped term by the advantage; §4.2 and every implementation apply it token by token with the advantage on both terms,
and so does this file.

Shape legend: N groups · G samples of a group · B images (N·G, or a minibatch of them) · L tokens of an image.
"""

from typing import NamedTuple

import torch
from torch import Tensor

EQUAL_TOLERANCE = 1e-6  # rewards closer than this, relative to their size, count as equal


def is_equal_group(rewards_NG: Tensor) -> Tensor:
    """Which groups have nothing to compare: max − min ≤ 1e-6 · max(1, |mean|).

    Args:
        rewards_NG: float (N, G).

    Returns:
        bool (N,).
    """
    spread_N = rewards_NG.amax(dim=1) - rewards_NG.amin(dim=1)
    return spread_N <= EQUAL_TOLERANCE * rewards_NG.mean(dim=1).abs().clamp_min(1.0)


def group_advantages(rewards_NG: Tensor) -> Tensor:
    """Advantage of each sample within its group, A = (r − mean) / std with the population deviation (§4.2).

    A group of equal rewards gets exactly 0: the deviation's rounding residue is never divided by.

    Args:
        rewards_NG: float (N, G), G ≥ 2, finite.

    Returns:
        float (N, G); each row has mean 0, and deviation 1 or 0.

    Raises:
        ValueError: G < 2, or a reward that is not finite.
    """
    if rewards_NG.dim() != 2 or rewards_NG.shape[1] < 2:
        raise ValueError(
            f"rewards have shape {tuple(rewards_NG.shape)}; give (groups, samples) with at least 2 samples"
        )
    if not bool(torch.isfinite(rewards_NG).all()):
        count = int((~torch.isfinite(rewards_NG)).sum())
        raise ValueError(f"{count} of {rewards_NG.numel()} rewards are not finite; a reward must be a number")
    rewards_NG = rewards_NG.double()
    centred_NG = rewards_NG - rewards_NG.mean(dim=1, keepdim=True)
    centred_NG = centred_NG / centred_NG.abs().amax(dim=1, keepdim=True).clamp_min(1e-300)  # squares stay finite
    deviation_N1 = centred_NG.square().mean(dim=1, keepdim=True).sqrt()
    equal_N1 = is_equal_group(rewards_NG)[:, None]
    return torch.where(equal_N1, 0.0, centred_NG / deviation_N1.masked_fill(equal_N1, 1.0)).float()


def clipped_objective(ratio_BL: Tensor, advantages_B: Tensor, clip: float) -> Tensor:
    """min(ρ·A, clamp(ρ, 1 − ε, 1 + ε)·A) for each token (Eq. 1, A on both terms).

    Args:
        ratio_BL: π_θ / π_old of each sampled token, float (B, L).
        advantages_B: float (B,), the same for every token of an image.
        clip: ε > 0.

    Returns:
        float (B, L), to be maximised.
    """
    advantages_B1 = advantages_B[:, None]
    return torch.minimum(ratio_BL * advantages_B1, ratio_BL.clamp(1 - clip, 1 + clip) * advantages_B1)


def k3_kl(log_probs_BL: Tensor, reference_BL: Tensor) -> Tensor:
    """Estimate of KL(π_θ ‖ π_ref) from the sampled tokens: ρ − log ρ − 1 with ρ = π_ref / π_θ, float (B, L) ≥ 0."""
    log_rho_BL = reference_BL - log_probs_BL
    return torch.expm1(log_rho_BL) - log_rho_BL


class LossTerms(NamedTuple):
    """The loss of a minibatch and what is logged about it; all scalars."""

    loss: Tensor  # carries the gradient
    kl: Tensor
    ratio_mean: Tensor
    ratio_max: Tensor
    clip_fraction: Tensor


def grpo_loss(
    log_probs_BL: Tensor,
    old_BL: Tensor,
    reference_BL: Tensor | None,
    advantages_B: Tensor,
    *,
    clip: float,
    beta: float,
) -> LossTerms:
    """−mean over images and tokens of (clipped objective − β · KL) (Eq. 1).

    Args:
        log_probs_BL: log π_θ of the sampled tokens, float (B, L), with gradient.
        old_BL: log-probs recorded while sampling, float (B, L).
        reference_BL: log π_ref of the same tokens, float (B, L); None for no KL, which is then 0.
        advantages_B: float (B,).
        clip: ε > 0.
        beta: weight of the KL, ≥ 0.
    """
    ratio_BL = (log_probs_BL - old_BL).exp()
    kl_BL = torch.zeros_like(log_probs_BL) if reference_BL is None else k3_kl(log_probs_BL, reference_BL)
    objective_BL = clipped_objective(ratio_BL, advantages_B, clip) - beta * kl_BL
    ratio_BL = ratio_BL.detach()
    return LossTerms(
        loss=-objective_BL.mean(),
        kl=kl_BL.detach().mean(),
        ratio_mean=ratio_BL.mean(),
        ratio_max=ratio_BL.max(),
        clip_fraction=((ratio_BL - 1).abs() > clip).float().mean(),
    )
