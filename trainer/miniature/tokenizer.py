"""Pre-training of the miniature's VQVAE: first as a plain autoencoder, then with its codes."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from trainer.miniature.fitting import Fitted, Schedule, batch_indices, fit
from trainer.models.vqvae import VQVAE, VQVAEConfig

CONFIG = VQVAEConfig(
    vocab_size=512,
    z_channels=16,
    ch=8,
    ch_mult=(1, 2, 6, 8),
    num_res_blocks=1,
    patch_nums=(1, 2, 3, 4, 6, 8),
    norm_groups=4,
)
SCHEDULE = Schedule(steps=7000, batch=16, lr=3e-3)
PLAIN_SHARE = 0.12  # of the steps are spent without quantizing
REVIVE_EVERY = 20  # steps
DEAD_BELOW = 0.05  # expected uses a step under which a code is moved to where it is needed


def to_float(images_BHW3: NDArray[np.uint8]) -> Tensor:
    """uint8 (B, H, W, 3) → float32 (B, 3, H, W) in [−1, 1]."""
    return torch.from_numpy(images_BHW3).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def psnr(images_B3HW: Tensor, others_B3HW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, (B,); both in [−1, 1]."""
    mse_B = (images_B3HW - others_B3HW).square().mean(dim=(1, 2, 3)) / 4
    return -10 * torch.log10(mse_B.clamp_min(1e-10))


def _distance(restored_B3HW: Tensor, images_B3HW: Tensor) -> Tensor:
    return F.mse_loss(restored_B3HW, images_B3HW) + 0.2 * F.l1_loss(restored_B3HW, images_B3HW)


class CodeKeeper:
    """Places the codes at the start, and moves those that nothing uses onto vectors that are badly served.

    It keeps a running count of uses a step. The count starts afresh after a resumption, so that a resumed training
    revives other codes than one that was never interrupted.
    """

    def __init__(self, vqvae: VQVAE, seed: int) -> None:
        self.embedding = vqvae.quantize.embedding
        self.uses_V = torch.ones_like(self.embedding.weight[:, 0])
        self.seed = seed

    @torch.no_grad()
    def place(self, vqvae: VQVAE, images_B3HW: Tensor) -> None:
        """k-means over the residuals of every scale, scale after scale, so that each sees the codes before it."""
        latents = vqvae.latents(images_B3HW)
        weight = self.embedding.weight
        for round_ in range(3):  # the residuals of fine scales depend on the codes of coarse ones
            residuals = torch.cat(vqvae.quantize(latents).residuals)
            weight.copy_(residuals[self._pick(len(residuals), len(weight), round_)])
            for _ in range(10):
                nearest_N = vqvae.quantize.nearest(residuals)
                counts_V = torch.bincount(nearest_N, minlength=len(weight)).float()
                sums_VC = torch.zeros_like(weight).index_add_(0, nearest_N, residuals)
                used = counts_V > 0
                weight[used] = sums_VC[used] / counts_V[used, None]

    def _pick(self, count: int, wanted: int, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return torch.randint(count, (wanted,), generator=generator).to(self.uses_V.device)

    @torch.no_grad()
    def revive(self, step: int, tokens_BL: Tensor, residuals: list[Tensor]) -> None:
        """Counts one step's uses; now and then moves dead codes onto residuals of this step."""
        counts_V = torch.bincount(tokens_BL.flatten(), minlength=len(self.uses_V)).float()
        self.uses_V.mul_(0.98).add_(counts_V, alpha=0.02)
        dead = (self.uses_V < DEAD_BELOW).nonzero()[:, 0]
        if step % REVIVE_EVERY or not len(dead):
            return
        pool = torch.cat(residuals)
        self.embedding.weight[dead] = pool[self._pick(len(pool), len(dead), step)]
        self.uses_V[dead] = 0.5


def train(
    images: NDArray[np.uint8], *, seed: int, state: Path, device: torch.device, schedule: Schedule = SCHEDULE
) -> Fitted[VQVAE]:
    """Trains the tokenizer on uint8 images (N, 64, 64, 3)."""
    torch.manual_seed(seed)
    vqvae = VQVAE(CONFIG).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    keeper = CodeKeeper(vqvae, seed)
    plain_steps = int(PLAIN_SHARE * schedule.steps)

    def batch_of(step: int, count: int) -> Tensor:
        return to_float(images[batch_indices(seed, step, len(images), count)]).to(device)

    def loss(model: VQVAE, step: int) -> Tensor:
        images_B3HW = batch_of(step, schedule.batch)
        if step < plain_steps:
            latents = model.latents(images_B3HW)
            return _distance(model.reconstruct(latents), images_B3HW) + 1e-3 * latents.square().mean()
        if step == plain_steps:
            keeper.place(model, batch_of(step, 256))
        restored, quantized = model(images_B3HW)
        keeper.revive(step, quantized.tokens_BL, quantized.residuals)
        total: Tensor = _distance(restored, images_B3HW) + 0.5 * quantized.loss
        return total

    return fit("vqvae", vqvae, loss, schedule, state=state, device=device)
