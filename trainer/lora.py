"""LoRA: small adapters trained beside frozen weights, after which the file saved is a plain VAR checkpoint.

An adapted layer computes W x + (alpha / rank) · B A x, of which A and B alone are trained. B starts at 0, so the policy
starts as the pre-trained one; with the adapters off it is the reference, without a second copy in memory.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685), §4.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainer.models.var import VAR

TARGETS = ("attn.mat_qkv", "attn.proj", "ffn.fc1", "ffn.fc2")
ADAPTER = "default"
SHOWN = 3  # entries named in an error; the rest are counted


class LoraError(ValueError):
    """Adapters cannot be added, read or loaded as asked; the message is one line with the remedy."""


def add_lora(var: VAR, *, rank: int, alpha: float, targets: Sequence[str] = TARGETS, seed: int = 0) -> tuple[str, ...]:
    """Adds adapters to linear layers of every block, and freezes all other parameters.

    The model stays a `VAR` with the same distribution, mode and device, and is changed in place.

    Args:
        var: without adapters.
        rank: of each adapter, at least 1.
        alpha: positive; the adapters' output is multiplied by alpha / rank.
        targets: the layers, named from their block: the attention's and the feed-forward's without it.
        seed: of the values that A starts from; the same on every rank and device.

    Returns:
        The names of the trainable parameters, in the order of `var.named_parameters()`.

    Raises:
        LoraError: a value is out of range, a target is no linear layer of the blocks, the model has adapters already,
            or peft is not installed.
    """
    if rank < 1:
        raise LoraError(f"LoRA's rank is {rank}; it must be at least 1")
    if not 0 < alpha < math.inf:
        raise LoraError(f"LoRA's alpha is {alpha}; it must be positive and finite")
    if has_lora(var):
        raise LoraError("the model has adapters already; load it anew, or go on with these")
    wanted = [f"{block}.{target}" for block in range(len(var.blocks)) for target in targets]
    modules = dict(var.blocks.named_modules())
    absent = [name for name in wanted if not isinstance(modules.get(name), nn.Linear)]
    if absent or not wanted:
        raise LoraError(
            f"LoRA finds no linear layer {'blocks.' + absent[0] if absent else 'to adapt, for no target is named'}; "
            f"name layers of a block, such as {', '.join(TARGETS)}"
        )
    try:
        from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415 - optional, and seconds of import
    except ImportError as error:
        raise LoraError("LoRA needs peft: pip install 'var-grpo[lora]'") from error
    # peft takes any number for alpha, whatever its annotation says.
    config = LoraConfig(r=rank, lora_alpha=cast(Any, alpha), target_modules=wanted)
    var.requires_grad_(False)
    inject_adapter_in_model(config, var.blocks, ADAPTER)  # not in `var`, whose `config` peft would take for its own
    generator = torch.Generator().manual_seed(seed)
    for layer in _adapted(var).values():
        weight_RF = layer.lora_A[ADAPTER].weight
        drawn_RF = nn.init.kaiming_uniform_(torch.empty(weight_RF.shape), a=math.sqrt(5), generator=generator)
        weight_RF.data.copy_(drawn_RF)
    var.train(var.training)  # the new modules are in train mode, whatever the model's
    return tuple(name for name, parameter in var.named_parameters() if parameter.requires_grad)


def has_lora(var: VAR) -> bool:
    """Whether a model has adapters."""
    return bool(_adapted(var))


@contextmanager
def without_lora(var: VAR) -> Iterator[VAR]:
    """The model as it was before `add_lora`, to the last bit: the reference policy, of the same weights.

    Within, the adapters take no part, in sampling and scoring alike; they are as before afterwards, also where an
    error ends it. It may be nested.

    Yields:
        `var` itself.

    Raises:
        LoraError: the model has no adapters.
    """
    layers = [layer for layer in _require(var).values() if not layer.disable_adapters]
    adapters = [parameter for name, parameter in var.named_parameters() if ".lora_" in name]
    trainable = [parameter.requires_grad for parameter in adapters]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield var
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, requires_grad in zip(adapters, trainable, strict=True):
            parameter.requires_grad_(requires_grad)  # peft has set it anew


@torch.no_grad()
def merged_state(var: VAR) -> dict[str, Tensor]:
    """Weights of a plain VAR that computes what the model does with its adapters, which stay as they are.

    Args:
        var: with adapters.

    Returns:
        Every entry of a VAR's state dict under its published name. Adapted weights are new tensors, all others the
        model's own.

    Raises:
        LoraError: the model has no adapters.
    """
    layers = _require(var)
    state = {
        name.replace(".base_layer.", "."): entry for name, entry in var.state_dict().items() if ".lora_" not in name
    }
    with torch.autocast(var.pos_start.device.type, enabled=False):  # bfloat16 would round the sum
        for name, layer in layers.items():
            weight_FF = state[f"{name}.weight"]
            state[f"{name}.weight"] = weight_FF + layer.get_delta_weight(ADAPTER).to(weight_FF.dtype)
    return state


def merge_lora(var: VAR) -> VAR:
    """A plain transformer with the adapters merged into its weights, as `save_var` takes it.

    Args:
        var: with adapters; not changed.

    Returns:
        A model without adapters, frozen and in eval mode; tensors that have no adapter are shared with `var`.

    Raises:
        LoraError: the model has no adapters.
    """
    with torch.device("meta"):
        plain = VAR(var.config)
    plain.load_state_dict(merged_state(var), assign=True)
    return plain.eval().requires_grad_(False)


def _adapted(var: VAR) -> dict[str, Any]:
    """Layers with an adapter, by the name that the plain layer had; peft's, which only `add_lora` imports."""
    return {name: module for name, module in var.named_modules() if hasattr(module, "lora_A")}


def _require(var: VAR) -> dict[str, Any]:
    layers = _adapted(var)
    if not layers:
        raise LoraError("the model has no adapters; call add_lora first")
    return layers
