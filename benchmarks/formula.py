"""Weights that need no download: each entry is drawn from a generator whose seed is the entry's name."""

import math
import zlib

import torch
from torch import nn

KEPT = ("zero_k_bias", "lvl_1L", "attn_bias_for_masking", "ema_vocab_hit_SV")


@torch.no_grad()
def fill(module: nn.Module) -> None:
    """Fill every entry in place, on its own device, with what keeps activations of a usual size."""
    for name, entry in module.state_dict().items():
        if name.endswith(KEPT) or not entry.is_floating_point():
            continue
        generator = torch.Generator(entry.device).manual_seed(zlib.crc32(name.encode()))
        entry.normal_(generator=generator)
        if name.endswith("scale_mul_1H11"):
            entry.mul_(0.1).add_(math.log(4.0))
        elif entry.ndim >= 2:
            entry.div_(math.sqrt(math.prod(entry.shape[1:])))
        else:
            entry.mul_(0.1).add_(1.0 if name.endswith(".weight") else 0.0)
