"""The compose files as an engine reads them: merge keys and variables resolved; and the Dockerfiles they build from."""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "docker-compose.yml"
GPU = ROOT / "compose.gpu.yml"
OWN = ROOT / "examples" / "compose.own-reward.yml"
DOCKERFILES = (ROOT / "services" / "Dockerfile", ROOT / "trainer" / "Dockerfile")
VARIABLE = re.compile(r"\$(?:\$|\{(\w+)(?::?([-?])([^}]*))?\})")


class UnresolvedError(ValueError):
    """A variable has neither a value nor a default."""


def interpolate(text: str, environment: Mapping[str, str]) -> str:
    """Resolve `${NAME}`, `${NAME:-default}`, `${NAME:?words}` and `$$` as Compose does; an empty value counts as none.

    Raises:
        UnresolvedError: there is no value and no default.
    """

    def value(found: re.Match[str]) -> str:
        name, mark, rest = found.groups()
        if name is None:
            return "$"
        if given := environment.get(name):
            return given
        if mark != "-":
            raise UnresolvedError(f"{name} has no default")
        return str(rest)

    return VARIABLE.sub(value, text)


def resolve(node: Any, environment: Mapping[str, str]) -> Any:
    """A document with the variables of all its strings resolved."""
    if isinstance(node, dict):
        return {key: resolve(child, environment) for key, child in node.items()}
    if isinstance(node, list):
        return [resolve(child, environment) for child in node]
    return interpolate(node, environment) if isinstance(node, str) else node


class Loader(yaml.SafeLoader):
    """Knows Compose's own tags: what they mark replaces what it would be added to."""


def _marked(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    assert isinstance(node, yaml.SequenceNode), "only lists are marked here"
    return loader.construct_sequence(node, deep=True)


Loader.add_constructor("!override", _marked)


@cache
def text_of(path: Path) -> str:
    """The content of a file."""
    return path.read_text("utf-8")


def load(path: Path, environment: Mapping[str, str] | None = None) -> Object:
    """A compose file with the values that it has where the environment says nothing, or with these."""
    document: Object = resolve(yaml.load(text_of(path), Loader), environment or {})  # noqa: S506 - a SafeLoader
    return document


def merge(below: Any, above: Any, key: str = "") -> Any:
    """Two files as Compose lays one over the other: maps are joined, lists too, but for commands, which are replaced.

    Source: the Compose Specification, "Merge and override".
    """
    if isinstance(below, dict) and isinstance(above, dict):
        return below | {name: merge(below[name], each, name) if name in below else each for name, each in above.items()}
    if isinstance(below, list) and isinstance(above, list) and key not in {"command", "entrypoint", "test"}:
        return below + [each for each in above if each not in below]
    return above


def services(document: Object) -> dict[str, Object]:
    """The services of a file by name."""
    found: dict[str, Object] = document["services"]
    return found


def role_of(service: Object) -> str:
    """What a service is: `api`, `worker`, `trainer`, or `""` for all that our own code is not the heart of."""
    command = service.get("command") or []
    if isinstance(command, list) and command[:1] in (["api"], ["worker"]):
        return str(command[0])
    return "trainer" if isinstance(command, list) and "trainer.run" in command else ""


def of_role(document: Object, *roles: str) -> Iterator[tuple[str, Object]]:
    """Names and services of these roles."""
    return ((name, each) for name, each in services(document).items() if role_of(each) in roles)


def seconds(text: str) -> float:
    """A duration such as `1m30s`."""
    units = {"h": 3600, "m": 60, "s": 1}
    assert re.fullmatch(r"(\d+[hms])+", text), text
    return float(sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([hms])", text)))


def size(text: str) -> int:
    """Bytes of a size such as `640mb` or `1G`; powers of 1024, as Docker and Redis count them."""
    found = re.fullmatch(r"(\d+)([kmg]?)b?", str(text).lower())
    assert found, text
    return int(found[1]) * 1024 ** " kmg".index(found[2] or " ")


def stages(path: Path) -> dict[str, list[str]]:
    """The instructions of each stage of a Dockerfile, continued lines joined; the last has also the name ``""``."""
    joined = re.sub(r"\\\n", " ", "\n".join(line for line in text_of(path).splitlines() if not line.startswith("#")))
    found: dict[str, list[str]] = {}
    last = ""
    for line in filter(None, (" ".join(each.split()) for each in joined.splitlines())):
        if begin := re.fullmatch(r"FROM (\S+)(?: AS (\S+))?", line):
            last = begin[2] or f"stage {len(found)}"
            found[last] = [*found.get(begin[1], []), line] if begin[1] in found else [line]
        else:
            found[last].append(line)
    return found | {"": found[last]}
