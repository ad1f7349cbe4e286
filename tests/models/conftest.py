"""The small pair of models that the golden files describe."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.models.fill import fill
from trainer.models.var import VAR, VARConfig
from trainer.models.vqvae import VQVAE, VQVAEConfig

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = VARConfig(depth=2, width=128, heads=2, patch_nums=(1, 2, 3, 4), vocab_size=64, latent_channels=8, num_classes=10)


def load_golden(name: str) -> dict[str, Tensor]:
    """The arrays of one golden file."""
    with np.load(GOLDEN / name) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


@pytest.fixture(scope="session")
def golden() -> dict[str, Tensor]:
    return load_golden("tiny.npz")


@pytest.fixture(scope="session")
def var() -> VAR:
    """The tiny transformer with the golden weights; shared, so tests leave its weights alone."""
    model = VAR(TINY)
    fill(model)
    return model.eval()


@pytest.fixture(scope="session")
def vqvae() -> VQVAE:
    """The tiny tokenizer with the golden weights; shared, so tests leave its weights alone."""
    model = VQVAE(VQVAEConfig(vocab_size=64, z_channels=8, ch=32, patch_nums=(1, 2, 3, 4)))
    fill(model)
    return model.eval().requires_grad_(False)
