"""Pre-processing on the device: a batch of uint8 pictures in, a model's input out, as PIL would have it.

Shape suffixes: B images of a batch, H height and W width in pixels, C = 3 channels (RGB).
"""

from types import SimpleNamespace

import torch
from open_clip.transform import CenterCropOrPad, ResizeKeepRatio
from torch import Tensor, nn
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize
from torchvision.transforms.functional import resize

from services.rewards.base import UnfitImage

LONGEST = 32
"""How many times as long as wide a picture may be that is resized before it is cropped: the whole of it is resized."""


class Preprocessing(nn.Module):
    """The transform that `open_clip` gives PIL images, for batches of tensors."""

    def __init__(self, transform: Compose) -> None:
        """Take what is needed of the transform.

        Args:
            transform: of `open_clip.transform.image_transform_v2`, not for training.
        """
        super().__init__()
        self._resizes = [step for step in transform.transforms if isinstance(step, Resize | ResizeKeepRatio)]
        self._crops = [step for step in transform.transforms if isinstance(step, CenterCrop | CenterCropOrPad)]
        (normalize,) = (step for step in transform.transforms if isinstance(step, Normalize))
        self.register_buffer("mean", 255 * torch.tensor(normalize.mean).view(3, 1, 1))
        self.register_buffer("deviation", 255 * torch.tensor(normalize.std).view(3, 1, 1))
        self.mean: Tensor
        self.deviation: Tensor

    def forward(self, images_BHWC: Tensor) -> Tensor:
        """Resize, crop and normalise.

        Args:
            images_BHWC: uint8 (B, H, W, 3) on the device of this module.

        Returns:
            float32 (B, 3, S, S), with S the model's size.

        Raises:
            UnfitImage: the images are too elongated.
        """
        images_BCHW = images_BHWC.permute(0, 3, 1, 2).float()
        for step in self._resizes:
            images_BCHW = _resized(images_BCHW, step)
        for step in self._crops:
            images_BCHW = step(images_BCHW)
        return (images_BCHW - self.mean) / self.deviation


def _resized(images_BCHW: Tensor, step: Resize | ResizeKeepRatio) -> Tensor:
    """Resize as PIL does: with antialiasing, first the rows and then the columns, each time to whole levels."""
    height, width = images_BCHW.shape[2:]
    new_height, new_width = _target(height, width, step)
    if max(new_height, new_width) > LONGEST * min(new_height, new_width):
        raise UnfitImage(
            f"a picture of {width}×{height} pixels is more than {LONGEST} times as long as wide: crop it first", index=0
        )
    for size in ([height, new_width], [new_height, new_width]):
        if size != list(images_BCHW.shape[2:]):
            images_BCHW = resize(images_BCHW, size, step.interpolation, antialias=True)
            images_BCHW = images_BCHW.add_(0.5).floor_().clamp_(0, 255)
    return images_BCHW


def _target(height: int, width: int, step: Resize | ResizeKeepRatio) -> tuple[int, int]:
    """The size that a picture is given by a step, height first."""
    if isinstance(step, ResizeKeepRatio):
        new_height, new_width = step.get_params(SimpleNamespace(size=(width, height)), step.size, step.longest)
    elif isinstance(step.size, int):  # of the shorter side
        shorter = min(height, width)
        new_height, new_width = (int(step.size * side / shorter) for side in (height, width))
    else:
        new_height, new_width = step.size
    return new_height, new_width
