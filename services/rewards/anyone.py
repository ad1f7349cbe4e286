"""A reward out of anyone's class: `score(images, prompts)` is all it needs; what else it does not say has a default.

Shape suffixes: B images of a batch, H height and W width in pixels, C = 3 channels (RGB).
"""

import inspect
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.protocol import IDENTIFIER_PATTERN
from services.rewards.base import Reward

DEFAULTS: dict[str, Any] = {
    "version": "0",
    "low": None,
    "high": None,
    "higher_is_better": True,
    "uses_prompts": False,
    "needs_prompts": False,
    "scale": "",
}
"""What a reward is taken to say where it says nothing; its name is made of its class's, and it has nothing to load."""


class UnfitReward(ValueError):
    """An object that cannot be served; the message says what it lacks."""


def complete(reward: Any) -> Reward:
    """Make a reward of any object with `score(images, prompts)`.

    Args:
        reward: an instance of anyone's class.

    Returns:
        The object itself where it has every member of `Reward`, else one that asks it and has defaults for the rest.

    Raises:
        UnfitReward: it has no such `score`, or another member is not what `Reward` says.
    """
    _check_score(reward)
    members = {member: getattr(reward, member, default) for member, default in DEFAULTS.items()}
    members["name"] = getattr(reward, "name", default_name(type(reward).__name__))
    _check_members(members)
    if not callable(getattr(reward, "warmup", _nothing)):
        raise UnfitReward("its warmup is no method: make it one, or leave it out")
    if all(hasattr(reward, member) for member in (*members, "warmup")):
        whole: Reward = reward
        return whole
    return Completed(reward, **members)


class Completed:
    """An object with `score(images, prompts)`, and what it left out; `Reward` says what each member is."""

    def __init__(
        self,
        reward: Any,
        *,
        name: str,
        version: str,
        low: float | None,
        high: float | None,
        higher_is_better: bool,
        uses_prompts: bool,
        needs_prompts: bool,
        scale: str,
    ) -> None:
        self._reward = reward
        self.name = name
        self.version = version
        self.low = low
        self.high = high
        self.higher_is_better = higher_is_better
        self.uses_prompts = uses_prompts
        self.needs_prompts = needs_prompts
        self.scale = scale

    def warmup(self) -> None:
        """Whatever the object does, if anything."""
        getattr(self._reward, "warmup", _nothing)()

    def score(self, images_BHWC: NDArray[np.uint8], prompts: Sequence[str] | None) -> NDArray[np.floating]:
        """Whatever the object answers: an array, a list or a CPU tensor; the worker checks count and values."""
        scores_B: NDArray[np.floating] = self._reward.score(images_BHWC, prompts)
        return scores_B


def default_name(class_name: str) -> str:
    """The name of a reward that gives none: `JpegSize` is served as `jpeg-size`; what no name may hold is left out."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", class_name).replace("_", "-")
    return re.sub(r"[^a-z0-9-]", "", words.lower()).strip("-")[:64]


def _nothing() -> None:
    """Load nothing."""


def _check_score(reward: Any) -> None:
    score = getattr(reward, "score", None)
    if not callable(score):
        raise UnfitReward("it has no method score(images, prompts): give it one")
    if inspect.iscoroutinefunction(score):
        raise UnfitReward("its score is async, but is called on a thread of its own: make it `def score`")
    try:
        signature = inspect.signature(score)
    except (ValueError, TypeError):  # of some builtins nothing is known
        return
    try:
        signature.bind(None, None)
    except TypeError:
        taken = signature.replace(return_annotation=inspect.Signature.empty)
        raise UnfitReward(
            f"its score takes {taken}, but is called as score(images, prompts): take both; "
            "prompts is None where there are none"
        ) from None


def _check_members(members: dict[str, Any]) -> None:
    for label in ("name", "version"):
        if not isinstance(members[label], str) or not re.fullmatch(IDENTIFIER_PATTERN, members[label]):
            raise UnfitReward(f"its {label} is {members[label]!r}: give a string that matches {IDENTIFIER_PATTERN}")
    for bound in ("low", "high"):
        value = members[bound]
        if value is not None and not (type(value) in {int, float} and math.isfinite(value)):
            raise UnfitReward(f"its {bound} is {value!r}: give a finite float, or None where there is no bound")
    low, high = members["low"], members["high"]
    if low is not None and high is not None and low > high:
        raise UnfitReward(f"its low is {low}, above its high of {high}: exchange them")
    for switch in ("higher_is_better", "uses_prompts", "needs_prompts"):
        if not isinstance(members[switch], bool):
            raise UnfitReward(f"its {switch} is {members[switch]!r}: give True or False")
    if members["needs_prompts"] and not members["uses_prompts"]:
        raise UnfitReward("it needs prompts and does not use them: set uses_prompts = True, or needs_prompts = False")
    if not isinstance(members["scale"], str):
        raise UnfitReward(f"its scale is {members['scale']!r}: say in a string what the numbers are")
