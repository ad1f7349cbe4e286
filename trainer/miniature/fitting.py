"""The supervised training loop that all pre-training stages share: resumable, averaged, with a progress bar."""

import math
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Args:
        steps: optimizer steps.
        batch: examples a step.
        lr: peak learning rate of AdamW.
        muon_lr: peak learning rate of Muon, where a stage trains matrices by it.
        warmup: steps until the rates are at their peak; a cosine then lowers them to 2 % of it.
        weight_decay: of both optimizers.
        ema: decay of the averaged weights that are kept.
    """

    steps: int
    batch: int
    lr: float
    muon_lr: float = 0.02
    warmup: int = 100
    weight_decay: float = 0.0
    ema: float = 0.998

    def share_at(self, step: int) -> float:
        """The learning rates of a step, counted from 0, as a share of their peak."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass
class Fitted(Generic[ModelT]):
    """The averaged model and the seconds of training it took, over all resumptions."""

    model: ModelT
    seconds: float


def batch_indices(seed: int, step: int, count: int, batch: int) -> NDArray[np.int64]:
    """Which examples a step sees: keyed by (seed, step), so that a resumed run sees the same ones."""
    return np.random.default_rng((seed, step)).integers(0, count, size=batch)


def _optimizers(
    model: nn.Module, schedule: Schedule, muon_names: Collection[str]
) -> list[tuple[torch.optim.Optimizer, float]]:
    """AdamW, and Muon where it has something to train, each with its peak learning rate."""
    named = dict(model.named_parameters())
    by_muon = [named.pop(name) for name in muon_names]
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.AdamW(named.values(), betas=(0.9, 0.99), weight_decay=schedule.weight_decay), schedule.lr)
    ]
    if by_muon:
        muon = torch.optim.Muon(by_muon, weight_decay=schedule.weight_decay, adjust_lr_fn="original")
        optimizers.append((muon, schedule.muon_lr))
    return optimizers


def fit(
    name: str,
    model: ModelT,
    loss: Callable[[ModelT, int], Tensor],
    schedule: Schedule,
    *,
    state: Path,
    device: torch.device,
    muon_names: Collection[str] = (),
    save_every_s: float = 60.0,
) -> Fitted[ModelT]:
    """Minimises `loss(model, step)` by AdamW (and Muon), clipped at norm 1, and returns the averaged weights.

    Args:
        name: shown beside the progress bar.
        model: trained in place.
        loss: scalar loss of one step; a resumed run equals one never interrupted if the step alone sets it.
        schedule: length and learning rate.
        state: file that the run is saved to and resumed from; its name must be this run's alone.
        device: where the model is trained; `loss` puts its batch there.
        muon_names: matrices that are trained by Muon (Jordan et al. 2024, as `torch.optim.Muon`) in place of AdamW.
        save_every_s: seconds between saves.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    model = model.to(device)
    optimizers = _optimizers(model, schedule, muon_names)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(schedule.ema))
    first, seconds = 0, 0.0
    if state.exists():
        saved = torch.load(state, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        averaged.load_state_dict(saved["averaged"])
        for (optimizer, _), content in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(content)
        first, seconds = int(saved["step"]), float(saved["seconds"])

    def save(step: int) -> None:
        state.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "model": model.state_dict(),
            "averaged": averaged.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer, _ in optimizers],
            "step": step,
            "seconds": seconds,
        }
        torch.save(content, state.with_suffix(".tmp"))
        os.replace(state.with_suffix(".tmp"), state)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), refresh_per_second=1) as bar:
        task = bar.add_task(name, total=schedule.steps, completed=first)
        mean, saved_at = math.nan, time.monotonic()
        model.train()
        for step in range(first, schedule.steps):
            began = time.monotonic()
            value = loss(model, step)
            model.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, peak in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = peak * schedule.share_at(step)
                optimizer.step()
            averaged.update_parameters(model)
            number = float(value.detach())
            if not math.isfinite(number):
                raise FloatingPointError(f"{name}: the loss is {number} at step {step}; lower the learning rate")
            mean = number if math.isnan(mean) else 0.98 * mean + 0.02 * number
            seconds += time.monotonic() - began
            bar.update(task, advance=1, description=f"{name} loss {mean:.4f}")
            if step % 200 == 0:
                bar.console.log(f"{name} step {step} loss {mean:.5f} {seconds:.0f} s")
            if time.monotonic() - saved_at > save_every_s:
                save(step + 1)
                saved_at = time.monotonic()
        save(schedule.steps)
    model.load_state_dict(averaged.module.state_dict())
    return Fitted(model.eval(), seconds)
