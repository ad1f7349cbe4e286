"""CLIP ViT-L/14 at its full size with random weights: its cost is the real one's, its scores mean nothing."""

from pathlib import Path

import torch

VIT_L_14 = "ViT-L-14-quickgelu"


def write_vit_l_14(folder: Path) -> Path:
    """Write the weights, always alike, in half precision (0.9 GB); return the safetensors file."""
    from safetensors.torch import save_file  # noqa: PLC0415 - where it is asked for

    from services.rewards.openclip import create_model  # noqa: PLC0415

    path = folder / "vit_l_14.safetensors"
    torch.manual_seed(0)
    save_file({name: entry.half() for name, entry in create_model(VIT_L_14, {}).state_dict().items()}, path)
    return path
