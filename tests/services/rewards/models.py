"""Small models in open_clip's registry, and pictures, for the tests of the rewards."""

import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from torch import nn

from services.rewards.openclip import create_model
from services.rewards.sources import Source, parse_source

SMALL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 56, "layers": 2, "width": 64, "head_width": 32, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
"""The shape of ViT-L/14, but small."""
SMALL_NAME = "small-vit"


def register(folder: Path) -> None:
    """Let open_clip know `small-vit` and `small-vit-quickgelu`."""
    for name, config in ((SMALL_NAME, SMALL), (f"{SMALL_NAME}-quickgelu", {**SMALL, "quick_gelu": True})):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(config))
        open_clip.add_model_config(path)


def random_model(name: str, seed: int = 0) -> nn.Module:
    """A model with weights from a seed."""
    torch.manual_seed(seed)
    return create_model(name, {}).eval()


def saved(model: nn.Module, path: Path) -> Source:
    """Its weights in a file, in open_clip's layout."""
    from safetensors.torch import save_file

    weights = {name: entry.contiguous() for name, entry in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path)
    return parse_source(str(path))


def photograph(height: int, width: int, *, seed: int = 0) -> NDArray[np.uint8]:
    """A picture with soft gradients, edges and a little grain, uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    base = 90 + 120 * np.stack([x, y, 0.5 * (1 - x + y)], axis=-1) * rng.uniform(0.4, 1, 3)
    image = Image.fromarray(base.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        left, top = rng.uniform(0, 0.8, 2) * (width, height)
        right, bottom = left + rng.uniform(0.1, 0.4) * width, top + rng.uniform(0.1, 0.4) * height
        draw.ellipse((left, top, right, bottom), fill=tuple(int(c) for c in rng.integers(0, 256, 3)))
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(max(height, width) / 256)), dtype=np.float64)
    return (pixels + rng.normal(0, 3, pixels.shape)).clip(0, 255).astype(np.uint8)


def noise(height: int, width: int, *, seed: int = 0) -> NDArray[np.uint8]:
    """Uniform noise, uint8 (H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
