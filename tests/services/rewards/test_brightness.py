"""The brightness reward, by hand and by property."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.rewards import UnknownReward, check_names, create_reward
from services.rewards.brightness import Brightness
from tests.services.conftest import random_images


@pytest.mark.parametrize(
    ("colour", "expected"),
    [((0, 0, 0), 0.0), ((255, 0, 0), 0.2989), ((0, 255, 0), 0.5870), ((0, 0, 255), 0.1140), ((255,) * 3, 0.9999)],
)
def test_brightness_of_plain_colours(colour: tuple[int, ...], expected: float) -> None:
    """0.2989 R + 0.5870 G + 0.1140 B, with channels in [0, 1]."""
    images_BHWC = np.broadcast_to(np.array(colour, np.uint8), (2, 3, 5, 3))
    assert Brightness().score(images_BHWC, None) == pytest.approx([expected] * 2, abs=1e-12)


@given(seed=st.integers(0, 1000), cut=st.integers(1, 5))
def test_the_batch_never_changes_a_score(seed: int, cut: int) -> None:
    """Any split of a batch gives the very same numbers, within the stated range."""
    images_BHWC = random_images(6, 4, 7, 3, seed=seed)
    reward = Brightness()
    whole = reward.score(images_BHWC, None)
    parts = [reward.score(part, None) for part in (images_BHWC[:cut], images_BHWC[cut:])]
    assert np.array_equal(whole, np.concatenate(parts))
    assert reward.low is not None
    assert reward.high is not None
    assert ((whole >= reward.low) & (whole <= reward.high)).all()


def test_it_is_the_mean_over_pixels() -> None:
    """Against the formula, written the slow way."""
    images_BHWC = random_images(3, 9, 8, 3)
    expected = (images_BHWC / 255.0 @ np.array([0.2989, 0.5870, 0.1140])).mean(axis=(1, 2))
    assert Brightness().score(images_BHWC, None) == pytest.approx(expected, rel=1e-12)


def test_rewards_are_found_by_name_and_by_class() -> None:
    """One that lives elsewhere is named as `module:Class`."""
    assert create_reward("brightness").name == "brightness"
    assert create_reward("tests.services.dummies:Slow").name == "slow"


@pytest.mark.parametrize("name", ["brigthness", "no.such.module:Class", "services.rewards.brightness:No"])
def test_an_unknown_reward_is_refused_with_those_known(name: str) -> None:
    """The message names the value and what would do."""
    with pytest.raises(UnknownReward, match="module:Class"):
        create_reward(name)


def test_a_name_is_checked_without_an_import() -> None:
    """`check_names` knows the registry only; each name may come once."""
    check_names(["no.such.module:Class", "brightness"])
    with pytest.raises(UnknownReward, match="known: aesthetic, brightness, clip"):
        check_names(["dark"])
    with pytest.raises(UnknownReward, match="twice"):
        check_names(["brightness", "brightness"])
