"""Supervised pre-training of the miniature's VAR: the policy that reinforcement learning starts from.

Shape legend: N images · B a batch · L tokens · Lm = L minus the first scale.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from trainer.miniature.fitting import Fitted, Schedule, batch_indices, fit
from trainer.miniature.objects import CLASSES
from trainer.miniature.tokenizer import CONFIG as TOKENIZER
from trainer.miniature.tokenizer import to_float
from trainer.models.var import VAR, VARConfig
from trainer.models.vqvae import VQVAE

CONFIG = VARConfig(
    depth=4,
    width=160,
    heads=5,
    patch_nums=TOKENIZER.patch_nums,
    vocab_size=TOKENIZER.vocab_size,
    latent_channels=TOKENIZER.z_channels,
    num_classes=len(CLASSES),
)
SCHEDULE = Schedule(steps=7000, batch=32, lr=2.5e-3, muon_lr=0.02, weight_decay=0.02)
LABEL_DROPOUT = 0.1  # so that guidance has an unconditional half to lean on


@torch.no_grad()
def tokenize(vqvae: VQVAE, images: NDArray[np.uint8], *, batch: int = 64) -> Tensor:
    """Token indices int64 (N, L) of uint8 images (N, H, W, 3)."""
    device = vqvae.quantize.embedding.weight.device
    starts = range(0, len(images), batch)
    return torch.cat([vqvae.encode_tokens(to_float(images[s : s + batch]).to(device)).cpu() for s in starts])


def train(
    vqvae: VQVAE,
    tokens_NL: Tensor,
    labels_N: Tensor,
    *,
    seed: int,
    state: Path,
    device: torch.device,
    schedule: Schedule = SCHEDULE,
) -> Fitted[VAR]:
    """Trains the transformer by teacher forcing on tokens int64 (N, L) and labels (N,); `vqvae` is on `device`."""
    torch.manual_seed(seed)

    def loss(model: VAR, step: int) -> Tensor:
        rows = torch.from_numpy(batch_indices(seed, step, len(tokens_NL), schedule.batch))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        labels_B = model.drop_labels(labels_N[rows], LABEL_DROPOUT, generator).to(device)
        with torch.no_grad():
            tokens_BL = tokens_NL[rows].to(device)
            _, var_input_BLmC = vqvae.quantize.embed_scales(tokens_BL)
        logits_BLV = model(labels_B, var_input_BLmC)
        return F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL.flatten())

    model = VAR(CONFIG)
    blocks = [name for name, weight in model.named_parameters() if name.startswith("blocks.") and weight.dim() == 2]
    matrices = [name for name in blocks if "ada_lin" not in name]  # of attention and feed-forward
    return fit("var", model, loss, schedule, state=state, device=device, muon_names=matrices)
