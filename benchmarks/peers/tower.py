"""A model of the shape of ViT-B/32.

Shape suffixes: B images of a batch, H height and W width in pixels, C = 3 channels, L tokens, D width.
"""

import torch
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
