"""Classifiers that answer "is the picture still its label?", a score that no run optimises."""

from pickle import UnpicklingError
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from trainer.loop import LabelJudge
from trainer.miniature.classifiers import predict
from trainer.miniature.weights import load_classifier


class JudgeError(RuntimeError):
    """The classifier's weights cannot be had."""


def make_judge(kind: Literal["miniature", "imagenet", "none"], device: torch.device) -> LabelJudge | None:
    """A function from images uint8 (B, H, W, 3) and labels int64 (B,) to the share that is recognised.

    Args:
        kind: `miniature` for the miniature's own, `imagenet` for torchvision's ResNet-50 (IMAGENET1K_V2), `none`.
        device: where it runs.

    Raises:
        JudgeError: the weights cannot be loaded.
    """
    if kind == "none":
        return None
    if kind == "miniature":
        classifier = load_classifier("label", device=device)

        def judge(images_BHW3: NDArray[np.uint8], labels_B: NDArray[np.int64]) -> float:
            return float((predict(classifier, images_BHW3).argmax(axis=1) == labels_B).mean())

        return judge
    return _imagenet_judge(device)


def _imagenet_judge(device: torch.device) -> LabelJudge:
    from torchvision.models import ResNet50_Weights, resnet50  # noqa: PLC0415 - seconds of import that others need not pay

    weights = ResNet50_Weights.IMAGENET1K_V2
    try:
        network = resnet50(weights=weights).eval().to(device)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:  # not there, or truncated in the cache
        raise JudgeError(
            f"ResNet-50 ({weights.url}): {error}; download it where there is a network, or set --model.classifier none"
        ) from error
    preprocess = weights.transforms()
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (preprocess.mean, preprocess.std))

    @torch.no_grad()
    def judge(images_BHW3: NDArray[np.uint8], labels_B: NDArray[np.int64]) -> float:
        hits = 0
        for start in range(0, len(images_BHW3), 64):
            batch = torch.from_numpy(images_BHW3[start : start + 64]).to(device).permute(0, 3, 1, 2).float() / 255
            batch = F.interpolate(batch, size=(224, 224), mode="bilinear", antialias=True)
            answer = network((batch - mean) / std).argmax(dim=1).cpu().numpy()
            hits += int((answer == labels_B[start : start + 64]).sum())
        return hits / len(labels_B)

    return judge
