"""ViT-L/14 at its full size with random weights, and a random head over it, for whoever serves them."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from services.rewards.openclip import create_model
from tests.services.rewards.test_head import layers

MODEL = "ViT-L-14-quickgelu"
ON_A_CPU = {"REWARD_MAX_BATCH": "4", "REWARD_SCORE_TIMEOUT_S": "120"}
"""What a service needs where an image takes about a second."""


def make_model() -> nn.Module:
    """Half-precision numbers in float32, so that files in half precision hold the very same."""
    torch.manual_seed(0)
    return create_model(MODEL, {}).eval().half().float()


def save_model(model: nn.Module, folder: Path) -> Path:
    """Its weights in half precision, in open_clip's layout."""
    save_file({name: entry.half() for name, entry in model.state_dict().items()}, folder / "open_clip.safetensors")
    return folder / "open_clip.safetensors"


def save_head(folder: Path) -> Path:
    """A random head in the published shape."""
    torch.save(layers(), folder / "head.pth")
    return folder / "head.pth"


def environment(weights: Path, head: Path) -> dict[str, str]:
    """The settings of a `clip` and an `aesthetic` over these files."""
    return {
        "REWARD_CLIP_WEIGHTS": str(weights),
        "REWARD_AESTHETIC_WEIGHTS": str(weights),
        "REWARD_AESTHETIC_HEAD": str(head),
    }
