"""Self-attention over scales: a position sees its own scale and all coarser ones.

When all scales are read at once, most of the upper half of the square of scores is masked: for 256×256 images 38 % of
it. `attend_by_scale` computes only what is not, and without a mask over the larger scales, which is what fused kernels
are fastest at; `attend_masked` is its plain twin.

Shapes: B batch, L tokens of all scales, l tokens of one scale, C model width, H heads, c channels of a head.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.elementwise import normalised

MAX_LOG_SCALE = math.log(100.0)  # the learned inverse temperature of normalised attention stays below 100
LEADING_SHARE = 0.25
"""Scales that end within this share of all positions are attended to together, under a mask: they are too small to be
worth a kernel each."""


class Scales(NamedTuple):
    """What each position sees where all scales are read at once.

    `bias_11LL` is 0 where the row sees the column, and minus infinity elsewhere. `ends` are positions at which a part
    ends that is attended to at once: the leading scales together, then each scale by itself; None for one masked call.
    """

    bias_11LL: Tensor
    ends: tuple[int, ...] | None


class LayerCache(NamedTuple):
    """Keys and values (B, H, L, c) of one layer, and the positions that the current scale writes."""

    keys_BHLc: Tensor
    values_BHLc: Tensor
    start: int
    stop: int

    def extend(self, keys_BHlc: Tensor, values_BHlc: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the current scale and returns views of all positions up to its end."""
        self.keys_BHLc[:, :, self.start : self.stop] = keys_BHlc
        self.values_BHLc[:, :, self.start : self.stop] = values_BHlc
        return self.keys_BHLc[:, :, : self.stop], self.values_BHLc[:, :, : self.stop]


def part_ends(offsets: tuple[int, ...]) -> tuple[int, ...]:
    """The ends of the parts of `Scales`, from the S + 1 positions at which scales start, the last being L."""
    leading = [end for end in offsets[1:] if end <= LEADING_SHARE * offsets[-1]]
    return (*leading[-1:], *(end for end in offsets[1:] if end > LEADING_SHARE * offsets[-1]))


def attend_masked(q_BHLc: Tensor, k_BHLc: Tensor, v_BHLc: Tensor, bias_11LL: Tensor, scale: float) -> Tensor:
    """Attention (B, H, L, c) of all positions at once, under a mask."""
    bias_11LL = bias_11LL.to(q_BHLc.dtype)
    return F.scaled_dot_product_attention(q_BHLc, k_BHLc, v_BHLc, attn_mask=bias_11LL, scale=scale)


def attend_by_scale(
    q_BHLc: Tensor, k_BHLc: Tensor, v_BHLc: Tensor, bias_11LL: Tensor, ends: tuple[int, ...], scale: float
) -> Tensor:
    """The same attention, part after part, each over the keys up to its own end; only the first part has a mask.

    Args:
        q_BHLc, k_BHLc, v_BHLc: (B, H, L, c).
        bias_11LL: (1, 1, L, L), of which the first part's corner is read.
        ends: of `part_ends`.
        scale: of the scores.
    """
    queries = q_BHLc.split([end - start for start, end in pairwise((0, *ends))], dim=2)
    keys_BHec, values_BHec = k_BHLc, v_BHLc
    parts: list[Tensor] = []
    # From the last part to the first, each of the keys before: so their gradients grow part by part, not whole.
    for q_BHlc, end in reversed(list(zip(queries, ends, strict=True))):
        keys_BHec, values_BHec = keys_BHec[:, :, :end], values_BHec[:, :, :end]
        if end == ends[0]:
            corner_11ee = bias_11LL[:, :, :end, :end]
            parts.append(attend_masked(q_BHlc, keys_BHec, values_BHec, corner_11ee, scale))
        else:
            parts.append(F.scaled_dot_product_attention(q_BHlc, keys_BHec, values_BHec, scale=scale))
    # Positions before heads, as the projection that follows reads them: no copy is made of what is joined.
    return torch.cat([part.transpose(1, 2) for part in reversed(parts)], dim=1).transpose(1, 2)


class FusedProjection(nn.Linear):
    """A linear layer without a bias of its own, to which one made elsewhere is given."""

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(input, self.weight, bias)


class SelfAttention(nn.Module):
    """Multi-head attention; queries and keys may be normalised to the unit sphere. Keys have no bias."""

    zero_k_bias: Tensor

    def __init__(self, width: int, heads: int, l2_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.l2_norm = l2_norm
        if l2_norm:
            self.scale = 1.0
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0)))
        else:
            self.scale = 0.25 / math.sqrt(width // heads)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.mat_qkv = FusedProjection(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BlC: Tensor, context: Scales | LayerCache) -> Tensor:
        """Attend within all scales at once (`Scales`), or from one scale to those in the cache and itself."""
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv_BlF: Tensor = self.mat_qkv(x_BlC, bias)
        qkv_Bl3Hc = qkv_BlF.view(*x_BlC.shape[:2], 3, self.heads, -1)
        # Parted before heads and positions are exchanged: so the gradient is put together in the projection's order.
        q_BHlc, k_BHlc, v_BHlc = (part_BlHc.transpose(1, 2) for part_BlHc in qkv_Bl3Hc.unbind(2))
        if self.l2_norm:
            scale_1H11 = self.scale_mul_1H11.float().clamp_max(MAX_LOG_SCALE).exp()
            q_BHlc, k_BHlc = normalised(q_BHlc, scale_1H11), normalised(k_BHlc)
        if isinstance(context, LayerCache):
            k_BHlc, v_BHlc = context.extend(k_BHlc, v_BHlc)
            out_BHlc = F.scaled_dot_product_attention(q_BHlc, k_BHlc, v_BHlc, scale=self.scale)
        elif context.ends is None:
            out_BHlc = attend_masked(q_BHlc, k_BHlc, v_BHlc, context.bias_11LL, self.scale)
        else:
            out_BHlc = attend_by_scale(q_BHlc, k_BHlc, v_BHlc, context.bias_11LL, context.ends, self.scale)
        return cast(Tensor, self.proj(out_BHlc.transpose(1, 2).flatten(2)))
