"""VAR's image tokenizer: a convolutional encoder and decoder around the multi-scale quantizer (arXiv 2404.02905, §3.2).

The layout (names, shapes) is that of the official `vae_ch160v4096z32.pth`; the blocks are those of latent diffusion's
autoencoder (arXiv 2112.10752).

Shape legend: B images · L all tokens of an image · C latent channels · H, W side of the latent map ·
3hw an RGB image in [−1, 1].
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.quant import MultiScaleQuantizer, Quantized


@dataclass(frozen=True)
class VQVAEConfig:
    """Sizes of a tokenizer; the defaults are the published `vae_ch160v4096z32`.

    Args:
        vocab_size: number of codes.
        z_channels: width of a code (Cvae).
        ch: channels at full resolution.
        ch_mult: channel multiplier of each level; each level but the last halves the resolution.
        num_res_blocks: residual blocks a level (the decoder has one more).
        patch_nums: side of each scale's token map, ascending.
        share_quant_resi: φ convolutions shared by the scales.
        norm_groups: groups of every GroupNorm.
    """

    vocab_size: int = 4096
    z_channels: int = 32
    ch: int = 160
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    share_quant_resi: int = 4
    norm_groups: int = 32

    @property
    def image_size(self) -> int:
        """Side of the image in pixels."""
        return self.patch_nums[-1] << (len(self.ch_mult) - 1)


class ResnetBlock(nn.Module):
    """Two normalised 3×3 convolutions with a skip connection."""

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = self.nin_shortcut(x) + h
        return out


class AttnBlock(nn.Module):
    """Single-head self-attention over the pixels of a map."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(B, 3, C, H * W).transpose(2, 3).unbind(dim=1)
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        out: Tensor = x + self.proj_out(h.transpose(1, 2).reshape(B, C, H, W))
        return out


class Downsample(nn.Module):
    """Halves the resolution; padded on the right and bottom only, as in the published weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Doubles the resolution: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Level(nn.Module):
    """The blocks of one resolution: residual (and at the coarsest level attention), then a change of resolution."""

    def __init__(
        self, in_channels: int, channels: int, blocks: int, norm_groups: int, *, attention: bool, resample: str | None
    ) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * (blocks - 1)
        self.block = nn.ModuleList(ResnetBlock(width, channels, norm_groups) for width in widths)
        self.attn = nn.ModuleList(AttnBlock(channels, norm_groups) for _ in range(blocks if attention else 0))
        if resample == "down":
            self.downsample = Downsample(channels)
        elif resample == "up":
            self.upsample = Upsample(channels)
        self._resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        if self._resample == "down":
            x = self.downsample(x)
        elif self._resample == "up":
            x = self.upsample(x)
        return x


def _middle(channels: int, norm_groups: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "block_1": ResnetBlock(channels, channels, norm_groups),
            "attn_1": AttnBlock(channels, norm_groups),
            "block_2": ResnetBlock(channels, channels, norm_groups),
        }
    )


class Encoder(nn.Module):
    """Image (B, 3, h, w) → latent map (B, C, H, W)."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        groups, levels = config.norm_groups, len(config.ch_mult)
        widths = [config.ch * m for m in (1, *config.ch_mult)]
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.down = nn.ModuleList(
            Level(
                widths[i],
                widths[i + 1],
                config.num_res_blocks,
                groups,
                attention=i == levels - 1,
                resample="down" if i < levels - 1 else None,
            )
            for i in range(levels)
        )
        self.mid = _middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        for block in self.mid.values():
            h = block(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out


class Decoder(nn.Module):
    """Latent map (B, C, H, W) → image (B, 3, h, w), not yet clamped."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        groups, levels = config.norm_groups, len(config.ch_mult)
        widths = [config.ch * m for m in config.ch_mult]
        above = [*widths[1:], widths[-1]]  # channels that come into each level from the coarser one
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = _middle(widths[-1], groups)
        self.up = nn.ModuleList(
            Level(
                above[i],
                widths[i],
                config.num_res_blocks + 1,
                groups,
                attention=i == levels - 1,
                resample="up" if i > 0 else None,
            )
            for i in range(levels)
        )
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        for block in self.mid.values():
            h = block(h)
        for level in reversed(self.up):
            h = level(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out


class VQVAE(nn.Module):
    """Image ↔ tokens. Built from a `VQVAEConfig`; frozen wherever reinforcement learning is concerned."""

    def __init__(self, config: VQVAEConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VQVAEConfig()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = MultiScaleQuantizer(
            config.vocab_size, config.z_channels, config.patch_nums, share_quant_resi=config.share_quant_resi
        )
        self.quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 3, padding=1)

    def latents(self, images_B3hw: Tensor) -> Tensor:
        """Latent map before quantization, (B, C, H, W), of images in [−1, 1]."""
        out: Tensor = self.quant_conv(self.encoder(images_B3hw))
        return out

    @torch.no_grad()
    def encode_tokens(self, images_B3hw: Tensor) -> Tensor:
        """Token indices int64 (B, L) of images float (B, 3, h, w) in [−1, 1]."""
        return self.quantize.encode(self.latents(images_B3hw))

    def decode(self, f_hat_BCHW: Tensor) -> Tensor:
        """Image (B, 3, h, w) in [−1, 1] of a quantized latent map (B, C, H, W); in memory the channels come last."""
        return self.reconstruct(f_hat_BCHW.contiguous(memory_format=torch.channels_last)).clamp(-1, 1)

    def reconstruct(self, f_BCHW: Tensor) -> Tensor:
        """As `decode`, without the clamp that would stop gradients: for pre-training."""
        out: Tensor = self.decoder(self.post_quant_conv(f_BCHW))
        return out

    def forward(self, images_B3hw: Tensor) -> tuple[Tensor, Quantized]:
        """Reconstruction and quantizer losses of one pre-training pass."""
        quantized = self.quantize(self.latents(images_B3hw))
        return self.reconstruct(quantized.f_hat_BCHW), quantized
