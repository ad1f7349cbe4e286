"""From conditions to experience: sample, decode, submit to the rewards; the scores are collected later.

Shape legend: N conditions of a step (labels, for VAR) · G samples of each · B = N·G images · L tokens · H, W pixels.
"""

from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.interface import Policy
from trainer.policy import keyed_uniforms
from trainer.scoring import Scored

Submit = Callable[[NDArray[np.uint8]], Future[Scored]]


class Experience(NamedTuple):
    """What a step samples, on the policy's device. Groups are adjacent, in slot order."""

    conditions_B: Tensor
    tokens_BL: Tensor  # int64
    log_probs_BL: Tensor  # float32, recorded while sampling


class RolledOut(NamedTuple):
    """Experience, its images uint8 (B, H, W, 3) on the CPU, and the pending scores, one future a chunk."""

    experience: Experience
    images_BHW3: NDArray[np.uint8]
    pending: list[Future[Scored]]


def roll_out(
    policy: Policy,
    conditions_N: Tensor,
    slots: range,
    submit: Submit,
    *,
    group_size: int,
    temperature: float,
    chunk: int,
    seed: int,
    step: int,
    blocking: bool = False,
) -> RolledOut:
    """Samples G images of each condition, chunk after chunk, and hands each chunk to the rewards once it is decoded.

    Args:
        policy: the current policy.
        conditions_N: (N, …), those of the whole step.
        slots: which of them are sampled here.
        submit: starts the scoring of uint8 images (B, H, W, 3).
        group_size: G.
        temperature: of the policy.
        chunk: images sampled at once, a multiple of G.
        seed: of the run.
        step: of the training.
        blocking: wait for the scores of a chunk before the next is sampled.
    """
    parts: list[Experience] = []
    images: list[NDArray[np.uint8]] = []
    pending: list[Future[Scored]] = []
    groups = chunk // group_size
    for first in range(slots.start, slots.stop, groups):
        part = range(first, min(first + groups, slots.stop))
        conditions_B = conditions_N[part.start : part.stop].repeat_interleave(group_size, dim=0)
        uniforms_BL = keyed_uniforms(seed, step, part, group_size, policy.length)
        rollout = policy.sample(conditions_B, temperature=temperature, uniforms_BL=uniforms_BL)
        images.append(policy.decode(rollout).cpu().numpy())
        pending.append(submit(images[-1]))
        if blocking:
            pending[-1].exception()  # only waits: what it raised is raised where the scores are collected
        parts.append(Experience(conditions_B.to(policy.device), rollout.tokens_BL, rollout.log_probs_BL))
    experience = Experience(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    return RolledOut(experience, np.concatenate(images), pending)
