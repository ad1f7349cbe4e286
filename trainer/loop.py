"""The training step of GRPO on a next-scale policy (arXiv 2505.23331), on one screen.

Each rank samples its share of the step's groups; what was sampled is then shared, and each minibatch is split evenly.
Shape legend: N conditions of a step · G samples of each · B = N·G images · b those of this rank · L tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.config import Config
from trainer.distributed import Group
from trainer.grpo import group_advantages, is_equal_group
from trainer.interface import Policy
from trainer.metrics import Metrics, Phases
from trainer.rollout import Submit, roll_out
from trainer.scoring import Scored, collect
from trainer.update import Batch, Updates, minibatches

LabelJudge = Callable[[NDArray[np.uint8], NDArray[np.int64]], float]


@dataclass
class Learner:
    """What a training step reads and changes.

    Args:
        policy: the one that is trained.
        reference: the pre-trained one, frozen; None where β is 0.
        optimizer: of the policy's parameters.
        judge: share of images that are still their label; None where there is no classifier.
        group: the ranks of the run.
        origin: digest of the weights that the run begins with, and that the reference keeps.
    """

    policy: Policy
    reference: Policy | None
    optimizer: torch.optim.Optimizer
    judge: LabelJudge | None
    group: Group
    origin: str = ""


def train_step(learner: Learner, submit: Submit, config: Config, step: int) -> Metrics:
    """One step: roll out, score, compare within groups, optimise.

    Args:
        learner: changed in place.
        submit: starts the scoring of uint8 images (B, H, W, 3).
        config: of the run.
        step: counted from 0; keys the step's random numbers.

    Returns:
        The step's metrics, as docs/metrics.md defines them; the same on every rank, timings aside.

    Raises:
        RewardError, ScoreError: a score did not come or is not a number.
        NotFinite: the loss or its gradient is not finite; it holds the minibatch.
        RankError: another rank failed; the weights are as they were before its failure.
    """
    rollout, group, phases = config.rollout, learner.group, Phases(learner.policy.device)
    with group.together():
        with phases("sample"):
            conditions_N = learner.policy.draw_conditions(config.run.seed, step, rollout.labels)
            experience, images_bHW3, pending = roll_out(
                learner.policy,
                conditions_N,
                group.share(rollout.labels),
                submit,
                group_size=rollout.group_size,
                temperature=rollout.temperature,
                chunk=rollout.chunk,
                seed=config.run.seed,
                step=step,
                blocking=rollout.blocking,
            )
        with phases("reference"), torch.no_grad():  # while the scores are on their way
            reference_bL = reference_log_probs(learner, experience.conditions_B, experience.tokens_BL, config)
        with phases("judge"):
            accuracy = learner.judge(images_bHW3, experience.conditions_B.cpu().numpy()) if learner.judge else None
        with phases("score"):
            scored = collect(pending)
            advantages_b = advantages(scored, config).to(learner.policy.device)
    with phases("share"):
        batch = Batch(*map(group.gather, (*experience, reference_bL, advantages_b)))
        scored = scored.map(lambda values_b: _gathered(values_b, learner))
    updates = Updates(learner.policy, learner.optimizer, group, config)
    with phases("optimise"):
        for epoch in range(config.grpo.epochs):
            for rows_B in minibatches(len(batch.advantages_B), config.optim.minibatch, config.run.seed, step, epoch):
                updates.make(batch, rows_B, step)
        updates.finish(batch, step)
    return {
        **_score_metrics(scored, batch.advantages_B, rollout.group_size),
        "label_accuracy": None if accuracy is None else group.mean(accuracy),
        **updates.metrics(),
        **phases.metrics(images=len(batch.advantages_B)),
    }


def advantages(scored: Scored, config: Config) -> Tensor:
    """The advantage of each image in its group, float32 (B,), of all rewards together.

    Args:
        scored: rewards of whole groups, adjacent.
        config: its `grpo.combine` says whether the rewards are summed first or normalised first.
    """
    size = config.rollout.group_size
    if config.grpo.combine == "sum_then_normalize":
        return group_advantages(torch.from_numpy(scored.reward).view(-1, size)).flatten()
    each = (
        reward.weight * group_advantages(torch.from_numpy(scored.shaped[reward.name]).view(-1, size)).flatten()
        for reward in config.rewards
    )
    return torch.stack(list(each)).sum(dim=0)


def reference_log_probs(learner: Learner, conditions_B: Tensor, tokens_BL: Tensor, config: Config) -> Tensor:
    """Log-probabilities under the reference, chunk by chunk: float32 (B, L), or (B, 0) where there is none.

    Args:
        learner: its reference is read.
        conditions_B: (B, …), what was sampled for.
        tokens_BL: int64 (B, L), what was sampled.
        config: its `rollout` has the chunk and the temperature.
    """
    reference = learner.reference
    if reference is None:
        return tokens_BL.new_empty(len(tokens_BL), 0, dtype=torch.float32)
    parts = zip(conditions_B.split(config.rollout.chunk), tokens_BL.split(config.rollout.chunk), strict=True)
    return torch.cat([reference.log_probs(*part, temperature=config.rollout.temperature)[0] for part in parts])


def _gathered(values_b: NDArray[np.float64], learner: Learner) -> NDArray[np.float64]:
    if learner.group.size == 1:
        return values_b
    return learner.group.gather(torch.from_numpy(values_b).to(learner.policy.device)).cpu().numpy()


def _score_metrics(scored: Scored, advantages_B: Tensor, group_size: int) -> Metrics:
    named: Metrics = {}
    for name, raw_B in scored.raw.items():
        named[f"raw_score/{name}"] = float(raw_B.mean())
        named[f"raw_std/{name}"] = float(raw_B.std())
        named[f"raw_min/{name}"], named[f"raw_max/{name}"] = float(raw_B.min()), float(raw_B.max())
        named[f"shaped/{name}"] = float(scored.shaped[name].mean())
    rewards_NG = torch.from_numpy(scored.reward).view(-1, group_size)
    return named | {
        "reward": float(scored.reward.mean()),
        "reward_std": float(scored.reward.std()),
        "success_rate": None if scored.success is None else float(scored.success.mean()),
        "advantage_abs_mean": float(advantages_B.abs().mean()),
        "zero_variance_groups": float(is_equal_group(rewards_NG).double().mean()),
    }
