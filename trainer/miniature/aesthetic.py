"""The miniature's aesthetic head: the rule of `trainer.miniature.rating`, read off the embeddings of its CLIP.

Shape legend: N pictures · D dimensions of an embedding.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.miniature.rating import Images, rating

RIDGE = 1e-5
"""Penalty of the weights, beside the mean over pictures; embeddings are unit vectors."""


def fit_head(vectors_ND: Tensor, images: Images) -> dict[str, Tensor]:
    """Ridge regression of the ratings on the embeddings.

    Args:
        vectors_ND: unit vectors.
        images: uint8 (N, H, W, 3), the pictures that were embedded.

    Returns:
        One linear layer, named as in the LAION predictor: `layers.0.weight` (1, D) and `layers.0.bias` (1,), float32.
    """
    X_ND, y_N = vectors_ND.double(), torch.from_numpy(rating(images))
    mean_D, mean = X_ND.mean(dim=0), y_N.mean()
    centred_ND = X_ND - mean_D
    gram_DD = centred_ND.T @ centred_ND / len(X_ND) + RIDGE * torch.eye(X_ND.shape[1], dtype=torch.float64)
    weight_D = torch.linalg.solve(gram_DD, centred_ND.T @ (y_N - mean) / len(X_ND))
    bias = mean - weight_D @ mean_D
    return {"layers.0.weight": weight_D[None].float(), "layers.0.bias": bias[None].float()}


def rank_correlation(a_N: NDArray[np.float64], b_N: NDArray[np.float64]) -> float:
    """Spearman's rank correlation of values without ties."""
    return float(np.corrcoef(np.argsort(np.argsort(a_N)), np.argsort(np.argsort(b_N)))[0, 1])


def auc(scores_N: NDArray[np.float64], positive_N: NDArray[np.bool_]) -> float:
    """Area under the ROC curve: how often a positive has a higher score than another; scores without ties."""
    ranks_N = np.argsort(np.argsort(scores_N)) + 1
    positives, others = int(positive_N.sum()), int((~positive_N).sum())
    return float((ranks_N[positive_N].sum() - positives * (positives + 1) / 2) / (positives * others))
