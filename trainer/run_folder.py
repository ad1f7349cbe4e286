"""A run's folder: made anew, or found again to go on in.

It holds `config.yaml`, `versions.json`, `metrics.jsonl`, `tensorboard/`, `grids/`, `states/` (what `--resume` goes on
from), `services.log`, and at the end `checkpoint/var.safetensors` and `summary.json`.
"""

import fcntl
import json
import os
import platform
import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import IO

import torch
import yaml

from trainer.config import Config, ConfigError
from trainer.models.checkpoints import CheckpointError, write_atomically

PACKAGES = ("torch", "torchvision", "numpy", "safetensors", "redis", "fastapi", "httpx", "pydantic")
STATES = "states"
SHOWN = 3  # settings named in an error; the rest are counted
LAUNCH = ".launch"
"""Holds the name of the start of torchrun that the run is of, which its restarts share."""


def make_folder(parent: Path, name: str) -> Path:
    """A new folder `parent/name`, or `name-2`, `name-3` … where that is taken; two runs never share one."""
    parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, 10_000):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise OSError(f"{parent} holds 9,999 runs named {name}; set another --run.name or --run.dir")


def find_folder(parent: Path, name: str) -> Path | None:
    """The latest of the folders that `make_folder` made of this name and that holds a state; None without one."""
    pattern = re.compile(re.escape(name) + r"(?:-(\d+))?")
    numbered = [
        (int(match[1] or 1), folder)
        for folder in (parent.iterdir() if parent.is_dir() else ())
        if (match := pattern.fullmatch(folder.name)) and any((folder / STATES).glob("step_*"))
        if is_of(folder, name)
    ]
    return max(numbered)[1] if numbered else None


def is_of(folder: Path, name: str) -> bool:
    """Whether a folder may be of a run of that name: `x-2` is of the second run named x, or of one named x-2."""
    return folder.name == name or _name_in(folder) != folder.name


def _name_in(folder: Path) -> str | None:
    """The name of the run that a folder is of; None where its settings do not say."""
    try:
        return str(yaml.safe_load((folder / "config.yaml").read_text("utf-8"))["run"]["name"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def open_folder(config: Config, resume: Path | None, launch: str, *, must_resume: bool) -> tuple[Path, Path | None]:
    """The run's folder, and the state in it to go on from.

    Args:
        config: of the run, with its name.
        resume: the folder of a run or of one of its states; None looks for the latest run of the name.
        launch: of the group where torchrun has started it again, and else empty; then the run goes on in the folder
            that it began in.
        must_resume: whether it is an error that there is nothing to go on from.

    Returns:
        The folder, and the state's: None where the run begins, or where the folder's latest state is meant.

    Raises:
        ConfigError: there is nothing to go on from.
    """
    name = str(config.run.name)
    state = resume if resume is not None and resume.parent.name == STATES else None
    folder = resume if state is None else state.parent.parent
    if launch:
        if folder is not None and _is_marked(folder, launch):
            return folder, None
        begun = (path.parent for path in config.run.dir.glob(f"*/{LAUNCH}") if _is_marked(path.parent, launch))
        if (own := next((each for each in begun if _name_in(each) in {name, None}), None)) is not None:
            return own, None
    if folder is not None:
        if not any((folder / STATES).glob("*step_*")):
            raise ConfigError(f"--resume {resume}: no run's folder with states; give RUN or RUN/{STATES}/step_…")
        return folder, state
    found = find_folder(config.run.dir, name)
    if found is not None and (must_resume or config.run.resume == "auto"):
        return found, None
    if must_resume:
        raise ConfigError(f"--resume: no run named {name} in {config.run.dir} has a state; start it without --resume")
    return make_folder(config.run.dir, name), None


def mark(folder: Path, launch: str) -> None:
    """Have `open_folder` find a folder that is held, if torchrun starts its run again."""
    if launch:
        write_text(folder / LAUNCH, launch)


def _is_marked(folder: Path, launch: str) -> bool:
    path = folder / LAUNCH
    return path.is_file() and path.read_text() == launch


def drop_end(folder: Path) -> None:
    """Remove what a finished run says of its end, before the state that it is of goes."""
    (folder / "summary.json").unlink(missing_ok=True)
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)


def drop_after(folder: Path, step: int) -> None:
    """Remove what was drawn and measured after later steps than this one, and what kills left half written.

    Those steps are about to be taken again.
    """
    for path in (*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")):
        if path.is_file():
            path.unlink()
    for path in (*(folder / "grids").glob("step_*.png"), *(folder / "evaluations").glob("step_*.json")):
        number = path.stem.removeprefix("step_")
        if number.isdecimal() and int(number) > step:  # a copy has another name
            path.unlink()


def hold(folder: Path, by: str = "run is", option: str = "--run.name") -> IO[bytes]:
    """Keep a folder for this process alone, as long as what comes back is open; the system lets go of it at the end.

    Args:
        folder: is made where it is missing.
        by: what another would be that has it, for the error.
        option: that would name another folder.

    Raises:
        ConfigError: another has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(f"{folder}: another {by} at work there; wait for it, or give another {option}") from None
    except OSError:  # a file system without locks
        pass
    return file


def check_settings(folder: Path, config: Config) -> None:
    """Name the settings in which a run that goes on differs from how it began.

    Raises:
        CheckpointError: there are such settings, and they would change what is learnt, or how it is measured.
    """
    try:
        began = Config.model_validate(yaml.safe_load((folder / "config.yaml").read_text("utf-8")))
    except (OSError, ValueError, yaml.YAMLError):  # without it the state's digest of them is all there is
        return
    was, now = (_flat(each.fixed() | {"eval": each.measured()}) for each in (began, config))
    changed = [
        f"{key} was {was.get(key)} and is {now.get(key)}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    ]
    if changed:
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        remedy = "resume with the settings that the run began with, or start another under a new --run.name"
        raise CheckpointError(f"{folder}: {'; '.join(changed[:SHOWN])}{more}; {remedy}")


def _flat(value: object, path: str = "") -> dict[str, object]:
    """Each setting by its `section.key`, as the command line names it."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {path.removeprefix("."): value}
    return {name: each for key, part in value.items() for name, each in _flat(part, f"{path}.{key}").items()}


def describe(folder: Path, config: Config, device: torch.device) -> None:
    """Write down the settings and the versions that the run has now, weights by paths that hold from anywhere."""
    settings = config.to_dict()
    for stage in ("var", "vqvae"):
        path = Path(settings["model"][stage])
        if path.is_file():
            settings["model"][stage] = str(path.absolute())
    write_text(folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    system = os.uname()
    versions = {
        "python": platform.python_version(),
        "platform": f"{system.sysname} {system.release} {system.machine}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": str(torch.get_num_threads()),
        **{package: version(package) for package in PACKAGES},
    }
    write_text(folder / "versions.json", json.dumps(versions, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    content = text.encode()
    write_atomically(path, len(content), lambda temporary: temporary.write_bytes(content))
