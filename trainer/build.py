"""From settings to the objects that a run needs: device, models, optimizer, judge."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch

from trainer.config import Config, ConfigError
from trainer.distributed import Group
from trainer.evaluate.columns import served_names
from trainer.inference.labels import label_names
from trainer.inference.sources import WEIGHTS
from trainer.judges import make_judge
from trainer.loop import Learner
from trainer.lora import add_lora, without_lora
from trainer.miniature.weights import FILES, remedy
from trainer.models.checkpoints import (
    PUBLISHED_FILES,
    PUBLISHED_REPOSITORY,
    PUBLISHED_VQVAE,
    CheckpointError,
    check_pair,
    load_var,
    load_vqvae,
)
from trainer.nearest import nearest
from trainer.var_policy import VarPolicy


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """The device of a rank: `auto` takes a GPU where there is one, each rank of a machine its own.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device is 'cuda', but no CUDA device is visible; set --run.device cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"this machine has {torch.cuda.device_count()} GPUs, and no one for its rank {local_rank}; "
            "start as many ranks as there are GPUs"
        )
    torch.backends.cudnn.allow_tf32 = False  # TF32 keeps 10 bits: sampling and scoring would differ
    return torch.device("cuda", local_rank)


def make_autocast(device: torch.device, dtype: str) -> Callable[[], AbstractContextManager[object]]:
    """A maker of the context the transformer runs in: autocast for bfloat16, nothing for float32."""
    if dtype == "float32":
        return nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


def weights_source(stage: str, wanted: str) -> str | Path:
    """Where weights are read: the miniature's own file, or what the settings name.

    Args:
        stage: `var` or `vqvae`.
        wanted: `miniature`, a path, or a published name.

    Raises:
        CheckpointError: the miniature's file is missing.
    """
    if wanted != "miniature":
        return wanted
    if not FILES[stage].is_file():
        raise CheckpointError(f"{FILES[stage]}: no such file, it comes with the project; {remedy(stage)}")
    return FILES[stage]


def check_names(config: Config) -> None:
    """Check that rewards to be started and weights to be read are there, before anything is started or read.

    Raises:
        ConfigError: a reward without a url is none that can be served here.
        CheckpointError: weights are neither a file nor published; either names the nearest that would do.
        LocalRewardsError: the services cannot be asked which rewards there are.
    """
    for stage, wanted in (("var", config.model.var), ("vqvae", config.model.vqvae)):
        _check_source(stage, wanted)
    for section, rewards in (("rewards", config.rewards), ("eval.rewards", config.eval.rewards)):
        for number, reward in enumerate(rewards):
            if reward.url is None and reward.name not in served_names():
                raise ConfigError(
                    f"{section}.{number}.name: unknown reward {reward.name!r}, and it has no url; "
                    f"{nearest(reward.name, served_names())}"
                )


def _check_source(stage: str, wanted: str) -> None:
    path, setting = Path(weights_source(stage, wanted)), f"model.{stage}"
    files = [file for file in PUBLISHED_FILES if (file == PUBLISHED_VQVAE) == (stage == "vqvae")]
    published = [f"{PUBLISHED_REPOSITORY}:{file}" for file in files]
    if path.is_file() or wanted in published:
        return
    folder = path if path.is_dir() else path.parent
    beside = sorted(str(folder / entry.name) for entry in folder.glob("*") if entry.suffix in WEIGHTS)
    if path.is_dir():
        what = "expected a .safetensors or .pth file, this is a folder"
    else:
        what = "no such published checkpoint" if wanted.startswith(f"{PUBLISHED_REPOSITORY}:") else "no such file"
    raise CheckpointError(f"{wanted}: {what}; {setting}: {nearest(wanted, ['miniature', *beside, *published])}")


def make_learner(config: Config, group: Group, device: torch.device) -> Learner:
    """Loads policy, reference, tokenizer and judge, and makes the optimizer.

    Args:
        config: of the run.
        group: the ranks of the run.
        device: of this rank.

    Raises:
        ConfigError: a label is outside the model's classes, the classifier is of others, or a reward is unknown.
        CheckpointError: weights are missing or do not fit.
        LocalRewardsError: the services cannot be asked which rewards there are.
        JudgeError: the classifier's weights cannot be had.
        LoraError: adapters cannot be added.
    """
    check_names(config)
    sources = config.model
    var = load_var(weights_source("var", sources.var), device=device)
    vqvae = load_vqvae(weights_source("vqvae", sources.vqvae), patch_nums=var.config.patch_nums, device=device)
    check_pair(var, vqvae)
    count = var.config.num_classes
    classes = config.rollout.classes or tuple(range(count))
    outside = [label for label in classes if label >= count]
    if outside:
        raise ConfigError(f"rollout.classes holds {outside[0]}; this policy has the labels 0 to {count - 1}")
    known = len(label_names(sources.classifier))
    if known not in {0, count}:
        raise ConfigError(
            f"model.classifier {sources.classifier} knows {known} labels, this policy has {count}: "
            "choose the one of its labels, or --model.classifier none"
        )
    decode_dtype = getattr(torch, config.run.decode_dtype)
    policy = VarPolicy(var, vqvae, classes, make_autocast(device, config.run.dtype), decode_dtype=decode_dtype)
    origin = policy.digest()
    reference = _reference(policy, config)
    var.checkpoint_activations = sources.recompute
    if sources.compile:
        for each in (policy, reference):
            if each is not None:
                each.var.compile_blocks()
    optim = config.optim
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
    )
    return Learner(policy, reference, optimizer, make_judge(sources.classifier, device), group, origin)


def _reference(policy: VarPolicy, config: Config) -> VarPolicy | None:
    """The pre-trained policy, where it is needed: a frozen copy, or the same weights with their adapters off."""
    lora = config.model.lora
    if lora is not None:
        add_lora(policy.var, rank=lora.rank, alpha=lora.alpha, seed=config.run.seed)
    if not config.grpo.beta and not config.grpo.measure_kl:
        return None
    if lora is not None:
        return replace(policy, adapted=lambda: without_lora(policy.var))
    return replace(policy, var=deepcopy(policy.var).requires_grad_(False))
