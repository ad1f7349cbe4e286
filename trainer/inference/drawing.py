"""Draws images whose random numbers are set by seed, label and index alone. B images · L tokens · H, W pixels."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.inference.sampling import Sampling
from trainer.policy import generate, keyed_uniforms
from trainer.var_policy import VarPolicy

FIRST_KEY = 2**33
"""Label c has the numbers of step 2^33 + c: no training step, and no evaluation within a run, shares them."""


def uniforms_of(seeds: Sequence[int], labels: Sequence[int], indices: Sequence[int], length: int) -> Tensor:
    """The random numbers (B, L) of images, each set by its (seed, label, index)."""
    keys = zip(seeds, labels, indices, strict=True)
    return torch.cat([keyed_uniforms(seed, FIRST_KEY + label, [index], 1, length) for seed, label, index in keys])


def draw(
    policy: VarPolicy, labels: Sequence[int], indices: Sequence[int], sampling: Sampling, *, seeds: Sequence[int]
) -> NDArray[np.uint8]:
    """One image for each label, index and seed, uint8 (B, H, W, 3).

    Args:
        policy: that is drawn from.
        labels: B of its classes.
        indices: B numbers that tell images of a label apart.
        sampling: the way of drawing.
        seeds: B, of the random numbers.
    """
    labels_B = torch.tensor(labels)
    uniforms_BL = uniforms_of(seeds, labels, indices, policy.length)
    if sampling.plain:
        rollout = policy.sample(labels_B, temperature=sampling.temperature, uniforms_BL=uniforms_BL)
    else:
        assert sampling.guidance is not None
        assert sampling.top_k is not None
        assert sampling.top_p is not None
        with policy.autocast(), policy.adapted():
            rollout = generate(
                policy.var,
                policy.vqvae,
                labels_B,
                uniforms_BL=uniforms_BL,
                guidance=sampling.guidance,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                temperature=sampling.temperature,
            )
    return policy.decode(rollout).cpu().numpy()
