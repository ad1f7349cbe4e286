"""From raw scores to rewards."""

import math

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from trainer.shaping import Affine, AtLeast, Below, Shape

shape: TypeAdapter[Affine | AtLeast | Below] = TypeAdapter(Shape)
RAW_B = np.array([0.0, 0.19999, 0.2, 0.5, 0.79999, 0.8, 1.0])


def test_identity_changes_nothing() -> None:
    """The reward is the raw score, and nothing is thresholded."""
    identity = shape.validate_python("identity")
    assert np.array_equal(identity.reward(RAW_B), RAW_B)
    assert identity.success(RAW_B) is None
    assert identity == shape.validate_python({}) == Affine()


def test_at_least_includes_its_threshold() -> None:
    """1 from 0.8 on, 0 below it (the paper's bright)."""
    bright = shape.validate_python({"at_least": 0.8})
    assert bright.reward(RAW_B).tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert np.array_equal(bright.success(RAW_B), bright.reward(RAW_B) == 1)


def test_below_excludes_its_threshold() -> None:
    """1 under 0.2, 0 from there on (the paper's dark)."""
    dark = shape.validate_python({"below": 0.2})
    assert dark.reward(RAW_B).tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert np.array_equal(dark.success(RAW_B), dark.reward(RAW_B) == 1)


def test_affine_scales_and_shifts() -> None:
    """reward = scale · raw + offset, each with a default."""
    assert shape.validate_python({"scale": -2, "offset": 1}).reward(np.array([0.25])).tolist() == [0.5]
    assert shape.validate_python({"scale": 3}).reward(np.array([2.0])).tolist() == [6.0]
    assert shape.validate_python({"offset": 3}).reward(np.array([2.0])).tolist() == [5.0]


@pytest.mark.parametrize(
    "value",
    [
        "bright",
        0.8,
        None,
        ["at_least", 0.8],
        {"at_leest": 0.8},
        {"at_least": 0.8, "below": 0.2},
        {"at_least": 0.8, "scale": 2},
        {"at_least": "much"},
        {"at_least": math.nan},
        {"below": math.inf},
        {"scale": math.nan},
        {"offset": None},
    ],
)
def test_anything_else_is_refused_by_one_problem(value: object) -> None:
    """Names, mixtures and numbers that are none; the error speaks of the shape that was meant, once."""
    with pytest.raises(ValidationError) as caught:
        shape.validate_python(value)
    assert caught.value.error_count() == 1
