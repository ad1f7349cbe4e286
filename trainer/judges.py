"""Classifiers that answer "is the picture still its label?", a score that no run optimises."""

from collections.abc import Callable
from pickle import UnpicklingError
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from trainer.loop import LabelJudge
from trainer.miniature.classifiers import predict
from trainer.miniature.weights import load_classifier

Kind = Literal["miniature", "imagenet", "none"]
Classify = Callable[[NDArray[np.uint8]], NDArray[np.float64]]


class JudgeError(RuntimeError):
    """The classifier's weights cannot be had."""


def make_judge(kind: Kind, device: torch.device) -> LabelJudge | None:
    """A function from images uint8 (B, H, W, 3) and labels int64 (B,) to the share that is recognised.

    Args:
        kind: `miniature` for the miniature's own, `imagenet` for torchvision's ResNet-50 (IMAGENET1K_V2), `none`.
        device: where it runs.

    Raises:
        JudgeError: the weights cannot be loaded.
    """
    classify = make_classifier(kind, device)
    if classify is None:
        return None

    def judge(images_BHW3: NDArray[np.uint8], labels_B: NDArray[np.int64]) -> float:
        return float((classify(images_BHW3).argmax(axis=1) == labels_B).mean())

    return judge


def make_classifier(kind: Kind, device: torch.device, *, option: str = "--model.classifier") -> Classify | None:
    """A function from images uint8 (B, H, W, 3) to a number for each class, float64 (B, K), the likelier the higher.

    Args:
        kind: as of `make_judge`.
        device: where it runs.
        option: that chooses it, for an error.

    Raises:
        JudgeError: the weights cannot be loaded.
    """
    if kind == "none":
        return None
    if kind == "imagenet":
        return _imagenet_classifier(device, option)
    classifier = load_classifier("label", device=device)
    return lambda images_BHW3: predict(classifier, images_BHW3)


def _imagenet_classifier(device: torch.device, option: str) -> Classify:
    from torchvision.models import ResNet50_Weights, resnet50  # noqa: PLC0415 - seconds of import that others need not pay

    weights = ResNet50_Weights.IMAGENET1K_V2
    try:
        network = resnet50(weights=weights).eval().to(device)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:  # not there, or truncated in the cache
        raise JudgeError(
            f"ResNet-50 ({weights.url}): {error}; download it where there is a network, or set {option} none"
        ) from error
    preprocess = weights.transforms()
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (preprocess.mean, preprocess.std))

    @torch.no_grad()
    def classify(images_BHW3: NDArray[np.uint8]) -> NDArray[np.float64]:
        parts = []
        for start in range(0, len(images_BHW3), 64):
            batch = torch.from_numpy(images_BHW3[start : start + 64]).to(device).permute(0, 3, 1, 2).float() / 255
            batch = F.interpolate(batch, size=(224, 224), mode="bilinear", antialias=True)
            parts.append(network((batch - mean) / std).double().cpu().numpy())
        return np.concatenate(parts)

    return classify
