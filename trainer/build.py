"""From settings to the objects that a run needs: device, models, optimizer, judge."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from pathlib import Path

import torch

from trainer.config import Config, ConfigError
from trainer.judges import make_judge
from trainer.loop import Learner
from trainer.miniature.weights import FILES, remedy
from trainer.models.checkpoints import CheckpointError, check_pair, load_var, load_vqvae


def choose_device(wanted: str) -> torch.device:
    """The device of a run: `auto` takes a GPU where there is one.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device is 'cuda', but no CUDA device is visible; set --run.device cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def make_autocast(device: torch.device, dtype: str) -> Callable[[], AbstractContextManager[object]]:
    """A maker of the context the transformer runs in: autocast for bfloat16, nothing for float32."""
    if dtype == "float32":
        return nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


def _source(stage: str, wanted: str) -> str | Path:
    """Where weights are read: the miniature's own file, or what the settings name."""
    if wanted != "miniature":
        return wanted
    if not FILES[stage].is_file():
        raise CheckpointError(f"{FILES[stage]}: no such file, it comes with the project; {remedy(stage)}")
    return FILES[stage]


def make_learner(config: Config) -> Learner:
    """Loads policy, reference, tokenizer and judge, and makes the optimizer.

    Raises:
        ConfigError: a label is outside the model's classes, or the device is not there.
        CheckpointError: weights are missing or do not fit.
        JudgeError: the classifier's weights cannot be had.
    """
    device = choose_device(config.run.device)
    sources = config.model
    policy = load_var(_source("var", sources.var), device=device)
    scales = policy.config.patch_nums
    vqvae = load_vqvae(_source("vqvae", sources.vqvae), patch_nums=scales, device=device)
    check_pair(policy, vqvae)
    count = policy.config.num_classes
    classes = config.rollout.classes or tuple(range(count))
    outside = [label for label in classes if label >= count]
    if outside:
        raise ConfigError(f"rollout.classes holds {outside[0]}; this policy has the labels 0 to {count - 1}")
    reference = deepcopy(policy).requires_grad_(False)
    optim = config.optim
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
    )
    return Learner(
        policy=policy,
        reference=reference,
        vqvae=vqvae,
        optimizer=optimizer,
        classes=classes,
        judge=make_judge(sources.classifier, device),
        autocast=make_autocast(device, config.run.dtype),
    )
