"""Multi-scale residual vector quantizer of VAR (arXiv 2404.02905, Algorithms 1 and 2).

Shape legend: B images · C latent channels (Cvae) · H, W side of the latent map · h, w side of one scale · l = h·w ·
L all tokens of an image, scales concatenated · V vocabulary · m as in "BLmC": L minus the first scale.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualConv(nn.Conv2d):
    """3×3 convolution mixed with its input, ``(1 − ratio)·h + ratio·conv(h)``: the φ of the paper."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__(channels, channels, kernel_size=3, padding=1)
        self.ratio = ratio

    def forward(self, h_BCHW: Tensor) -> Tensor:
        return (1 - self.ratio) * h_BCHW + self.ratio * super().forward(h_BCHW)


class SharedResidualConvs(nn.Module):
    """A few φ shared by all scales: each scale takes the one nearest to its relative position."""

    def __init__(self, channels: int, count: int, num_scales: int, ratio: float) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(ResidualConv(channels, ratio) for _ in range(count))
        # The official ticks: four convolutions sit a third of a cell from the ends, any other number half a cell.
        inset = (1 / 3 if count == 4 else 1 / 2) / count
        ticks = np.linspace(inset, 1 - inset, count)
        self._of_scale = [int(np.abs(ticks - k / max(num_scales - 1, 1)).argmin()) for k in range(num_scales)]

    def forward(self, h_BCHW: Tensor, scale: int) -> Tensor:
        out: Tensor = self.qresi_ls[self._of_scale[scale]](h_BCHW)
        return out


class Quantized(NamedTuple):
    """What one training pass of the quantizer returns."""

    f_hat_BCHW: Tensor  # straight-through: the value is quantized, the gradient is the encoder's
    loss: Tensor  # scalar: codebook and commitment terms, mean over scales
    tokens_BL: Tensor  # int64
    residuals: list[Tensor]  # for each scale (B·l, C): the vectors that were looked up


class MultiScaleQuantizer(nn.Module):
    """Turns a latent map into token maps of growing size and back.

    Args:
        vocab_size: V, number of codes.
        channels: C, width of a code.
        patch_nums: side of each scale's token map, ascending; the last is the side of the latent map.
        share_quant_resi: number of φ convolutions shared by the scales.
        residual_ratio: weight of the convolution inside φ.
        commitment: weight of the term that pulls the encoder towards the codes.
    """

    def __init__(
        self,
        vocab_size: int,
        channels: int,
        patch_nums: tuple[int, ...],
        *,
        share_quant_resi: int = 4,
        residual_ratio: float = 0.5,
        commitment: float = 0.25,
    ) -> None:
        super().__init__()
        self.patch_nums = patch_nums
        self.commitment = commitment
        self.embedding = nn.Embedding(vocab_size, channels)
        self.quant_resi = SharedResidualConvs(channels, share_quant_resi, len(patch_nums), residual_ratio)
        # Part of the official checkpoints (a usage count kept while training); unused here.
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(patch_nums), vocab_size))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each scale."""
        return tuple(side * side for side in self.patch_nums)

    def nearest(self, z_NC: Tensor) -> Tensor:
        """Index of the closest code in Euclidean distance, int64 (N,)."""
        codes_VC = self.embedding.weight
        distance_NV = torch.addmm(codes_VC.square().sum(dim=1), z_NC, codes_VC.t(), alpha=-2)
        return distance_NV.argmin(dim=1)

    def _upsampled(self, scale: int, tokens_Bl: Tensor) -> Tensor:
        """The contribution of one scale to the latent map, (B, C, H, W)."""
        side, full = self.patch_nums[scale], self.patch_nums[-1]
        h_BlC: Tensor = self.embedding(tokens_Bl)
        h_BChw = h_BlC.transpose(1, 2).reshape(len(tokens_Bl), -1, side, side)
        if side != full:
            h_BChw = F.interpolate(h_BChw, size=(full, full), mode="bicubic")
        out: Tensor = self.quant_resi(h_BChw, scale)
        return out

    def next_input(self, scale: int, f_hat_BCHW: Tensor, tokens_Bl: Tensor) -> tuple[Tensor, Tensor | None]:
        """Adds one sampled scale to the running latent map.

        Args:
            scale: index of the scale the tokens belong to.
            f_hat_BCHW: sum of the earlier scales; zeros before the first.
            tokens_Bl: int64 (B, l), the tokens of this scale.

        Returns:
            The new sum (B, C, H, W) and the input of the next scale (B, l_next, C), None after the last.
        """
        f_hat_BCHW = f_hat_BCHW + self._upsampled(scale, tokens_Bl)
        if scale + 1 == len(self.patch_nums):
            return f_hat_BCHW, None
        side = self.patch_nums[scale + 1]
        return f_hat_BCHW, F.interpolate(f_hat_BCHW, size=(side, side), mode="area").flatten(2).transpose(1, 2)

    def embed_scales(self, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Rebuilds the latent map and the teacher-forcing input from all tokens.

        Args:
            tokens_BL: int64 (B, L).

        Returns:
            The latent map (B, C, H, W) and the transformer's input for scales 2…K, (B, L−1, C) when the first scale
            has one token.
        """
        side = self.patch_nums[-1]
        weight = self.embedding.weight
        f_hat_BCHW = weight.new_zeros(len(tokens_BL), weight.shape[1], side, side)
        inputs: list[Tensor] = []
        for scale, tokens_Bl in enumerate(tokens_BL.split(self.lengths, dim=1)):
            f_hat_BCHW, next_BlC = self.next_input(scale, f_hat_BCHW, tokens_Bl)
            if next_BlC is not None:
                inputs.append(next_BlC)
        return f_hat_BCHW, torch.cat(inputs, dim=1)

    def _scale_residual(self, scale: int, rest_BCHW: Tensor) -> Tensor:
        """The part not yet explained, averaged to the scale's size: (B·l, C)."""
        side = self.patch_nums[scale]
        if side != self.patch_nums[-1]:
            rest_BCHW = F.interpolate(rest_BCHW, size=(side, side), mode="area")
        return rest_BCHW.permute(0, 2, 3, 1).flatten(0, 2)

    @torch.no_grad()
    def encode(self, f_BCHW: Tensor) -> Tensor:
        """Token indices of a latent map, greedily scale after scale: int64 (B, L)."""
        rest_BCHW = f_BCHW
        tokens: list[Tensor] = []
        for scale in range(len(self.patch_nums)):
            tokens_Bl = self.nearest(self._scale_residual(scale, rest_BCHW)).view(len(f_BCHW), -1)
            rest_BCHW = rest_BCHW - self._upsampled(scale, tokens_Bl)
            tokens.append(tokens_Bl)
        return torch.cat(tokens, dim=1)

    def forward(self, f_BCHW: Tensor) -> Quantized:
        """One training pass: quantize, and the losses that train codes, φ and encoder (paper, Eq. 5)."""
        f_hat_BCHW = torch.zeros_like(f_BCHW)
        loss = f_BCHW.new_zeros(())
        tokens: list[Tensor] = []
        residuals: list[Tensor] = []
        for scale in range(len(self.patch_nums)):
            residual_NC = self._scale_residual(scale, (f_BCHW - f_hat_BCHW).detach())
            tokens_Bl = self.nearest(residual_NC).view(len(f_BCHW), -1)
            f_hat_BCHW = f_hat_BCHW + self._upsampled(scale, tokens_Bl)
            loss = loss + F.mse_loss(f_hat_BCHW, f_BCHW.detach())
            loss = loss + self.commitment * F.mse_loss(f_BCHW, f_hat_BCHW.detach())
            tokens.append(tokens_Bl)
            residuals.append(residual_NC)
        straight_through = f_BCHW + (f_hat_BCHW - f_BCHW).detach()
        return Quantized(straight_through, loss / len(self.patch_nums), torch.cat(tokens, dim=1), residuals)
