"""Loads the policies that `trainer.inference.sources` has found."""

import torch

from trainer.build import make_autocast, weights_source
from trainer.checkpoint import Checkpoints
from trainer.inference.sources import PolicySource
from trainer.lora import add_lora
from trainer.models.checkpoints import CheckpointError, check_pair, load_var, load_vqvae
from trainer.run_state import POLICY
from trainer.var_policy import VarPolicy


def load_policy(source: PolicySource, device: torch.device, dtype: str) -> VarPolicy:
    """A policy in eval mode, drawing from all classes; nothing of it is trained.

    Args:
        source: where it comes from.
        device: where it goes.
        dtype: of the transformer's arithmetic, `float32` or `bfloat16`.

    Raises:
        CheckpointError: weights are missing or do not fit, or a state is of other weights than it says.
        LoraError: a state has adapters, and peft is not installed.
    """
    var = load_var(weights_source("var", source.var), device=device)
    vqvae = load_vqvae(weights_source("vqvae", source.vqvae), patch_nums=var.config.patch_nums, device=device)
    check_pair(var, vqvae)
    policy = VarPolicy(var, vqvae, range(var.config.num_classes), make_autocast(device, dtype))
    if source.state is not None:
        _load_state(policy, source)
    var.requires_grad_(False)
    return policy


def _load_state(policy: VarPolicy, source: PolicySource) -> None:
    """Puts the weights of a run's state in the place of those that the run began with."""
    assert source.run is not None
    assert source.state is not None
    origin = policy.digest()
    states = Checkpoints(source.state.parent, keep=1, run=source.run.identity())
    try:
        state = states.load(source.state)
    except CheckpointError as error:
        raise CheckpointError(f"{str(error).rpartition('; ')[0]}; name another state, or the run's folder") from error
    if state.values["origin"] != origin:
        raise CheckpointError(
            f"{source.var} and {source.vqvae} hold other weights than those that {source.state} began with; "
            "put those back, which its run's config.yaml names"
        )
    lora = source.run.model.lora
    if lora is not None:
        add_lora(policy.var, rank=lora.rank, alpha=lora.alpha, seed=source.run.run.seed)
    saved = {name.removeprefix(POLICY): value for name, value in state.tensors.items() if name.startswith(POLICY)}
    parameters = {str(index): parameter for index, parameter in enumerate(policy.parameters())}
    if {name: value.shape for name, value in saved.items()} != {name: p.shape for name, p in parameters.items()}:
        raise CheckpointError(f"{source.state}: its {len(saved)} weights are not this policy's; name another state")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
