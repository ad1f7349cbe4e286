"""Agreement of token indices, where float error cannot decide between two codes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.models.vqvae import VQVAE

MARGIN = 1e-3


@torch.no_grad()
def clear_positions(vqvae: VQVAE, images_B3hw: Tensor, tokens_BL: Tensor) -> Tensor:
    """Where the nearest code is nearer than the second by more than the margin, given the coarser scales' tokens."""
    f_BCHW = vqvae.latents(images_B3hw)
    f_hat_BCHW = torch.zeros_like(f_BCHW)
    begin, clear = 0, []
    for scale, side in enumerate(vqvae.config.patch_nums):
        rest_BChw = F.interpolate(f_BCHW - f_hat_BCHW, size=(side, side), mode="area")
        distance_BlV = torch.cdist(rest_BChw.flatten(2).transpose(1, 2), vqvae.quantize.embedding.weight[None]) ** 2
        nearest_Bl2 = distance_BlV.topk(2, dim=-1, largest=False).values
        clear.append(nearest_Bl2[..., 1] - nearest_Bl2[..., 0] > MARGIN)
        f_hat_BCHW, _ = vqvae.quantize.next_input(scale, f_hat_BCHW, tokens_BL[:, begin : begin + side * side])
        begin += side * side
    return torch.cat(clear, dim=1)
