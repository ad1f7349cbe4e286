"""An encoder of the shape of ViT-B/32 with random weights: its cost is the real one's, its score means nothing.

Shape suffixes: B images of a batch, H height and W width in pixels, C = 3 channels, L tokens, D width.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

WIDTH, LAYERS, HEADS, PATCH, SIDE = 768, 12, 12, 32, 224


class Tower(nn.Module):
    """ViT-B/32: 49 patches and a class token, 12 pre-norm blocks of width 768."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.cls = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.places = nn.Parameter(0.02 * torch.randn(1, (SIDE // PATCH) ** 2 + 1, WIDTH))
        block = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Score (B,) of float images (B, 3, 224, 224)."""
        patches_BLD = self.patches(images_BCHW).flatten(2).transpose(1, 2)
        tokens_BLD = torch.cat([self.cls.expand(len(patches_BLD), -1, -1), patches_BLD], dim=1) + self.places
        return self.head(self.blocks(tokens_BLD)[:, 0])[:, 0]


class Encoder:
    """A reward made of the tower."""

    name = "vit-b-32-shaped"

    def warmup(self) -> None:
        """Fill the weights, always alike, and run once."""
        torch.manual_seed(0)
        self.tower = Tower().eval()
        self.score(np.zeros((1, SIDE, SIDE, 3), np.uint8), None)

    def score(self, images_BHWC: NDArray[np.uint8], prompts: Sequence[str] | None) -> NDArray[np.float32]:
        """Score uint8 (B, 224, 224, 3): float32 (B,)."""
        del prompts
        with torch.inference_mode():
            images_BCHW = torch.tensor(images_BHWC).permute(0, 3, 1, 2).float() / 127.5 - 1
            return self.tower(images_BCHW).numpy()
