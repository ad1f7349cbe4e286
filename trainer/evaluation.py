"""What a policy is worth: the same samples before and after training, scored by the rewards and by an outside judge.

Shape legend: B images · H, W pixels.
"""

from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.loop import LabelJudge
from trainer.metrics import Metrics
from trainer.models.var import VAR
from trainer.models.vqvae import VQVAE
from trainer.policy import decode_uint8, keyed_uniforms, sample
from trainer.rollout import Submit
from trainer.scoring import collect

EVAL_STEP = 2**32  # no training step has this number, so no training sample shares its random numbers


class Samples(NamedTuple):
    """Images uint8 (B, H, W, 3) of labels int64 (B,)."""

    images_BHW3: NDArray[np.uint8]
    labels_B: NDArray[np.int64]


@torch.no_grad()
def draw_samples(
    policy: VAR,
    vqvae: VQVAE,
    labels_B: NDArray[np.int64],
    *,
    temperature: float,
    seed: int,
    chunk: int,
    autocast: AbstractContextManager[object],
) -> Samples:
    """One image of each label, plain sampling; image i depends on (seed, i, label) alone."""
    images: list[NDArray[np.uint8]] = []
    with autocast:
        for first in range(0, len(labels_B), chunk):
            slots = range(first, min(first + chunk, len(labels_B)))
            uniforms_BL = keyed_uniforms(seed, EVAL_STEP, slots, 1, policy.config.length)
            labels = torch.from_numpy(labels_B[first : slots.stop])
            rollout = sample(policy, vqvae, labels, temperature=temperature, uniforms_BL=uniforms_BL)
            images.append(decode_uint8(vqvae, rollout.f_hat_BCHW).cpu().numpy())
    return Samples(np.concatenate(images), labels_B)


def spread_labels(count: int, classes: tuple[int, ...]) -> NDArray[np.int64]:
    """`count` labels spread evenly over the classes, int64: they take turns, or stand for their neighbours."""
    step = max(1.0, len(classes) / count)
    rows = (np.arange(count) * step).astype(np.int64) % len(classes)
    return np.asarray(classes, dtype=np.int64)[rows]


def score_samples(samples: Samples, submit: Submit, judge: LabelJudge | None, *, chunk: int) -> Metrics:
    """Mean reward, raw score (of the first reward), success rate and label accuracy of samples.

    Raises:
        RewardError, ScoreError: a score did not come or is not a number.
    """
    images = samples.images_BHW3
    scored = collect([submit(images[first : first + chunk]) for first in range(0, len(images), chunk)])
    named: Metrics = {f"raw_score/{name}": float(raw_B.mean()) for name, raw_B in scored.raw.items()}
    return {
        "reward": float(scored.reward.mean()),
        "raw_score": float(next(iter(scored.raw.values())).mean()),
        "success_rate": None if scored.success is None else float(scored.success.mean()),
        "label_accuracy": judge(images, samples.labels_B) if judge else None,
        **named,
    }
