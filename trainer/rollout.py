"""From labels to experience: sample, decode, submit to the rewards; the scores are collected later.

Shape legend: N labels of a step · G samples of a label · B = N·G images · L tokens · Lm = L minus the first scale ·
C latent channels · H, W pixels.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.models.var import VAR
from trainer.models.vqvae import VQVAE
from trainer.policy import decode_uint8, keyed_uniforms, sample
from trainer.scoring import Scored

Submit = Callable[[NDArray[np.uint8]], Future[Scored]]


class Experience(NamedTuple):
    """What a step samples, on the policy's device; the images are on the CPU. Groups are adjacent, in slot order."""

    labels_B: Tensor  # int64
    tokens_BL: Tensor  # int64
    log_probs_BL: Tensor  # float32, recorded while sampling
    var_input_BLmC: Tensor  # float32
    images_BHW3: NDArray[np.uint8]


def draw_labels(seed: int, step: int, count: int, classes: Sequence[int]) -> Tensor:
    """The labels of a step: int64 (count,), uniform with repetition, keyed by (seed, step)."""
    generator = np.random.default_rng((seed, step, 1))
    return torch.from_numpy(np.asarray(classes, dtype=np.int64)[generator.integers(len(classes), size=count)])


def roll_out(
    policy: VAR,
    vqvae: VQVAE,
    labels_N: Tensor,
    submit: Submit,
    *,
    group_size: int,
    temperature: float,
    chunk: int,
    seed: int,
    step: int,
) -> tuple[Experience, list[Future[Scored]]]:
    """Samples G images of each label, chunk after chunk, and hands each chunk to the rewards as soon as it is decoded.

    Args:
        policy: the current policy, in eval mode.
        vqvae: its tokenizer.
        labels_N: int64 (N,), one for each group.
        submit: starts the scoring of uint8 images (B, H, W, 3).
        group_size: G.
        temperature: of the policy.
        chunk: images sampled at once, a multiple of G.
        seed: of the run.
        step: of the training.

    Returns:
        The experience and the pending scores, one future a chunk.
    """
    parts: list[Experience] = []
    pending: list[Future[Scored]] = []
    groups = chunk // group_size
    for first in range(0, len(labels_N), groups):
        slots = range(first, min(first + groups, len(labels_N)))
        labels_B = labels_N[first : slots.stop].repeat_interleave(group_size)
        uniforms_BL = keyed_uniforms(seed, step, slots, group_size, policy.config.length)
        rollout = sample(policy, vqvae, labels_B, temperature=temperature, uniforms_BL=uniforms_BL)
        images_BHW3 = decode_uint8(vqvae, rollout.f_hat_BCHW).cpu().numpy()
        pending.append(submit(images_BHW3))
        labels_B = labels_B.to(rollout.tokens_BL.device)
        parts.append(Experience(labels_B, rollout.tokens_BL, rollout.log_probs_BL, rollout.var_input_BLmC, images_BHW3))
    return _join(parts), pending


def _join(parts: Sequence[Experience]) -> Experience:
    return Experience(
        torch.cat([p.labels_B for p in parts]),
        torch.cat([p.tokens_BL for p in parts]),
        torch.cat([p.log_probs_BL for p in parts]),
        torch.cat([p.var_input_BLmC for p in parts]),
        np.concatenate([p.images_BHW3 for p in parts]),
    )
