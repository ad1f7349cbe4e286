"""From the raw score of a reward model to the reward the policy is trained on.

Shape legend: B images.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Tag, field_validator

Scores = NDArray[np.float64]


def refuse_booleans(value: object) -> object:
    """The value, unless it is or holds true or false, which YAML makes of `yes` and pydantic would take for 1.

    Raises:
        ValueError: a boolean.
    """
    if any(isinstance(part, bool) for part in (value if isinstance(value, list | tuple) else (value,))):
        raise ValueError("give a number, or a text in quotes")
    return value


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: object) -> object:
        return refuse_booleans(value)


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
    if isinstance(value, _Shape):
        return value
    if value == "identity":
        return {}
    if isinstance(value, Mapping) and (set(value) in ({"at_least"}, {"below"}) or set(value) <= {"scale", "offset"}):
        return value
    raise ValueError("write identity, {at_least: T}, {below: T}, or {scale: S, offset: O}")


def _kind(value: Any) -> str:
    """Which shape is meant, so that an error speaks of that one alone."""
    keys = value if isinstance(value, Mapping) else type(value).model_fields
    return next((key for key in ("at_least", "below") if key in keys), "affine")


Shape = Annotated[
    Annotated[AtLeast, Tag("at_least")] | Annotated[Below, Tag("below")] | Annotated[Affine, Tag("affine")],
    Discriminator(_kind),
    BeforeValidator(_spell_out),
]
