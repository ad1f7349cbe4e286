"""Floating-point operations of the models, a multiply-add counted as two. d16: 0.30 TFLOP a forward, 0.39 a decode."""

from itertools import pairwise

import torch
from torch.utils.flop_counter import FlopCounterMode

from trainer.models.var import VARConfig
from trainer.models.vqvae import VQVAE, VQVAEConfig


def forward_flop(config: VARConfig) -> float:
    """One image through the transformer, all scales, each attending to itself and the coarser ones; AdaLN once."""
    width, length = config.width, config.length
    hidden = round(width * config.mlp_ratio)
    visible = sum((end - start) * end for start, end in pairwise(config.offsets))
    block = 2 * length * (4 * width**2 + 2 * width * hidden) + 2 * 2 * width * visible
    modulation = 2 * 6 * width**2 * (1 if config.shared_adaln else config.depth) + 2 * 2 * width**2
    ends = 2 * length * width * (config.latent_channels + config.vocab_size)
    return float(config.depth * block + modulation + ends)


def decode_flop(config: VQVAEConfig) -> float:
    """One latent map through the decoder, counted by running it without numbers."""
    side = config.patch_nums[-1]
    with torch.device("meta"):
        vqvae, f_hat_BCHW = VQVAE(config), torch.empty(1, config.z_channels, side, side)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vqvae.decode(f_hat_BCHW)
    return float(counter.get_total_flops())


def step_flop(var: VARConfig, vqvae: VQVAEConfig, *, reference: bool, epochs: int = 1) -> float:
    """One image through a step: sample, decode, reference, and forward and backward (two forwards) an epoch."""
    return forward_flop(var) * (1 + reference + 3 * epochs) + decode_flop(vqvae)
