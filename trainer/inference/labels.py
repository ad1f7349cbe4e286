"""Labels as people write them: numbers, ranges and names, in place of the model's indices."""

from collections.abc import Sequence
from typing import Literal

from trainer.config import MAX_CLASSES, ConfigError
from trainer.nearest import nearest

World = Literal["miniature", "imagenet", "none"]
"""Whose labels they are, by the classifier that knows them."""
IMAGENET_LABELS = 1000


def label_names(world: World) -> tuple[str, ...]:
    """The names of a world's labels in the order of their indices; none where they have none."""
    if world == "miniature":
        from trainer.miniature.objects import CLASSES  # noqa: PLC0415

        return CLASSES
    if world == "imagenet":
        from torchvision.models import ResNet50_Weights  # noqa: PLC0415 - seconds of import that others need not pay

        return tuple(ResNet50_Weights.IMAGENET1K_V2.meta["categories"])
    return ()


def label_count(world: World) -> int | None:
    """How many labels a world has; None where only the model knows."""
    return IMAGENET_LABELS if world == "imagenet" else len(label_names(world)) or None


def indices_of(value: object, world: World, option: str) -> object:
    """The labels of a setting as a tuple of indices; what is no list of labels comes back as it is, to be refused.

    Args:
        value: as YAML reads it: a text such as `0-3,ball`, or a list of indices, ranges and names.
        world: whose labels they are.
        option: what they were given to, for an error.

    Raises:
        ConfigError: a label is unknown, stands for two, or is none of the world's.
    """
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, Sequence) or not all(type(part) in {int, str} for part in parts):
        return value
    count = label_count(world)
    names = label_names(world) if any(isinstance(part, str) and not _is_range(part) for part in parts) else ()
    labels: list[int] = []
    for part in parts:
        labels += [part] if isinstance(part, int) else _labels_of(part.strip(), count or MAX_CLASSES, names, option)
    if count is not None and max(labels, default=0) >= count:
        raise ConfigError(f"{option}: there is no label {max(labels)}; the nearest is {count - 1}, they run from 0")
    return tuple(labels)


def _is_range(part: str) -> bool:
    first, dash, last = part.strip().partition("-")
    return first.isdecimal() and (last.isdecimal() or not dash)


def parse_labels(text: str, count: int, names: tuple[str, ...], option: str) -> tuple[int, ...]:
    """Labels of a comma-separated list such as `0-3,7,ball`, in its order.

    Args:
        text: indices, ranges FIRST-LAST with both ends, names.
        count: of the model's labels.
        names: theirs; none where they have none.
        option: what they were given to, for an error.

    Raises:
        ConfigError: a label is unknown, stands for two, or is there twice.
    """
    labels: list[int] = []
    for part in text.split(","):
        labels += _labels_of(part.strip(), count, names, option)
    twice = [label for label in set(labels) if labels.count(label) > 1] if len(set(labels)) < len(labels) else []
    if twice:
        raise ConfigError(f"{option} {text}: label {min(twice)} is there twice; give each once")
    return tuple(labels)


def _labels_of(part: str, count: int, names: tuple[str, ...], option: str) -> range | tuple[int]:
    if not count:
        raise ConfigError(f"{option}: neither a model nor --classifier says which labels there are: give one of them")
    if _is_range(part):
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if high >= count:
            raise ConfigError(f"{option}: there is no label {high}; the nearest is {count - 1}, they run from 0")
        if low > high:
            raise ConfigError(f"{option}: {part} runs backwards; write {high}-{low}")
        return range(low, high + 1)
    found = [index for index, name in enumerate(names) if name.lower() == part.lower()]
    if len(found) > 1:
        raise ConfigError(f"{option}: {part!r} names the labels {', '.join(map(str, found))}; give the index")
    if not found:
        known = nearest(part, names) if names else f"these labels have no names; give indices from 0 to {count - 1}"
        raise ConfigError(f"{option}: unknown label {part!r}; {known}")
    return (found[0],)
