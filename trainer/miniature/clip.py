"""Pre-training of the miniature's CLIP on pictures of all styles and their captions.

Captions are shortened at random, so one may be true of several pictures of a batch; each of them then counts as a
match, as in UniCL (Yang et al. 2022, arXiv 2204.03610). Shape legend: N pictures · B a batch · T texts · 3HW RGB.
"""

from pathlib import Path
from typing import cast

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from open_clip import CLIP
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor

from services.rewards.openclip import MINIATURE, create_model
from trainer.miniature.captions import describes, sentence, shortened, vocabulary
from trainer.miniature.fitting import Fitted, Schedule, batch_indices, fit

SCHEDULE = Schedule(steps=2500, batch=128, lr=2e-3, warmup=100, weight_decay=0.02, ema=0.995)
KEEP = (0.65, 0.8, 0.4, 0.4, 0.45, 0.45)  # how often each of `captions.KINDS` is said
LARGEST_SCALE = 4.6052  # ln 100, the bound of CLIP (Radford et al. 2021, §2.5)
EMBEDDING = "token_embedding.weight"
RINGING = (-0.6, 0.8)  # from softened edges to fringed ones, as a decoder leaves them


def normalised(images_BHW3: NDArray[np.uint8]) -> Tensor:
    """uint8 (B, H, W, 3) → float32 (B, 3, H, W), less CLIP's mean, over its deviation."""
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    return (torch.from_numpy(images_BHW3).permute(0, 3, 1, 2).float().div_(255) - mean) / deviation


def _ring(images_B3HW: Tensor, generator: torch.Generator) -> Tensor:
    low, high = RINGING
    amount_B111 = low + (high - low) * torch.rand(len(images_B3HW), 1, 1, 1, generator=generator)
    blurred = F.avg_pool2d(images_B3HW, 5, stride=1, padding=2, count_include_pad=False)
    return images_B3HW + amount_B111 * (images_B3HW - blurred)


def matched_loss(images_BC: Tensor, texts_TC: Tensor, scale: Tensor, matches_TB: Tensor) -> Tensor:
    """Cross-entropy of each text over the pictures it describes, and of each picture over its texts.

    Args:
        images_BC: unit vectors, float32.
        texts_TC: unit vectors, float32.
        scale: of the cosines.
        matches_TB: bool; no row and no column is all False.

    Returns:
        The mean of both directions (arXiv 2204.03610, eq. 3).
    """
    logits_TB = scale * texts_TC @ images_BC.T
    of_text = matches_TB / matches_TB.sum(dim=1, keepdim=True)
    of_image = matches_TB / matches_TB.sum(dim=0, keepdim=True)
    by_text = F.cross_entropy(logits_TB, of_text)
    by_image = F.cross_entropy(logits_TB.T, of_image.T)
    return (by_text + by_image) / 2


def train(
    images: NDArray[np.uint8],
    traits_NK: NDArray[np.int64],
    *,
    seed: int,
    state: Path,
    device: torch.device,
    schedule: Schedule = SCHEDULE,
) -> Fitted[CLIP]:
    """Trains the two towers.

    Args:
        images: uint8 (N, H, W, 3).
        traits_NK: int64 (N, 6), what may be said of them (`trainer.miniature.captions`).
        seed: of weights, batches, captions and augmentation.
        state: file that the run is saved to and resumed from.
        device: where it is trained.
        schedule: length and rates.
    """
    torch.manual_seed(seed)
    model = cast(CLIP, create_model(MINIATURE.stem, {}))
    tokenize = open_clip.get_tokenizer(MINIATURE.stem)

    def loss(model: CLIP, step: int) -> Tensor:
        rows = batch_indices(seed, step, len(images), schedule.batch)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        texts_BK = shortened(traits_NK[rows], KEEP, np.random.default_rng((seed, step, 1)))
        matches_BB = torch.from_numpy(describes(texts_BK, traits_NK[rows])).float().to(device)
        tokens = tokenize([sentence(traits) for traits in texts_BK]).to(device)
        pictures = _ring(normalised(images[rows]), generator).to(device)
        with torch.no_grad():
            model.logit_scale.clamp_(max=LARGEST_SCALE)
        images_BC = model.encode_image(pictures, normalize=True)
        texts_BC = model.encode_text(tokens, normalize=True)
        return matched_loss(images_BC, texts_BC, model.logit_scale.exp(), matches_BB)

    return fit("clip", model, loss, schedule, state=state, device=device)


def stored(model: CLIP, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dict as it is kept: parameters in `dtype`, running statistics as they are.

    Words that no caption holds were never trained. They are zeros, so that a prompt with such a word means what the
    rest of it means.
    """
    parameters = {name for name, _ in model.named_parameters()}
    weights = {name: entry.detach().cpu() for name, entry in model.state_dict().items()}
    untrained = torch.ones(len(weights[EMBEDDING]), dtype=torch.bool)
    untrained[open_clip.get_tokenizer(MINIATURE.stem)(vocabulary()).unique()] = False
    weights[EMBEDDING] = weights[EMBEDDING].masked_fill(untrained[:, None], 0)
    return {name: (entry.to(dtype) if name in parameters else entry).contiguous() for name, entry in weights.items()}
