"""From the raw score of a reward model to the reward the policy is trained on.

Shape legend: B images.
"""

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict

Scores = NDArray[np.float64]


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Affine(_Shape):
    """reward = scale · raw + offset; the identity by default."""

    scale: float = 1.0
    offset: float = 0.0

    def reward(self, raw_B: Scores) -> Scores:
        """Shaped rewards, (B,)."""
        return self.scale * raw_B + self.offset

    def success(self, raw_B: Scores) -> NDArray[np.bool_] | None:
        """None: nothing is thresholded."""
        return None


class AtLeast(_Shape):
    """reward = 1 where the raw score reaches the threshold, else 0 (the paper's "bright")."""

    at_least: float

    def success(self, raw_B: Scores) -> NDArray[np.bool_]:
        """Which images reach the threshold, (B,)."""
        return raw_B >= self.at_least

    def reward(self, raw_B: Scores) -> Scores:
        """Shaped rewards, (B,)."""
        return self.success(raw_B).astype(np.float64)


class Below(_Shape):
    """reward = 1 where the raw score is under the threshold, else 0 (the paper's "dark")."""

    below: float

    def success(self, raw_B: Scores) -> NDArray[np.bool_]:
        """Which images are under the threshold, (B,)."""
        return raw_B < self.below

    def reward(self, raw_B: Scores) -> Scores:
        """Shaped rewards, (B,)."""
        return self.success(raw_B).astype(np.float64)


def _spell_out(value: object) -> object:
    if value == "identity":
        return {}
    if isinstance(value, str):
        raise ValueError(f"shape is {value!r}; write identity, at_least: T, below: T, or scale: S and offset: O")
    return value


Shape = Annotated[AtLeast | Below | Affine, BeforeValidator(_spell_out)]
