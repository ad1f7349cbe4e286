"""The reward models, by name; a model's module is imported only when it is asked for."""

import importlib
import inspect
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from services.rewards.options import RewardOptions

if TYPE_CHECKING:
    from services.rewards.base import Reward

REWARDS = {
    "brightness": "services.rewards.brightness:Brightness",
    "clip": "services.rewards.clip:Clip",
    "aesthetic": "services.rewards.aesthetic:Aesthetic",
    "mini-clip": "services.rewards.clip:MiniatureClip",
    "mini-aesthetic": "services.rewards.aesthetic:MiniatureAesthetic",
}
"""Name of each reward and the class behind it, as `module:Class`."""

ENTRY_POINT_GROUP = "var_grpo.rewards"
"""Where an installed package names rewards of its own, as `name = "module:Class"`."""
TOLD = ("clip", "aesthetic", "mini-clip", "mini-aesthetic")
"""Those of `REWARDS` that are created from options, by `configured`."""
BUILT_IN = "built in"
UNTOLD = RewardOptions()


class UnknownReward(ValueError):
    """No reward goes by this name, or what does is none."""


@dataclass(frozen=True, slots=True)
class KnownReward:
    """A reward that can be served by its name.

    Attributes:
        name: what it goes by.
        target: its class, as `module:Class`.
        origin: `BUILT_IN`, or the package that offers it.
    """

    name: str
    target: str
    origin: str


def known_rewards() -> list[KnownReward]:
    """All rewards that can be named: those of `REWARDS`, then those of installed packages, by name; none is imported.

    A package's reward that has the name of a built-in one is left out: it can be served as `module:Class`.
    """
    built_in = [KnownReward(name, target, BUILT_IN) for name, target in REWARDS.items()]
    installed = {
        KnownReward(point.name, point.value.partition("[")[0].strip(), point.dist.name if point.dist else "unknown")
        for point in entry_points(group=ENTRY_POINT_GROUP)
        if point.name not in REWARDS and ":" not in point.name
    }
    return built_in + sorted(installed, key=lambda reward: (reward.name, reward.origin))


def check_names(names: Sequence[str]) -> None:
    """Check, without importing anything, that these may be the names of rewards, and that none comes twice.

    Raises:
        UnknownReward: one is neither known nor of the form `module:Class`, is offered by two packages, or given twice.
    """
    for position, name in enumerate(names):
        _target_of(name)
        if name in names[:position]:
            raise UnknownReward(f"reward {name!r} is given twice: give each once")


def create_reward(name: str, options: RewardOptions = UNTOLD) -> "Reward":
    """Create a reward by its name, or by `module:Class` for one that lives elsewhere.

    Args:
        name: of a built-in or installed reward, or an importable `module:Class`; all that the class must have is
            `score(images, prompts)`, see `services.rewards.anyone`.
        options: what the built-in models are told.

    Returns:
        The reward, not yet warmed up.

    Raises:
        UnknownReward: the name is not known or cannot be imported, or what it names is no reward.
    """
    from services.rewards.anyone import UnfitReward, complete  # noqa: PLC0415 - numpy, which who only names has no use for

    target = _target_of(name)
    module_name, _, class_name = target.partition(":")
    try:
        found = operator.attrgetter(class_name)(importlib.import_module(module_name))
    except Exception as error:  # anyone's code runs here
        raise UnknownReward(
            f"reward {name!r} cannot be imported: {_one_line(error)}; give an importable module:Class"
        ) from error
    if name not in TOLD:
        _check_constructor(found, target)
    try:
        return complete(found.configured(options) if name in TOLD else found())
    except UnfitReward as error:
        raise UnknownReward(f"{target} is no reward: {error}") from error
    except Exception as error:
        raise UnknownReward(
            f"reward {name!r} cannot be created: {_one_line(error)}; what may fail belongs in its warmup"
        ) from error


def _target_of(name: str) -> str:
    """The `module:Class` behind a name.

    Raises:
        UnknownReward: there is none, or more than one.
    """
    if ":" in name:
        return name
    if name in REWARDS:
        return REWARDS[name]
    known = known_rewards()
    offers = {reward.target: reward.origin for reward in known if reward.name == name}
    if len(offers) > 1:
        both = " and ".join(f"{origin} ({target})" for target, origin in offers.items())
        raise UnknownReward(f"reward {name!r} is offered by {both}: give the module:Class that is meant")
    for target in offers:
        return target
    names = ", ".join(sorted({reward.name for reward in known}))
    raise UnknownReward(f"unknown reward {name!r}; known: {names}, or module:Class")


def _check_constructor(found: Any, target: str) -> None:
    """Check that something can be called without arguments, before it is.

    Raises:
        UnknownReward: it cannot.
    """
    if not callable(found):
        raise UnknownReward(f"{target} is no class but a {type(found).__name__}: name a class with score()")
    try:
        signature = inspect.signature(found)
    except (ValueError, TypeError):  # of some builtins nothing is known
        return
    try:
        signature.bind()
    except TypeError as error:
        taken = signature.replace(return_annotation=inspect.Signature.empty)
        raise UnknownReward(
            f"{target} takes {taken} and is created without arguments ({error}): give each a default"
        ) from None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(": ")
