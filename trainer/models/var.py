"""VAR: a class-conditional transformer that predicts all tokens of a scale at once, scale after scale.

Source: Tian et al., "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction"
(arXiv 2404.02905), §3.2; parameter and buffer names are those of the published checkpoints.

Shapes: B batch, L tokens of all scales, l tokens of one scale, S scales, V vocabulary, C model width, D conditioning
width (equal to C), Cvae (written `Cv` in a suffix) latent channels, H attention heads, c channels of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.models.attention import LayerCache, Scales, SelfAttention, part_ends
from trainer.models.elementwise import gated, modulated

OFFICIAL_DEPTHS = (16, 20, 24, 30, 36)
PATCH_NUMS_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
PATCH_NUMS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
COMPILED_SHAPES = 64  # scales × batch sizes, in sampling with and without guidance, and in training


@dataclass(frozen=True)
class VARConfig:
    """What fixes the shape of every parameter of a `VAR`.

    Args:
        depth: number of blocks, at least 1.
        width: C, a multiple of `heads`.
        heads: H, attention heads.
        patch_nums: side of every scale in tokens, strictly increasing, at least two of them.
        vocab_size: V, at least 2.
        latent_channels: Cvae, channels of the VQVAE's latent.
        num_classes: labels are 0 … num_classes - 1; the label `num_classes` means unconditional.
        l2_norm_attention: queries and keys are normalised and scaled by one learned factor a head.
        shared_adaln: one AdaLN projection for all blocks (d36) in place of one a block.
        mlp_ratio: hidden width of the feed-forward layer over `width`.

    Raises:
        ValueError: a value is out of range.
    """

    depth: int
    width: int
    heads: int
    patch_nums: tuple[int, ...] = PATCH_NUMS_256
    vocab_size: int = 4096
    latent_channels: int = 32
    num_classes: int = 1000
    l2_norm_attention: bool = True
    shared_adaln: bool = False
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_nums", tuple(self.patch_nums))
        for name, least in (("depth", 1), ("heads", 1), ("vocab_size", 2), ("latent_channels", 1), ("num_classes", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.width < 1 or self.width % self.heads:
            raise ValueError(f"width is {self.width}; it must be a positive multiple of heads ({self.heads})")
        if len(self.patch_nums) < 2 or self.patch_nums[0] < 1 or any(a >= b for a, b in pairwise(self.patch_nums)):
            raise ValueError(f"patch_nums is {self.patch_nums}; it must hold two or more increasing positive sides")
        if self.mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio is {self.mlp_ratio}; it must be positive")

    @property
    def length(self) -> int:
        """L, the number of tokens of one image."""
        return sum(side * side for side in self.patch_nums)

    @property
    def offsets(self) -> tuple[int, ...]:
        """The S + 1 token positions at which the scales start, the last being L."""
        return tuple(accumulate((side * side for side in self.patch_nums), initial=0))

    @classmethod
    def for_depth(cls, depth: int) -> VARConfig:
        """The published model of a depth: 256×256 pixels up to 30 blocks, 512×512 with shared AdaLN at 36.

        Args:
            depth: one of `OFFICIAL_DEPTHS`.

        Raises:
            ValueError: no model of that depth is published.
        """
        if depth not in OFFICIAL_DEPTHS:
            raise ValueError(f"depth is {depth}; published models have depth {', '.join(map(str, OFFICIAL_DEPTHS))}")
        large = depth == 36
        return cls(depth, 64 * depth, depth, PATCH_NUMS_512 if large else PATCH_NUMS_256, shared_adaln=large)


class Modulation(NamedTuple):
    """What the class label contributes to every layer, computed once an image.

    `blocks` holds one (B, 1, 6, C) tensor a block, in the order gamma, gamma, scale, scale, shift, shift (attention
    first, feed-forward second); `head_B12C` holds scale and shift before the head.
    """

    blocks: tuple[Tensor, ...]
    head_B12C: Tensor


class Cache(NamedTuple):
    """One sampling run: class embedding, its modulation, and preallocated keys and values of every layer."""

    cond_BD: Tensor
    modulation: Modulation
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class FeedForward(nn.Module):
    """Two linear layers around a GELU (tanh form)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_BlC: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(F.gelu(self.fc1(x_BlC), approximate="tanh")))


class Block(nn.Module):
    """A pre-norm transformer block whose norms and residual gains are set by the class (AdaLN)."""

    def __init__(self, config: VARConfig, drop_path: float) -> None:
        super().__init__()
        width = config.width
        self.drop_path = drop_path
        self.attn = SelfAttention(width, config.heads, config.l2_norm_attention)
        self.ffn = FeedForward(width, round(width * config.mlp_ratio))
        if config.shared_adaln:
            self.ada_gss = nn.Parameter(torch.empty(1, 1, 6, width))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def modulation(self, cond_BD: Tensor, shared_B16C: Tensor | None) -> Tensor:
        """Gains, scales and shifts of this block, (B, 1, 6, C)."""
        if shared_B16C is not None:
            return self.ada_gss + shared_B16C  # d36: a learned offset for each block on one shared projection
        return cast(Tensor, self.ada_lin(cond_BD)).view(-1, 1, 6, cond_BD.shape[-1])

    def forward(self, x_BlC: Tensor, modulation_B16C: Tensor, context: Scales | LayerCache) -> Tensor:
        gain1, gain2, scale1, scale2, shift1, shift2 = modulation_B16C.unbind(2)
        x_BlC = gated(x_BlC, self.attn(modulated(x_BlC, scale1, shift1), context), self._drop(gain1))
        return gated(x_BlC, self.ffn(modulated(x_BlC, scale2, shift2)), self._drop(gain2))

    def _drop(self, gain_B1C: Tensor) -> Tensor:
        """The gain of a branch, of which DropPath makes 0 for some images."""
        if not self.training or self.drop_path == 0.0:
            return gain_B1C
        keep = 1.0 - self.drop_path
        kept_B11 = gain_B1C.new_empty(gain_B1C.shape[0], 1, 1).bernoulli_(keep)
        return gain_B1C * (kept_B11 / keep)


class HeadNorm(nn.Module):
    """The AdaLN before the head: scale and shift only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def modulation(self, cond_BD: Tensor) -> Tensor:
        """Scale and shift, (B, 1, 2, C)."""
        return cast(Tensor, self.ada_lin(cond_BD)).view(-1, 1, 2, cond_BD.shape[-1])

    def forward(self, x_BlC: Tensor, modulation_B12C: Tensor) -> Tensor:
        scale_B1C, shift_B1C = modulation_B12C.unbind(2)
        return modulated(x_BlC, scale_B1C, shift_B1C)


class VAR(nn.Module):
    """Logits over the tokens of every scale, given the label and the coarser scales.

    Args:
        config: the shape of the model.
        drop_path: probability in [0, 1) of skipping a branch of the last block, rising linearly from 0 at the first;
            in train mode only. Reinforcement learning leaves it at 0.

    Attributes:
        checkpoint_activations: whether a block's activations are computed again in the backward pass, not kept: less
            memory, more time, the same gradients. Off at first; sampling never keeps any.
        skip_masked: whether attention over all scales leaves out what is masked, which is faster and the same but for
            rounding. On at first.

    Raises:
        ValueError: `drop_path` is out of range.
    """

    lvl_1L: Tensor
    attn_bias_for_masking: Tensor

    def __init__(self, config: VARConfig, *, drop_path: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"drop_path is {drop_path}; it must be in [0, 1)")
        self.config = config
        self.checkpoint_activations = False
        self.skip_masked = True
        width, length, sides = config.width, config.length, config.patch_nums
        self.word_embed = nn.Linear(config.latent_channels, width)
        self.class_emb = nn.Embedding(config.num_classes + 1, width)
        self.pos_start = nn.Parameter(torch.empty(1, sides[0] ** 2, width))
        self.pos_1LC = nn.Parameter(torch.empty(1, length, width))
        self.lvl_embed = nn.Embedding(len(sides), width)
        if config.shared_adaln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        rates = [drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.head_nm = HeadNorm(width)
        self.head = nn.Linear(width, config.vocab_size)

        level_L = torch.tensor([scale for scale, side in enumerate(sides) for _ in range(side * side)])
        visible_LL = level_L[:, None] >= level_L[None, :]
        bias_LL = torch.zeros(length, length).masked_fill(~visible_LL, -math.inf)
        self.register_buffer("lvl_1L", level_L[None])
        self.register_buffer("attn_bias_for_masking", bias_LL[None, None])
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """The published initialisation: near-identity blocks, and logits that start near zero."""
        config, normal = self.config, nn.init.normal_
        std = math.sqrt(1 / config.width / 3)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                normal(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        normal(self.pos_start, std=std)
        normal(self.pos_1LC, std=std)
        normal(self.head.weight, std=0.02 * std)
        normal(cast(nn.Linear, self.head_nm.ada_lin[1]).weight, std=0.5 * std)
        for block in cast(list[Block], self.blocks):
            normal(block.attn.proj.weight, std=std / math.sqrt(2 * config.depth))
            normal(block.ffn.fc2.weight, std=std / math.sqrt(2 * config.depth))
            if config.shared_adaln:
                normal(block.ada_gss[:, :, :2], std=1e-5 / math.sqrt(config.width))
                normal(block.ada_gss[:, :, 2:], std=0.5 / math.sqrt(config.width))
            else:
                weight_FC = cast(nn.Linear, block.ada_lin[1]).weight
                normal(weight_FC[: 2 * config.width], std=1e-5 * std)
                normal(weight_FC[2 * config.width :], std=0.5 * std)

    def compile_blocks(self) -> None:
        """Have `torch.compile` fuse what a block does, from its first call on; nothing changes, but for rounding.

        One graph serves all blocks. There is one for each scale in sampling and for each batch size, and each takes
        seconds to make. It needs a C++ compiler on a CPU.
        """
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_SHAPES)
        for block in self.blocks:
            block.compile(dynamic=False)

    def drop_labels(self, labels_B: Tensor, rate: float, generator: torch.Generator) -> Tensor:
        """Labels of which a share is replaced by the unconditional one: for pre-training, and nowhere else.

        Args:
            labels_B: int64 (B,).
            rate: probability in [0, 1] of replacing a label.
            generator: source of the draws, on any device.

        Returns:
            int64 (B,) on the device of `labels_B`.
        """
        draws_B = torch.rand(labels_B.shape, generator=generator, device=generator.device)
        return torch.where(draws_B.to(labels_B.device) < rate, self.config.num_classes, labels_B)

    def modulate(self, cond_BD: Tensor) -> Modulation:
        """The AdaLN terms of every layer for class embeddings (B, D)."""
        shared_B16C = None
        if self.config.shared_adaln:
            shared_B16C = self.shared_ada_lin(cond_BD).view(-1, 1, 6, cond_BD.shape[-1])
        blocks = [cast(Block, block).modulation(cond_BD, shared_B16C) for block in self.blocks]
        return Modulation(tuple(blocks), self.head_nm.modulation(cond_BD))

    def forward(self, labels_B: Tensor, var_input_BLmC: Tensor) -> Tensor:
        """Teacher-forced logits: position p sees the label and all tokens of coarser scales than its own.

        Args:
            labels_B: int64 (B,), 0 … num_classes (the last is unconditional).
            var_input_BLmC: float (B, L - l_1, Cvae), what the quantizer makes of the tokens of all scales but the last.

        Returns:
            Logits (B, L, V), in the dtype that autocast or the weights give.
        """
        cond_BD = self.class_emb(labels_B)
        first_BlC = cond_BD[:, None] + self.pos_start
        later_BLmC = self.word_embed(var_input_BLmC.to(self.word_embed.weight.dtype))
        x_BLC = torch.cat((first_BlC, later_BLmC.to(first_BlC.dtype)), dim=1)
        x_BLC = x_BLC + self.lvl_embed(self.lvl_1L) + self.pos_1LC
        modulation = self.modulate(cond_BD)
        scales = Scales(self.attn_bias_for_masking, part_ends(self.config.offsets) if self.skip_masked else None)
        recompute = self.checkpoint_activations and torch.is_grad_enabled()
        for block, modulation_B16C in zip(self.blocks, modulation.blocks, strict=True):
            arguments = (x_BLC, modulation_B16C, scales)
            if recompute:
                # Only DropPath draws numbers; to save the generator's state makes a GPU wait.
                draws = bool(block.training and block.drop_path)
                x_BLC = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=draws)
            else:
                x_BLC = block(*arguments)
        return cast(Tensor, self.head(self.head_nm(x_BLC, modulation.head_B12C)))

    @torch.no_grad()
    def start(self, labels_B: Tensor) -> Cache:
        """Begins sampling: embeds the labels and allocates room for the keys and values of all L positions.

        Args:
            labels_B: int64 (B,), 0 … num_classes (the last is unconditional), on the model's device.

        Returns:
            The state that `step` fills, scale by scale. Its dtype is autocast's where that is on.
        """
        config = self.config
        cond_BD: Tensor = self.class_emb(labels_B)
        device = cond_BD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else cond_BD.dtype
        shape = (labels_B.shape[0], config.heads, config.length, config.width // config.heads)
        keys = tuple(cond_BD.new_empty(shape, dtype=dtype) for _ in range(config.depth))
        values = tuple(cond_BD.new_empty(shape, dtype=dtype) for _ in range(config.depth))
        return Cache(cond_BD, self.modulate(cond_BD), keys, values)

    @torch.no_grad()
    def step(self, scale: int, input_BlC: Tensor | None, cache: Cache) -> Tensor:
        """Logits of one scale; call it for the scales 0 … S - 1 in order.

        Args:
            scale: index of the scale.
            input_BlC: float (B, l, Cvae), what the quantizer makes of the tokens so far; None at scale 0.
            cache: from `start`; the scale's keys and values are written to it.

        Returns:
            Logits (B, l, V), equal to the scale's rows of `forward`.

        Raises:
            ValueError: `scale` is out of range, or the input does not fit it.
        """
        begin, end = self._span(scale, input_BlC)
        if input_BlC is None:
            x_BlC = cache.cond_BD[:, None] + self.pos_start
        else:
            x_BlC = self.word_embed(input_BlC.to(self.word_embed.weight.dtype)).to(cache.cond_BD.dtype)
        x_BlC = x_BlC + self.lvl_embed(self.lvl_1L[:, begin:end]) + self.pos_1LC[:, begin:end]
        layers = zip(self.blocks, cache.modulation.blocks, cache.keys, cache.values, strict=True)
        for block, modulation_B16C, keys_BHLc, values_BHLc in layers:
            x_BlC = block(x_BlC, modulation_B16C, LayerCache(keys_BHLc, values_BHLc, begin, end))
        return cast(Tensor, self.head(self.head_nm(x_BlC, cache.modulation.head_B12C)))

    def _span(self, scale: int, input_BlC: Tensor | None) -> tuple[int, int]:
        scales = len(self.config.patch_nums)
        if not 0 <= scale < scales:
            raise ValueError(f"scale is {scale}; this model has the scales 0 … {scales - 1}")
        begin, end = self.config.offsets[scale : scale + 2]
        given, wanted = 0 if input_BlC is None else input_BlC.shape[1], 0 if scale == 0 else end - begin
        if given != wanted:
            raise ValueError(f"the input of scale {scale} has {given} positions; it must have {wanted}")
        return begin, end
