"""The training step of GRPO on a next-scale policy (arXiv 2505.23331), on one screen.

Shape legend: N labels of a step · G samples of a label · B = N·G images · b images of a micro-batch · L tokens.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.config import Config
from trainer.grpo import LossTerms, group_advantages, grpo_loss, is_equal_group
from trainer.metrics import Metrics, Phases
from trainer.models.var import VAR
from trainer.models.vqvae import VQVAE
from trainer.policy import log_probs
from trainer.rollout import Experience, Submit, draw_labels, roll_out
from trainer.scoring import Scored, collect

LabelJudge = Callable[[NDArray[np.uint8], NDArray[np.int64]], float]


@dataclass
class Learner:
    """What a training step reads and changes.

    Args:
        policy: the transformer that is trained; in eval mode, for label dropout and DropPath are off in RL.
        reference: the pre-trained transformer, frozen.
        vqvae: the tokenizer, frozen.
        optimizer: of the policy's parameters.
        classes: labels to draw from.
        judge: share of images that are still their label; None where there is no classifier.
        autocast: makes the context that the transformer runs in.
    """

    policy: VAR
    reference: VAR
    vqvae: VQVAE
    optimizer: torch.optim.Optimizer
    classes: tuple[int, ...]
    judge: LabelJudge | None
    autocast: Callable[[], AbstractContextManager[object]]

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return self.policy.pos_start.device


def train_step(learner: Learner, submit: Submit, config: Config, step: int) -> Metrics:
    """One step: roll out, score, compare within groups, optimise.

    Args:
        learner: changed in place.
        submit: starts the scoring of uint8 images (B, H, W, 3).
        config: of the run.
        step: counted from 0; keys the step's random numbers.

    Returns:
        The step's metrics, as docs/metrics.md defines them.

    Raises:
        RewardError, ScoreError: a score did not come or is not a number.
        FloatingPointError: the loss is not finite.
    """
    rollout, phases = config.rollout, Phases(learner.device)
    with phases("sample"), learner.autocast():
        labels_N = draw_labels(config.run.seed, step, rollout.labels, learner.classes)
        experience, pending = roll_out(
            learner.policy,
            learner.vqvae,
            labels_N,
            submit,
            group_size=rollout.group_size,
            temperature=rollout.temperature,
            chunk=rollout.chunk,
            seed=config.run.seed,
            step=step,
        )
    with phases("reference"), torch.no_grad(), learner.autocast():  # while the scores are on their way
        reference_BL, _ = _chunked_log_probs(learner.reference, experience, rollout.temperature, rollout.chunk)
    with phases("judge"):
        accuracy = learner.judge(experience.images_BHW3, experience.labels_B.cpu().numpy()) if learner.judge else None
    with phases("score"):
        scored = collect(pending)
    rewards_NG = torch.from_numpy(scored.reward).view(-1, rollout.group_size)
    advantages_B = group_advantages(rewards_NG).flatten().to(reference_BL.device)
    with phases("optimise"):
        updates = [
            _update(learner, experience, reference_BL, advantages_B, rows_B, config, step)
            for rows_B in _minibatches(len(advantages_B), config.optim.minibatch, config.run.seed, step)
        ]
    return {
        **_score_metrics(scored, rewards_NG, advantages_B, accuracy),
        **_update_metrics(updates),
        **phases.metrics(images=len(advantages_B)),
    }


@dataclass(frozen=True)
class _Update:
    terms: LossTerms  # sums over the micro-batches, weighted; the maximum where the name says so
    entropy: Tensor
    grad_norm: Tensor
    ratio_error: Tensor  # max |log ρ| over the tokens, before the update


def _update(
    learner: Learner,
    experience: Experience,
    reference_BL: Tensor,
    advantages_B: Tensor,
    rows_B: Tensor,
    config: Config,
    step: int,
) -> _Update:
    """One optimizer step on a minibatch, its gradient accumulated over micro-batches."""
    optim, learning_rate = config.optim, config.optim.lr * min(1.0, (step + 1) / max(config.optim.warmup_steps, 1))
    pieces: list[LossTerms] = []
    entropies: list[Tensor] = []
    errors: list[Tensor] = []
    for rows_b in rows_B.split(optim.micro_batch or len(rows_B)):
        with learner.autocast():
            log_probs_bL, entropy_bL = log_probs(
                learner.policy,
                experience.labels_B[rows_b],
                experience.var_input_BLmC[rows_b],
                experience.tokens_BL[rows_b],
                temperature=config.rollout.temperature,
            )
        terms = grpo_loss(
            log_probs_bL,
            experience.log_probs_BL[rows_b],
            reference_BL[rows_b],
            advantages_B[rows_b],
            clip=config.grpo.clip,
            beta=config.grpo.beta,
        )
        share = len(rows_b) / len(rows_B)
        (terms.loss * share).backward()
        pieces.append(
            LossTerms(
                loss=terms.loss.detach() * share,
                kl=terms.kl * share,
                ratio_mean=terms.ratio_mean * share,
                ratio_max=terms.ratio_max,
                clip_fraction=terms.clip_fraction * share,
            )
        )
        entropies.append(entropy_bL.mean() * share)
        errors.append((log_probs_bL.detach() - experience.log_probs_BL[rows_b]).abs().max())
    total = LossTerms(*(torch.stack([piece[i] for piece in pieces]).sum() for i in range(5)))
    total = total._replace(ratio_max=torch.stack([piece.ratio_max for piece in pieces]).max())
    grad_norm = nn.utils.clip_grad_norm_(learner.policy.parameters(), optim.grad_clip or float("inf"))
    if not bool(torch.isfinite(total.loss) & torch.isfinite(grad_norm)):
        learner.optimizer.zero_grad(set_to_none=True)
        raise FloatingPointError(
            f"step {step}: loss {float(total.loss)}, gradient norm {float(grad_norm)}; "
            f"this update was not made; lower optim.lr (now {optim.lr})"
        )
    for group in learner.optimizer.param_groups:
        group["lr"] = learning_rate
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)
    return _Update(total, torch.stack(entropies).sum(), grad_norm, torch.stack(errors).max())


def _minibatches(count: int, size: int, seed: int, step: int) -> tuple[Tensor, ...]:
    """A shuffled partition of the step's images, int64 (size,) each."""
    order = np.random.default_rng((seed, step, 2)).permutation(count)
    rows_B: Tensor = torch.from_numpy(order)
    return tuple(rows_B[start : start + size] for start in range(0, count, size))


def _chunked_log_probs(policy: VAR, experience: Experience, temperature: float, chunk: int) -> tuple[Tensor, Tensor]:
    parts = [
        log_probs(
            policy,
            experience.labels_B[rows],
            experience.var_input_BLmC[rows],
            experience.tokens_BL[rows],
            temperature=temperature,
        )
        for rows in torch.arange(len(experience.labels_B)).split(chunk)
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _score_metrics(scored: Scored, rewards_NG: Tensor, advantages_B: Tensor, accuracy: float | None) -> Metrics:
    named: Metrics = {}
    for name, raw_B in scored.raw.items():
        named[f"raw_score/{name}"] = float(raw_B.mean())
        named[f"shaped/{name}"] = float(scored.shaped[name].mean())
    return named | {
        "reward": float(scored.reward.mean()),
        "reward_std": float(scored.reward.std()),
        "success_rate": None if scored.success is None else float(scored.success.mean()),
        "label_accuracy": accuracy,
        "advantage_abs_mean": float(advantages_B.abs().mean()),
        "zero_variance_groups": float(is_equal_group(rewards_NG).double().mean()),
    }


def _update_metrics(updates: list[_Update]) -> Metrics:
    def mean(values: list[Tensor]) -> float:
        return float(torch.stack(values).mean())

    return {
        "loss": mean([u.terms.loss for u in updates]),
        "kl": mean([u.terms.kl for u in updates]),
        "ratio_mean": mean([u.terms.ratio_mean for u in updates]),
        "ratio_max": float(torch.stack([u.terms.ratio_max for u in updates]).max()),
        "ratio_error_first": float(updates[0].ratio_error),
        "clip_fraction": mean([u.terms.clip_fraction for u in updates]),
        "entropy": mean([u.entropy for u in updates]),
        "grad_norm": mean([u.grad_norm for u in updates]),
    }
