"""An encoder of the shape of ViT-B/32 with random weights: its cost is the real one's, its score means nothing.

It follows the rule of docs/rewards.md that torch waits for `warmup`: the API makes one, too, and needs none.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class Encoder:
    """A reward made of the tower."""

    name = "vit-b-32-shaped"

    def warmup(self) -> None:
        """Fill the weights, always alike, and run once."""
        import torch  # noqa: PLC0415 - see the module

        from benchmarks.peers.tower import SIDE, Tower  # noqa: PLC0415

        torch.manual_seed(0)
        self.tower = Tower().eval()
        self.score(np.zeros((1, SIDE, SIDE, 3), np.uint8), None)

    def score(self, images_BHWC: NDArray[np.uint8], prompts: Sequence[str] | None) -> NDArray[np.float32]:
        """Score uint8 (B, 224, 224, 3): float32 (B,)."""
        import torch  # noqa: PLC0415

        del prompts
        with torch.inference_mode():
            images_BCHW = torch.tensor(images_BHWC).permute(0, 3, 1, 2).float() / 127.5 - 1
            return self.tower(images_BCHW).numpy()
