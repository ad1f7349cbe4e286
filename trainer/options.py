"""Reads a run's settings: a recipe by its name or path, and the options of the command line on top of it."""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from trainer.config import Config, ConfigError, RewardConfig

DEFAULT_RECIPE = "mini-bright"


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    folder = resources.files("trainer") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_recipe(recipe: str) -> tuple[str, dict[str, Any]]:
    """Name and content of a recipe, by its name or by the path of a YAML file.

    Raises:
        ConfigError: there is none, or it is not a YAML mapping.
    """
    if recipe in recipe_names():
        name, text = recipe, (resources.files("trainer") / "recipes" / f"{recipe}.yaml").read_text("utf-8")
    elif recipe.endswith((".yaml", ".yml")):
        name = Path(recipe).stem
        try:
            text = Path(recipe).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ConfigError(
                f"recipe {recipe}: {reason}; give the path of a YAML file or a name from --list"
            ) from error
    else:
        raise ConfigError(
            f"unknown recipe {recipe!r}; known: {', '.join(recipe_names())}; or give the path of a .yaml file"
        )
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {recipe} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"recipe {recipe} holds a {type(content).__name__}; it must be a mapping of sections")
    return name, content


def _assign(content: dict[str, Any], key: str, value: Any) -> None:
    """Sets `section.key` (or `rewards.0.weight`) in place."""
    *parents, last = key.split(".")
    node: Any = content
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                raise ConfigError(
                    f"--{key}: {'.'.join(parents[:depth])} has entries 0 to {len(node) - 1}, not {part!r}"
                )
            node = node[int(part)]
        else:
            node = node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise ConfigError(f"--{key}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    if isinstance(node, list):
        raise ConfigError(f"--{key}: name the field of the entry, as in rewards.0.weight")
    node[last] = value


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`--section.key value` or `--section.key=value` pairs; values are read as YAML.

    Raises:
        ConfigError: an argument that is not of that form.
    """
    overrides: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--") or len(option) < 3:
            raise ConfigError(f"unexpected argument {option!r}; options are --section.key value")
        key, equals, text = option[2:].partition("=")
        if not equals:
            if not rest or (rest[0].startswith("--") and len(rest[0]) > 2):
                raise ConfigError(f"--{key} needs a value: --{key} VALUE")
            text = rest.pop(0)
        try:
            overrides[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--{key} {text!r} is not a value: {' '.join(str(error).split())}") from error
    return overrides


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = f"unknown key; known here: {_known_keys(problem['loc'][:-1])}"
        elif problem["type"] == "missing":
            message = "missing; give it a value"
        elif where:
            message = f"{problem['input']!r}: {message}"
        lines.append(f"{where}: {message}" if where else message)
    return "; ".join(lines)


def _known_keys(location: tuple[int | str, ...]) -> str:
    section: Any = Config
    for part in location:
        if part == "rewards":
            section = RewardConfig
        elif isinstance(part, str) and isinstance(section, type) and issubclass(section, BaseModel):
            field = section.model_fields.get(part)
            section = field.annotation if field else section
    if not (isinstance(section, type) and issubclass(section, BaseModel)):
        return "see the recipe files"
    return ", ".join(section.model_fields)


def load_config(recipe: str, overrides: Mapping[str, Any]) -> Config:
    """The resolved settings of a run.

    Args:
        recipe: a recipe's name or the path of a YAML file.
        overrides: dotted key → value, on top of it.

    Raises:
        ConfigError: with one line that names each offending key, its value and the limit.
    """
    name, content = read_recipe(recipe)
    for key, value in overrides.items():
        _assign(content, key, value)
    try:
        config = Config.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"recipe {name}: {_explain(error)}") from error
    if config.run.name is None:
        config = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
    return config
