"""Two small judges of the miniature world, apart from any reward: which object it is, and in which style.

The first plays the part that ResNet-50 plays for ImageNet: is a picture still its label? Shape legend: B images ·
3HW RGB in [−1, 1] · K classes.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.miniature.fitting import Fitted, Schedule, batch_indices, fit
from trainer.miniature.objects import CLASSES
from trainer.miniature.render import STYLES, Renders
from trainer.miniature.tokenizer import to_float

Kind = Literal["label", "style"]
OUTPUTS: dict[Kind, int] = {"label": len(CLASSES), "style": len(STYLES)}
SCHEDULES: dict[Kind, Schedule] = {
    "label": Schedule(steps=2500, batch=32, lr=3e-3, weight_decay=0.01, ema=0.995),
    "style": Schedule(steps=5000, batch=32, lr=3e-3, weight_decay=0.01, ema=0.995),
}
WIDTHS = (24, 48, 96, 128)


class Classifier(nn.Module):
    """Four strided convolutions, the mean over positions, one linear layer: (B, 3, H, W) → logits (B, K)."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((3, *WIDTHS[:-1]), WIDTHS, strict=True):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.GELU()]
        self.features = nn.Sequential(*layers, nn.Conv2d(WIDTHS[-1], WIDTHS[-1], 3, padding=1), nn.GELU())
        self.head = nn.Linear(2 * WIDTHS[-1], outputs)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        h = self.features(images_B3HW)
        out: Tensor = self.head(torch.cat([h.mean(dim=(2, 3)), h.amax(dim=(2, 3))], dim=1))
        return out


def _augment(images_B3HW: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, gain, offset and noise, so that a judgement does not hang on sharpness or exposure."""
    B = len(images_B3HW)
    weight_B111 = torch.rand(B, 1, 1, 1, generator=generator)
    blurred = F.avg_pool2d(images_B3HW, 3, stride=1, padding=1, count_include_pad=False)
    images_B3HW = torch.lerp(images_B3HW, blurred, weight_B111)
    gain_B111 = 1 + 0.3 * (2 * torch.rand(B, 1, 1, 1, generator=generator) - 1)
    offset_B311 = 0.25 * torch.randn(B, 3, 1, 1, generator=generator)
    noise = 0.05 * torch.randn(images_B3HW.shape, generator=generator)
    return (images_B3HW * gain_B111 + offset_B311 + noise).clamp(-1, 1)


def _ring(images_B3HW: Tensor, generator: torch.Generator) -> Tensor:
    """Softens edges, or lets them ring with dark and light fringes: what a decoder does, and no sign of a style."""
    amount_B111 = 2.5 * torch.rand(len(images_B3HW), 1, 1, 1, generator=generator) - 1
    blurred = F.avg_pool2d(images_B3HW, 7, stride=1, padding=3, count_include_pad=False)
    return (images_B3HW + amount_B111 * (images_B3HW - blurred)).clamp(-1, 1)


def train(
    kind: Kind, renders: Renders, *, seed: int, state: Path, device: torch.device, schedule: Schedule
) -> Fitted[Classifier]:
    """Trains one of the two on rendered pictures of all styles; targets are softened by 0.05."""
    torch.manual_seed(seed)
    targets = torch.from_numpy(renders.labels if kind == "label" else renders.styles)

    def loss(model: Classifier, step: int) -> Tensor:
        rows = batch_indices(seed, step, len(targets), schedule.batch)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        images = to_float(renders.images[rows])
        # A style is partly its exposure; an object is not.
        images = _augment(images, generator) if kind == "label" else _ring(images, generator)
        return F.cross_entropy(model(images.to(device)), targets[rows].to(device), label_smoothing=0.05)

    return fit(f"{kind} classifier", Classifier(OUTPUTS[kind]), loss, schedule, state=state, device=device)


@torch.no_grad()
def predict(model: Classifier, images: NDArray[np.uint8], *, batch: int = 256) -> NDArray[np.float64]:
    """Class probabilities float64 (B, K) of uint8 images (B, H, W, 3)."""
    device = model.head.weight.device
    starts = range(0, len(images), batch)
    pieces = [model(to_float(images[start : start + batch]).to(device)).softmax(dim=1) for start in starts]
    return torch.cat(pieces).double().cpu().numpy()


def accuracy(model: Classifier, images: NDArray[np.uint8], targets: NDArray[np.int64]) -> float:
    """Share of images whose most probable class is the target."""
    return float((predict(model, images).argmax(axis=1) == targets).mean())
