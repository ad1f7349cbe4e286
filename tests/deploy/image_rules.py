"""Rules of the Dockerfiles: each function gives the faults it finds in the text of one, one line each."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from tests.deploy.compose_files import ROOT, stages

Faults = Iterator[str]

BASE = "python:3.11-slim"
TOOLS = re.compile(r"\b(gcc|g\+\+|build-essential|make|cmake|uv|pip|apt-get|apt|curl|wget|git)\b")
BUILT_UPON = ("uv", "packages", "slim-packages", "base", "role")
"""Stages that are no image: of the first three nothing but the packages is kept."""


def bases(file: Path) -> Faults:
    """No line that needs a registry; every stage comes from the one base, or from another stage."""
    text = file.read_text("utf-8")
    if re.search(r"^#\s*(syntax|check)\s*=", text, flags=re.MULTILINE | re.IGNORECASE):
        yield "a # syntax= line needs a registry"
    known = {BASE}
    for found in re.finditer(r"^FROM (\S+)(?: AS (\S+))?", text, flags=re.MULTILINE):
        if found[1] not in known:
            yield f"it is built from {found[1]}"
        known.add(found[2] or "")


def final(file: Path) -> Faults:
    """The last layers have nobody's tools, run as somebody who is nobody, are labelled, and say how they do."""
    for name, lines in stages(file).items():
        if name in BUILT_UPON:
            continue
        users = [line.split()[1] for line in lines if line.startswith("USER ")]
        if not users or not re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", users[-1]):
            yield f"{name}: it runs as {users[-1] if users else 'root'}; a number that is not 0 lets Kubernetes know"
        for word in ("HEALTHCHECK", "ENTRYPOINT", "LABEL org.opencontainers.image.title="):
            if not any(line.startswith(word) for line in lines):
                yield f"{name}: no {word}"
        for line in lines:
            if line.startswith("RUN ") and (tool := TOOLS.search(line)):
                yield f"{name}: {tool[0]} in the last stage"
            if line.startswith("ADD ") or re.match(r"COPY \. ", line):
                yield f"{name}: {line} may bring anything"
            if (copy := re.match(r"COPY (?!--from)(.+) \S+$", line)) and not all(
                (ROOT / source).exists() for source in copy[1].split()
            ):
                yield f"{name}: there is no {copy[1]}"


def packages(file: Path) -> Faults:
    """Every package is held to its hash, from whatever index the machine knows; no secret is an argument."""
    text = file.read_text("utf-8")
    installs = re.findall(r"uv pip install[^\n]*", text)
    if not installs:
        yield "no package is installed from requirements.lock"
    for line in installs:
        if "--require-hashes" not in line:
            yield f"{line}: not held to hashes"
    for found in re.finditer(
        r"--(?:extra-)?index-url|--trusted-host|--find-links|https?://(?!127\.0\.0\.1)[\w.]+", text
    ):
        yield f"{found[0]}: the index is the machine's business"
    for found in re.finditer(r"^(?:ARG|ENV)\b.*(?:TOKEN|PASSWORD|SECRET|REDIS_URL).*", text, flags=re.MULTILINE):
        yield f"{found[0]}: it would be a secret in the image"


def installed(file: Path) -> dict[str, set[str]]:
    """What is named to be installed, by stage."""
    text = file.read_text("utf-8").replace("\\\n", " ")
    found = re.findall(r"^FROM uv AS (\S+)\nRUN for name in ([^;]+);", text, flags=re.MULTILINE)
    return {stage: set(names.split()) for stage, names in found}


def normalised(name: str) -> str:
    """The name of a distribution as an index and requirements.lock have it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def dependencies() -> set[str]:
    """What pyproject.toml names, and hiredis, which is the extra of redis."""
    names = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    return {normalised(re.split(r"[^\w.-]", name)[0]) for name in names} | {"hiredis"}


def named(file: Path) -> Faults:
    """The packages are those of pyproject.toml; the image without torch has some of them and no other."""
    stages_, wanted = installed(file), dependencies()
    for name in sorted(wanted - stages_.get("packages", set())):
        yield f"packages: {name} of pyproject.toml is not installed"
    for stage, names in stages_.items():
        for name in sorted(names - wanted):
            yield f"{stage}: {name} is not in pyproject.toml"


RULES = (bases, final, packages, named)
