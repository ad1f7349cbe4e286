"""Weights that anyone can regenerate: every entry of a state dict is drawn from a seed made of its name."""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from torch import nn

KEPT = ("zero_k_bias", "lvl_1L", "attn_bias_for_masking", "ema_vocab_hit_SV")


@torch.no_grad()
def fill(module: nn.Module) -> None:
    """Fills a module as tests/golden/README.md describes."""
    for name, entry in module.state_dict().items():
        if name.endswith(KEPT) or not entry.is_floating_point():
            continue
        z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(entry.shape))
        if name.endswith("scale_mul_1H11"):
            value = math.log(4.0) + 0.1 * z
        elif entry.ndim >= 2:
            value = z / math.sqrt(math.prod(entry.shape[1:]))
        elif name.endswith(".weight"):
            value = 1 + 0.1 * z
        else:
            value = 0.1 * z
        entry.copy_(torch.from_numpy(value.astype(np.float32)))
