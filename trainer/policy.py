"""The policy's distribution over tokens: one definition, which samples and which scores.

A token's distribution is softmax(logits / temperature) in float32, whatever the precision of the transformer. Sampling
draws from it by inverse CDF, one given uniform number a token, so that what is drawn for an image depends on its own
numbers only and not on its neighbours in the batch. Inference adds guidance, top-k and top-p to the same loop.

Source: arXiv 2505.23331 §4 (plain sampling at a temperature); arXiv 2404.02905 §4 (guidance, top-k, top-p).

Shapes: B batch, L tokens of all scales, l tokens of one scale, Lm = L minus the first scale, V vocabulary, C latent
channels, H and W sides of the latent map, h and w of the image, G samples a slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from trainer.models.var import VAR, Block
from trainer.models.vqvae import VQVAE
from trainer.token_log_probs import gather, scaled, token_log_probs

# From a scale's index and logits (of the conditional and, guided, the unconditional half) to its scaled logits.
Shape = Callable[[int, Tensor], Tensor]


class Rollout(NamedTuple):
    """Sampled images, on the transformer's device; no gradient leads to them."""

    tokens_BL: Tensor  # int64
    log_probs_BL: Tensor  # float32, under the distribution that was drawn from
    f_hat_BCHW: Tensor  # float32 latent map, for the decoder
    var_input_BLmC: Tensor  # float32, what the transformer read at the later scales: the input of `log_probs`


def sample(var: VAR, vqvae: VQVAE, labels_B: Tensor, *, temperature: float, uniforms_BL: Tensor) -> Rollout:
    """Draws from the policy: plain multinomial sampling at a temperature.

    Args:
        var: the policy; autocast, where the caller has it on, applies to it and not to the quantizer.
        vqvae: the tokenizer whose quantizer turns tokens into the next scale's input.
        labels_B: int64 (B,), 0 … num_classes - 1, checked where they are on the CPU.
        temperature: above 0.
        uniforms_BL: (B, L) in [0, 1), one a token, on any device; see `keyed_uniforms`.

    Returns:
        The rollout; a logit that is not finite shows as a NaN in `log_probs_BL`.

    Raises:
        ValueError: an argument is out of range or of another shape, or DropPath is active.
    """
    _check(var, labels_B, temperature, uniforms_BL)

    def shape(_: int, logits_BlV: Tensor) -> Tensor:
        return scaled(logits_BlV, temperature)

    return _unroll(var, vqvae, labels_B, uniforms_BL, guided=False, shape=shape)


def log_probs(
    var: nn.Module, labels_B: Tensor, var_input_BLmC: Tensor, tokens_BL: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of given tokens under the policy, in one teacher-forced pass.

    Args:
        var: the policy, or a wrapper that is called alike.
        labels_B: int64 (B,).
        var_input_BLmC: (B, Lm, C), from the rollout or from the quantizer's `embed_scales`.
        tokens_BL: int64 (B, L).
        temperature: that of the sampling.

    Returns:
        Log-probabilities (B, L), through which gradients flow, and entropies (B, L) in nats, through which none do;
        float32.

    Raises:
        ValueError: the temperature is out of range, or DropPath is active.
    """
    _check_deterministic(var, temperature)
    return token_log_probs(var(labels_B, var_input_BLmC), tokens_BL, temperature)


def generate(
    var: VAR,
    vqvae: VQVAE,
    labels_B: Tensor,
    *,
    uniforms_BL: Tensor,
    guidance: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    temperature: float = 1.0,
) -> Rollout:
    """Draws images as at inference: guidance on a ramp over the scales, then top-k, then top-p.

    Args:
        var: the transformer.
        vqvae: its tokenizer.
        labels_B: int64 (B,), 0 … num_classes - 1, checked where they are on the CPU.
        uniforms_BL: (B, L) in [0, 1), one a token.
        guidance: at least 0; scale k of K uses guidance · k / (K - 1). At 0 the unconditional half is not computed.
        top_k: tokens kept at each position, 1 being greedy; 0 keeps all.
        top_p: in (0, 1], the probability mass kept at each position; 1 keeps all.
        temperature: above 0; divides the guided logits.

    Returns:
        The rollout; its log-probabilities are those of the guided, filtered distribution.

    Raises:
        ValueError: an argument is out of range or of another shape, or DropPath is active.
    """
    _check(var, labels_B, temperature, uniforms_BL)
    if guidance < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"guidance is {guidance}, top_k {top_k}, top_p {top_p}; they must be at least 0, at least 0, and in (0, 1]"
        )
    last_scale = len(var.config.patch_nums) - 1

    def shape(scale: int, logits_BlV: Tensor) -> Tensor:
        if guidance > 0:
            t = guidance * scale / last_scale
            conditional_BlV, unconditional_BlV = logits_BlV.float().chunk(2)
            logits_BlV = (1 + t) * conditional_BlV - t * unconditional_BlV
        return _keep_top_p(_keep_top_k(scaled(logits_BlV, temperature), top_k), top_p)

    return _unroll(var, vqvae, labels_B, uniforms_BL, guided=guidance > 0, shape=shape)


def keyed_uniforms(seed: int, step: int, slots: Sequence[int], group_size: int, length: int) -> Tensor:
    """Random numbers for the groups of a step, each set by its key alone.

    The generator is Philox with the seed as key and step and slot in the counter, so that two keys never share a
    number's place, and a slot's numbers do not depend on which slots are asked for together.

    Args:
        seed: of the run, 0 … 2^128 - 1.
        step: 0 … 2^64 - 1.
        slots: places in the step's list of labels, 0 … 2^64 - 1 each.
        group_size: G, samples a slot.
        length: L, tokens a sample.

    Returns:
        float32 (len(slots) · G, L) in [0, 1) on the CPU; the samples of a slot are adjacent.

    Raises:
        ValueError: a key is negative or too large.
    """
    if not 0 <= seed < 2**128 or not all(0 <= key < 2**64 for key in (step, *slots)):
        raise ValueError(
            f"seed is {seed}, step {step}, slots {list(slots)}; they must be from 0 below 2^128, 2^64, 2^64"
        )
    groups_SGL = np.empty((len(slots), group_size, length), dtype=np.float32)
    for index, slot in enumerate(slots):
        generator = np.random.Generator(
            np.random.Philox(key=seed, counter=np.array([0, 0, step, slot], dtype=np.uint64))
        )
        generator.random(dtype=np.float32, out=groups_SGL[index])
    return torch.from_numpy(groups_SGL).flatten(0, 1)


@torch.no_grad()
def decode_uint8(vqvae: VQVAE, f_hat_BCHW: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Latent maps as pictures: uint8 (B, h, w, 3) on the same device, [-1, 1] mapped to 0 … 255 and rounded.

    Args:
        vqvae: the tokenizer.
        f_hat_BCHW: float32 latent maps.
        dtype: of the decoder's convolutions, whatever autocast is on around it; bfloat16 moves a mean luma by up to
            0.001.
    """
    with torch.autocast(f_hat_BCHW.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        images_B3hw: Tensor = vqvae.decode(f_hat_BCHW)
    return ((images_B3hw.float() + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@torch.no_grad()
def _unroll(var: VAR, vqvae: VQVAE, labels_B: Tensor, uniforms_BL: Tensor, *, guided: bool, shape: Shape) -> Rollout:
    """Draws scale after scale; the only sampling loop."""
    config, device = var.config, var.pos_start.device
    labels_B, uniforms_BL = labels_B.to(device), uniforms_BL.to(device, torch.float32)
    null_B = torch.full_like(labels_B, config.num_classes)
    cache = var.start(torch.cat((labels_B, null_B)) if guided else labels_B)
    side = config.patch_nums[-1]
    f_hat_BCHW = torch.zeros(len(labels_B), config.latent_channels, side, side, device=device)
    tokens: list[Tensor] = []
    token_log_probs: list[Tensor] = []
    inputs: list[Tensor] = []
    next_BlC: Tensor | None = None
    for scale, (begin, end) in enumerate(pairwise(config.offsets)):
        input_BlC = torch.cat((next_BlC, next_BlC)) if guided and next_BlC is not None else next_BlC
        scaled_BlV = shape(scale, var.step(scale, input_BlC, cache))
        tokens_Bl = _inverse_cdf(scaled_BlV, uniforms_BL[:, begin:end])
        tokens.append(tokens_Bl)
        token_log_probs.append(gather(scaled_BlV, tokens_Bl)[0])
        # In float32, so that the same tokens give the same input here and in `embed_scales`.
        with torch.autocast(device.type, enabled=False):
            f_hat_BCHW, next_BlC = vqvae.quantize.next_input(scale, f_hat_BCHW, tokens_Bl)
        if next_BlC is not None:
            inputs.append(next_BlC)
    return Rollout(torch.cat(tokens, 1), torch.cat(token_log_probs, 1), f_hat_BCHW, torch.cat(inputs, 1))


def _inverse_cdf(scaled_BlV: Tensor, uniforms_Bl: Tensor) -> Tensor:
    """The token int64 (B, l) at whose step of the cumulative distribution each uniform falls."""
    cdf_BlV = scaled_BlV.softmax(dim=-1).cumsum(dim=-1)
    total_Bl1 = cdf_BlV[..., -1:]
    # Below the total even after rounding, so that no token of probability 0 is drawn after the last possible one.
    below_Bl1 = torch.nextafter(total_Bl1, torch.zeros_like(total_Bl1))
    target_Bl1 = torch.minimum(uniforms_Bl[..., None] * total_Bl1, below_Bl1)
    return torch.searchsorted(cdf_BlV, target_Bl1, right=True)[..., 0].clamp_max(cdf_BlV.shape[-1] - 1)


def _keep_top_k(scaled_BlV: Tensor, k: int) -> Tensor:
    """All but the k greatest logits of a position (ties with the k-th stay) at minus infinity."""
    if not 0 < k < scaled_BlV.shape[-1]:
        return scaled_BlV
    least_Bl1 = scaled_BlV.topk(k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    return scaled_BlV.masked_fill(scaled_BlV < least_Bl1, -torch.inf)


def _keep_top_p(scaled_BlV: Tensor, p: float) -> Tensor:
    """The unlikeliest tokens, together of probability at most 1 - p, at minus infinity; the likeliest always stays."""
    if p == 1.0:
        return scaled_BlV
    ascending_BlV, order_BlV = scaled_BlV.sort(dim=-1)
    drop_BlV = ascending_BlV.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    drop_BlV[..., -1] = False
    return scaled_BlV.masked_fill(torch.empty_like(drop_BlV).scatter_(-1, order_BlV, drop_BlV), -torch.inf)


def _check(var: VAR, labels_B: Tensor, temperature: float, uniforms_BL: Tensor) -> None:
    _check_deterministic(var, temperature)
    config, wanted = var.config, (len(labels_B), var.config.length)
    if tuple(uniforms_BL.shape) != wanted:
        raise ValueError(f"uniforms_BL is {tuple(uniforms_BL.shape)}; it must be {wanted}, one number a token")
    if labels_B.device.type == "cpu" and len(labels_B):  # elsewhere the check would wait for the device
        low, high = int(labels_B.min()), int(labels_B.max())
        if low < 0 or high >= config.num_classes:
            raise ValueError(
                f"labels run from {low} to {high}; this model has the classes 0 … {config.num_classes - 1}"
            )


def _check_deterministic(var: nn.Module, temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be positive and finite")
    if any(isinstance(module, Block) and module.training and module.drop_path for module in var.modules()):
        raise ValueError(
            "DropPath is active, which makes the policy's distribution random; call eval(), or drop_path=0"
        )
