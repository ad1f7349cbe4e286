"""The optimizer's steps on minibatches of a step's images, and what is measured on the way.

Shape legend: B images of the step · M images of a minibatch · m those of this rank · b a micro-batch · L tokens.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from trainer.config import Config, OptimConfig
from trainer.distributed import Gradients, Group
from trainer.grpo import LossTerms, grpo_loss
from trainer.interface import Policy
from trainer.metrics import Metrics


class Batch(NamedTuple):
    """All images of a step, on every rank."""

    conditions_B: Tensor
    tokens_BL: Tensor  # int64
    log_probs_BL: Tensor  # float32, recorded while sampling
    reference_BL: Tensor  # float32, or (B, 0) without a reference
    advantages_B: Tensor  # float32


class NotFinite(FloatingPointError):
    """A loss or gradient is not finite; the update was not made.

    Attributes:
        minibatch: the rows that it came from, by the names of `Batch`.
    """

    def __init__(self, message: str, minibatch: dict[str, Tensor]) -> None:
        super().__init__(message)
        self.minibatch = minibatch


class _Measured(NamedTuple):
    terms: LossTerms  # weighted sums over the micro-batches; the maximum where the name says so
    entropy: Tensor
    ratio_error: Tensor  # max |log ρ| over the tokens, before the update


def minibatches(count: int, size: int, seed: int, step: int, epoch: int = 0) -> tuple[Tensor, ...]:
    """A shuffled partition of a step's images, int64 (size,) each, set by seed, step and epoch alone."""
    key = (seed, step, 2) if epoch == 0 else (seed, step, 2, epoch)
    rows_B: Tensor = torch.from_numpy(np.random.default_rng(key).permutation(count))
    return tuple(rows_B[start : start + size] for start in range(0, count, size))


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """The rate of a step counted from 0: a linear rise, then constant, or a fall that ends at 0 after the last."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(steps - optim.warmup_steps, 1)
    share = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[optim.schedule]
    return optim.lr * share


def _clip_scale(grad_norm: Tensor, grad_clip: float | None) -> Tensor | None:
    """What gradients of that norm are divided by, so that it is `grad_clip` at most, as `clip_grad_norm_` has it."""
    return None if grad_clip is None else ((grad_norm + 1e-6) / grad_clip).clamp_min(1.0)


class Updates:
    """The updates of one step; they are measured together."""

    def __init__(self, policy: Policy, optimizer: torch.optim.Optimizer, group: Group, config: Config) -> None:
        """Bind what is trained.

        Args:
            policy: changed in place.
            optimizer: of its parameters.
            group: the ranks that share each minibatch.
            config: of the run.
        """
        self._policy, self._optimizer, self._group, self._config = policy, optimizer, group, config
        self._parameters = list(policy.parameters())
        self._gradients = Gradients(self._parameters, group) if group.size > 1 else None
        self._measured: list[_Measured] = []
        self._grad_norms: list[Tensor] = []
        self._rows: list[Tensor] = []
        self._is_broken = torch.zeros((), device=policy.device)  # 1 from the first minibatch that is not finite
        self._knows_kl = False

    def make(self, batch: Batch, rows_M: Tensor, step: int) -> None:
        """One optimizer step on a minibatch, split over the ranks, its gradient accumulated over micro-batches.

        Whether all is finite stays on the device, so that a GPU is not waited for: from the first loss or gradient
        that is not, no update changes weights or optimizer any more, and `finish` says so.

        Args:
            batch: the step's images.
            rows_M: which of them, int64 on the CPU.
            step: of the run.

        Raises:
            RankError: another rank failed.
        """
        optim = self._config.optim
        self._knows_kl = bool(batch.reference_BL.shape[1])
        with self._group.together():
            own = self._group.share(len(rows_M))
            measured = self._accumulate(batch, rows_M[own.start : own.stop])
        if self._gradients is not None:
            self._gradients.average()
        loss = self._group.average(measured.terms.loss.clone())
        with self._group.together():  # the first step of an optimizer takes memory
            grad_norm = nn.utils.get_total_norm([each.grad for each in self._parameters if each.grad is not None])
            is_finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
            self._is_broken = torch.maximum(self._is_broken, (~is_finite).float())
            for parameters in self._optimizer.param_groups:
                parameters["lr"] = learning_rate(optim, step, self._config.run.steps)
            # Read by fused optimizers, as amp does: what gradients are divided by, and whether nothing is to be done.
            self._optimizer.grad_scale = _clip_scale(grad_norm, optim.grad_clip)  # type: ignore[attr-defined]
            self._optimizer.found_inf = self._is_broken  # type: ignore[attr-defined]
            self._optimizer.step()
        self._clear()
        self._measured.append(measured._replace(terms=measured.terms._replace(loss=loss)))
        self._grad_norms.append(grad_norm)
        self._rows.append(rows_M)

    def finish(self, batch: Batch, step: int) -> None:
        """Wait for the updates, and give back the memory of the gradients, which the next step's sampling can use.

        Raises:
            NotFinite: on all ranks alike; weights and optimizer are as they were before the minibatch that it names.
        """
        self._optimizer.zero_grad(set_to_none=True)
        self._gradients = None
        if not bool(self._is_broken):
            return
        losses, norms = (torch.stack(values).tolist() for values in (self._losses(), self._grad_norms))
        pairs = zip(losses, norms, strict=True)
        first = next(index for index, pair in enumerate(pairs) if not all(map(math.isfinite, pair)))
        rows_M = self._rows[first]
        raise NotFinite(
            f"step {step + 1}: loss {losses[first]}, gradient norm {norms[first]}; "
            f"this update was not made; lower optim.lr (now {self._config.optim.lr})",
            {name.partition("_B")[0]: values_B[rows_M].cpu() for name, values_B in batch._asdict().items()},
        )

    def _losses(self) -> list[Tensor]:
        return [measured.terms.loss for measured in self._measured]

    def _accumulate(self, batch: Batch, rows_m: Tensor) -> _Measured:
        """Add up the gradients of this rank's part of a minibatch."""
        config = self._config
        pieces: list[LossTerms] = []
        entropies: list[Tensor] = []
        errors: list[Tensor] = []
        for rows_b in rows_m.split(config.optim.micro_batch or len(rows_m)):
            old_bL, share = batch.log_probs_BL[rows_b], len(rows_b) / len(rows_m)
            log_probs_bL, entropy_bL = self._policy.log_probs(
                batch.conditions_B[rows_b], batch.tokens_BL[rows_b], temperature=config.rollout.temperature
            )
            terms = grpo_loss(
                log_probs_bL,
                old_bL,
                batch.reference_BL[rows_b] if self._knows_kl else None,
                batch.advantages_B[rows_b],
                clip=config.grpo.clip,
                beta=config.grpo.beta,
            )
            (terms.loss * share).backward()
            weighted = LossTerms(*(term.detach() * share for term in terms))
            pieces.append(weighted._replace(ratio_max=terms.ratio_max))
            entropies.append(entropy_bL.mean() * share)
            errors.append((log_probs_bL.detach() - old_bL).abs().max())
        total = LossTerms(*(torch.stack(parts).sum() for parts in zip(*pieces, strict=True)))
        total = total._replace(ratio_max=torch.stack([piece.ratio_max for piece in pieces]).max())
        return _Measured(total, torch.stack(entropies).sum(), torch.stack(errors).max())

    def _clear(self) -> None:
        if self._gradients is None:
            self._optimizer.zero_grad(set_to_none=True)
        else:
            self._gradients.clear()

    def metrics(self) -> Metrics:
        """Means and maxima over the updates and the ranks; the KL is None without a reference."""
        terms = [measured.terms for measured in self._measured]
        means = {
            "loss": self._losses(),
            "kl": [term.kl for term in terms],
            "ratio_mean": [term.ratio_mean for term in terms],
            "clip_fraction": [term.clip_fraction for term in terms],
            "entropy": [measured.entropy for measured in self._measured],
        }
        mean = self._group.average(torch.stack([torch.stack(values).mean() for values in means.values()]))
        most = self._group.greatest(
            torch.stack([torch.stack([term.ratio_max for term in terms]).max(), self._measured[0].ratio_error])
        )
        named: Metrics = dict(zip(means, mean.tolist(), strict=True))
        if not self._knows_kl:
            named["kl"] = None
        return named | {
            "ratio_max": float(most[0]),
            "ratio_error_first": float(most[1]),
            "grad_norm": float(torch.stack(self._grad_norms).mean()),
            "learning_rate": self._optimizer.param_groups[0]["lr"],
        }
