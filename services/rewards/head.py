"""A head of linear layers over an embedding, folded into one affine map.

Shape suffixes: B images of a batch, D dimensions of an embedding.
"""

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from services.rewards.openclip import State, read_state
from services.rewards.sources import WeightsError


@dataclass(frozen=True)
class Affine:
    """score = weight · embedding + bias.

    Attributes:
        weight_D: float64 (D,).
        bias: float.
    """

    weight_D: Tensor
    bias: float

    def __call__(self, vectors_BD: Tensor) -> NDArray[np.float64]:
        """Scores float64 (B,) of unit vectors (B, D)."""
        scores_B: NDArray[np.float64] = (vectors_BD.double().cpu() @ self.weight_D + self.bias).numpy()
        return scores_B

    def check(self, dimensions: int, whose: str) -> None:
        """Make sure that embeddings of so many dimensions can be scored.

        Raises:
            WeightsError: they cannot.
        """
        if len(self.weight_D) != dimensions:
            raise WeightsError(
                f"the head takes {len(self.weight_D)} dimensions, {whose} embeddings have {dimensions}: use its model"
            )


def fold(state: State) -> Affine:
    """One affine map that does what linear layers do one after another, without activations between them.

    Args:
        state: `layers.N.weight` (out, in) and `layers.N.bias` (out,), applied by rising N; the last gives one score.

    Returns:
        The product, computed in float64.

    Raises:
        ValueError: they are no such layers.
    """
    numbers = sorted({int(match[1]) for key in state if (match := re.fullmatch(r"layers\.(\d+)\.(weight|bias)", key))})
    if not numbers or set(state) != {f"layers.{n}.{part}" for n in numbers for part in ("weight", "bias")}:
        raise ValueError(f"its entries are {', '.join(sorted(state)[:4])}, expected layers.N.weight and layers.N.bias")
    layers = [(state[f"layers.{n}.weight"].double(), state[f"layers.{n}.bias"].double()) for n in numbers]
    flat = all(weight.dim() == 2 and bias.shape == weight.shape[:1] for weight, bias in layers)
    chained = flat and all(before[0].shape[0] == after[0].shape[1] for before, after in pairwise(layers))
    if not chained or layers[-1][0].shape[0] != 1:
        shapes = ", ".join(str(tuple(w.shape)) for w, _ in layers)
        raise ValueError(f"its layers are {shapes}, which do not lead to one score")
    weight, bias = layers[0]
    for layer_weight, layer_bias in layers[1:]:
        weight, bias = layer_weight @ weight, layer_weight @ bias + layer_bias
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise ValueError("one of its weights is no finite number")
    return Affine(weight[0], float(bias[0]))


def load_head(path: Path) -> Affine:
    """Load a head.

    Args:
        path: of safetensors, or of a state dict that `torch.save` wrote.

    Raises:
        WeightsError: it cannot be read, or is no head.
    """
    try:
        return fold(read_state(path))
    except ValueError as error:
        raise WeightsError(f"head {path}: {error}; give an aesthetic head of linear layers") from error
