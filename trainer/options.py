"""Reads a run's settings: a recipe by its name or path, and the options of the command line on top of it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from trainer.config import Config, ConfigError
from trainer.inference.labels import World, indices_of
from trainer.nearest import nearest, nearest_name
from trainer.shaping import Affine, AtLeast, Below

DEFAULT_RECIPE = "mini-bright"
WORLDS: tuple[World, ...] = get_args(World)
SHAPES = (AtLeast, Below, Affine)
QUOTED = re.compile(r"'([^']*)'")


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return packaged_names("recipes")


def packaged_names(folder: str) -> list[str]:
    """The YAML files in a folder of the package, without their ending."""
    entries = (resources.files("trainer") / folder).iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))


def read_recipe(recipe: str) -> tuple[str, dict[str, Any]]:
    """Name and content of a recipe, by its name or by the path of a YAML file.

    Raises:
        ConfigError: there is none, or it is not a YAML mapping.
    """
    return read_yaml(recipe, "recipe")


def read_yaml(wanted: str, kind: Literal["recipe", "sweep"]) -> tuple[str, dict[str, Any]]:
    """Name and content of a file that comes with the package, by its name, or of one by its path.

    Raises:
        ConfigError: there is none, or it is not a YAML mapping.
    """
    names = packaged_names(f"{kind}s")
    if wanted in names:
        name, text = wanted, (resources.files("trainer") / f"{kind}s" / f"{wanted}.yaml").read_text("utf-8")
    elif wanted.endswith((".yaml", ".yml")):
        name, text = Path(wanted).stem, _read_text(Path(wanted), kind, names)
    else:
        raise ConfigError(f"unknown {kind} {wanted!r}; {nearest(wanted, names)}; or give the path of a .yaml file")
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{kind} {wanted} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{kind} {wanted} holds a {type(content).__name__}; it must be a mapping of sections")
    return name, content


def _read_text(path: Path, kind: str, names: Sequence[str]) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        reason = "it is not UTF-8 text; give the path of a YAML file or a name from --list"
        raise ConfigError(f"{kind} {path}: {reason}") from error
    except OSError as error:
        beside = [str(entry) for ending in ("*.yaml", "*.yml") for entry in path.parent.glob(ending)]
        reason = f"{error.strerror}; give the path of a YAML file or a name from --list"
        raise ConfigError(f"{kind} {path}: {reason}; {nearest(str(path), [*sorted(beside), *names])}") from error


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
    """`--section.key value` or `--section.key=value` pairs; values are read by `read_value`.

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
            overrides[key] = read_value(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--{key} {text!r} is not a value: {' '.join(str(error).split())}") from error
    return overrides


def read_value(text: str) -> Any:
    """A value as YAML, but a text without quotes as it stands: a prompt may well hold ` #`, and no comment is meant.

    Raises:
        yaml.YAMLError: it is none.
    """
    value, tokens = yaml.safe_load(text), list(yaml.scan(text))[1:-1]
    is_comment = not tokens and bool(text.strip())
    is_plain = len(tokens) == 1 and isinstance(tokens[0], yaml.ScalarToken) and tokens[0].plain
    return text.strip() if is_comment or (is_plain and isinstance(value, str)) else value


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """What pydantic refuses, in one line: each key with its value and the limit, or the nearest name.

    Args:
        error: of the validation.
        root: what was validated.
    """
    lines = []
    problems = error.errors(include_url=False)
    for problem in problems:
        location = problem["loc"]
        if problem["type"] == "too_short" and any(_is_below(other["loc"], location) for other in problems):
            continue  # pydantic counts the entries that are right, and has named those that are wrong
        where = ".".join(str(part) for part in location)
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = f"unknown key; {_nearest_key(location, root)}"
        elif problem["type"] == "missing":
            message = "missing; give it a value"
        elif where:
            message = f"{problem['input']!r}: {message}{_nearest_value(problem)}"
        lines.append(f"{where}: {message}" if where else message)
    return "; ".join(lines)


def _is_below(location: Sequence[int | str], other: Sequence[int | str]) -> bool:
    return len(location) > len(other) and tuple(location[: len(other)]) == tuple(other)


def _nearest_value(problem: Mapping[str, Any]) -> str:
    """The nearest of the values that a setting may have, where they are few, or of the keys of a shape."""
    value = problem["input"]
    if problem["type"] == "literal_error" and isinstance(value, str):
        return f"; the nearest is {nearest_name(value, re.findall(QUOTED, problem['ctx']['expected']))!r}"
    if problem["loc"][-1] == "shape" and (isinstance(value, str) or value):
        keys = [key for shape in SHAPES for key in shape.model_fields]
        wrong = [str(key) for key in value if key not in keys] if isinstance(value, Mapping) else []
        if wrong:
            return f"; the nearest to {wrong[0]!r} is {nearest_name(wrong[0], keys)!r}"
    return ""


def _nearest_key(location: Sequence[int | str], root: type[BaseModel]) -> str:
    """What to say of a key that its section does not have; another section may have it."""
    *parents, key = location
    section = _section(parents, root)
    if section is None:
        return "see the recipe files"
    known = list(section.model_fields)
    homes = [f"{path}.{key}" for path, other in _sections(root) if key in other.model_fields and other is not section]
    if homes:
        return f"the nearest is {homes[0]!r}; known here: {', '.join(known)}"
    return nearest(str(key), known).replace("known:", "known here:")


def _sections(root: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Each section below one, with its `section.section`."""
    for name, field in root.model_fields.items():
        inner = _model_of(field.annotation)
        if inner is not None:
            is_list = get_origin(field.annotation) is tuple
            here = f"{path}{name}.0" if is_list else f"{path}{name}"
            yield here, inner
            yield from _sections(inner, f"{here}.")


def _section(location: Sequence[int | str], root: type[BaseModel]) -> type[BaseModel] | None:
    """The section at a place, if there is one."""
    section: type[BaseModel] | None = root
    for part in location:
        if isinstance(part, str) and section is not None:
            field = section.model_fields.get(part)
            section = None if field is None else _model_of(field.annotation)
    return section


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, where it holds one, several or none of it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = [model for each in get_args(annotation) if (model := _model_of(each)) is not None]
    return inner[0] if len(inner) == 1 else None


def _name_classes(content: dict[str, Any]) -> None:
    """Puts indices in the place of the names of labels, as the model's world has them; wrong types are left alone.

    Raises:
        ConfigError: a label is none of the world's.
    """
    model, rollout = content.get("model", {}), content.get("rollout")
    if not isinstance(model, dict) or not isinstance(rollout, dict) or "classes" not in rollout:
        return
    classifier = model.get("classifier", WORLDS[0])
    world = WORLDS[0] if model.get("var", WORLDS[0]) == WORLDS[0] else classifier
    if world in WORLDS:
        rollout["classes"] = indices_of(rollout["classes"], world, "rollout.classes")


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
        _name_classes(content)
        config = Config.model_validate(content)
    except ConfigError as error:
        raise ConfigError(f"recipe {name}: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"recipe {name}: {explain(error, Config)}") from error
    if config.run.name is None:
        config = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
    return config
