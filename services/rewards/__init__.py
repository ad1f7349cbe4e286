"""The reward models, by name; a model's module is imported only when it is asked for."""

import importlib
import re
from collections.abc import Sequence

from services.protocol import IDENTIFIER_PATTERN
from services.rewards.base import Reward

REWARDS = {
    "brightness": "services.rewards.brightness:Brightness",
}
"""Name of each reward and the class behind it, as `module:Class`."""


class UnknownReward(ValueError):
    """No reward goes by this name."""


def check_names(names: Sequence[str]) -> None:
    """Check, without importing anything, that these may be the names of rewards, and that none comes twice.

    Raises:
        UnknownReward: one is neither known nor of the form `module:Class`, or is given twice.
    """
    for position, name in enumerate(names):
        if ":" not in name and name not in REWARDS:
            raise UnknownReward(f"unknown reward {name!r}; known: {', '.join(sorted(REWARDS))}, or module:Class")
        if name in names[:position]:
            raise UnknownReward(f"reward {name!r} is given twice: give each once")


def create_reward(name: str) -> Reward:
    """Create a reward by its name, or by `module:Class` for one that lives elsewhere.

    Args:
        name: one of `REWARDS`, or an importable `module:Class`.

    Returns:
        The reward, not yet warmed up.

    Raises:
        UnknownReward: the name is not known, cannot be imported, or the class names itself badly.
    """
    check_names([name])
    target = REWARDS.get(name, name)
    module_name, _, class_name = target.partition(":")
    try:
        reward: Reward = getattr(importlib.import_module(module_name), class_name)()
        labels = {"name": reward.name, "version": reward.version}
    except Exception as error:  # anyone's code runs here
        line = " ".join(str(error).split())[:300]
        raise UnknownReward(
            f"reward {name!r} cannot be imported: {type(error).__name__}: {line}; give an importable module:Class"
        ) from error
    for label, value in labels.items():
        if not isinstance(value, str) or not re.fullmatch(IDENTIFIER_PATTERN, value):
            raise UnknownReward(f"{label} {value!r} of reward {target} must match {IDENTIFIER_PATTERN}")
    return reward
