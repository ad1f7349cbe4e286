"""Keeps the states a run resumes from: each on disk whole or not at all, the last few and the best, checked when read.

A folder holds the states of one run. A state is a folder in it, `step_00000123`, of `state.safetensors`, `values.json`
and `manifest.json`; the manifest says which run and step it is and how long and which every other file must be.
"""

import hashlib
import json
import os
import re
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from trainer.models.checkpoints import CheckpointError, sync, write_atomically

FORMAT = 1
TENSORS, VALUES, MANIFEST = "state.safetensors", "values.json", "manifest.json"

_STEP = re.compile(r"step_(\d{8,})|\.step_(\d{8,})\.old")  # the second: set aside while the step is saved once more


@dataclass(frozen=True, eq=False)
class RunState:
    """All that a run needs to go on as if it had not stopped.

    Args:
        step: steps done, from 0.
        tensors: by name; on any device when saved, on the CPU when loaded.
        values: what JSON holds, with finite numbers; lists for tuples, and names that are strings.
        score: finite, higher is better, such as the mean reward; None where there is none.
    """

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]
    score: float | None = None


@dataclass(frozen=True)
class _Manifest:
    format: int
    run: str
    step: int
    score: float | None
    files: dict[str, tuple[int, str]]  # size in bytes and SHA-256


class _DamagedError(CheckpointError):
    """A state that can never be read again; another run's, or one of a format to come, is not ours to delete."""


class Checkpoints:
    """The states of one run in one folder.

    Args:
        folder: made by the first save.
        keep: how many of the last states stay, at least 1; the best by score stays besides.
        run: identity of the run, such as a digest of the settings that must agree for a run to go on.

    Raises:
        ValueError: `keep` is below 1.
    """

    def __init__(self, folder: Path, *, keep: int, run: str) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least the last state must stay: set 1 or more")
        self.folder, self._keep, self._run = folder, keep, run
        self._continues = False  # whether this run goes on from a state of the folder

    def save(self, state: RunState) -> Path:
        """Writes a state; only once it is durable, those that need not stay are deleted.

        The same step's former state is replaced. States of later steps are those of a continuation that was given up,
        for the run was resumed from before them, and are deleted, as are damaged ones.

        Args:
            state: not to be changed meanwhile.

        Returns:
            The state's folder.

        Raises:
            ValueError: a tensor, a value, the step or the score is none that can be stored.
            CheckpointError: the state cannot be written, the disk being full for instance, or the folder holds
                another run's states, or later ones that the run was not resumed from; all states are as before.
        """
        _check_state(state)
        target = self.folder / f"step_{state.step:08d}"
        temporary = _temporary(target)
        try:
            _clean(self.folder)
            self._check_folder(state.step)
            self._write(temporary, state)
            _put(temporary, target)
        except OSError as error:
            raise CheckpointError(f"{target}: cannot be written ({error}); make room or name another folder") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._continues = True
        self._prune(state.step)
        return target

    def steps(self) -> list[int]:
        """The steps whose states are there, ascending; damage is for `load` to find."""
        return list(_states(self.folder))

    def latest(self) -> Path | None:
        """The state of the last step."""
        return next(reversed(_states(self.folder).values()), None)

    def best(self) -> Path | None:
        """The state of the highest score, the later one of two; None where no state has a score.

        Raises:
            CheckpointError: the folder holds another run's states.
        """
        step = _best(self._whole())
        return None if step is None else _states(self.folder)[step]

    def load(self, path: Path | None = None) -> RunState:
        """Reads a state, every byte of which is checked.

        Args:
            path: a state's folder, in any folder of states; the last step's without it.

        Raises:
            CheckpointError: there is none, or it is damaged, another run's, or of a newer format; the message names
                the state to resume from in its place.
        """
        path = path if path is not None else self.latest()
        if path is None:
            raise CheckpointError(f"{self.folder}: expected a run's states, found none; start the run without --resume")
        try:
            manifest = self._verify(path)
            tensors, values = load_file(path / TENSORS), json.loads((path / VALUES).read_bytes())
        except (CheckpointError, OSError) as error:
            raise CheckpointError(f"{error}; {self._way_out(path)}") from error
        self._continues |= path.parent.resolve() == self.folder.resolve()
        return RunState(manifest.step, tensors, values, manifest.score)

    def _check_folder(self, step: int) -> None:
        """Refuses to write among states that this run did not come from."""
        self._whole()
        if not self._continues and (last := max(self.steps(), default=step)) > step:
            raise CheckpointError(
                f"{self.folder}: holds the state of step {last}, and the run, now at step {step}, was not resumed from "
                "a state in it; resume it with --resume, or name another folder"
            )

    def _write(self, folder: Path, state: RunState) -> None:
        tensors, needed = _on_cpu(state.tensors), sum(tensor.nbytes for tensor in state.tensors.values())
        write_atomically(folder / TENSORS, needed, lambda path: save_file(tensors, path))
        _write_json(folder / VALUES, state.values)
        files = {name: ((folder / name).stat().st_size, _sha256(folder / name)) for name in (TENSORS, VALUES)}
        manifest = asdict(_Manifest(FORMAT, self._run, state.step, state.score, files))
        _write_json(folder / MANIFEST, {**manifest, "seal": _seal(manifest)})

    def _prune(self, step: int) -> None:
        whole = {found: manifest for found, manifest in self._whole().items() if found <= step}
        kept = {*list(whole)[-self._keep :], _best(whole)}
        for path in [path for found, path in _states(self.folder).items() if found not in kept]:
            with suppress(OSError):  # the next save tries again
                shutil.rmtree(path.rename(_temporary(path)))  # renamed, half of it is taken for no state

    def _whole(self) -> dict[int, _Manifest]:
        """The manifests of the states that look undamaged without a reading of all their bytes; ascending."""
        whole: dict[int, _Manifest] = {}
        for step, path in _states(self.folder).items():
            with suppress(_DamagedError):
                whole[step] = self._verify(path, thorough=False)
        return whole

    def _verify(self, path: Path, *, thorough: bool = True) -> _Manifest:
        """The manifest of a state of this run, once its files are those that the manifest records."""
        manifest = _read_manifest(path, self._run)
        for name, (size, digest) in manifest.files.items():
            file = path / name
            found = file.stat().st_size if file.exists() else None
            if found != size:
                shown = "no file" if found is None else f"{found:,} bytes"
                raise _DamagedError(f"{file}: found {shown}, expected {size:,} bytes; it is damaged")
            if thorough and (content := _sha256(file)) != digest:
                raise _DamagedError(f"{file}: found SHA-256 {content[:16]}…, expected {digest[:16]}…; it was altered")
        return manifest

    def _way_out(self, path: Path) -> str:
        """What to do when a state cannot be resumed from."""
        for earlier, candidate in reversed(_states(path.parent).items()):
            if earlier < (_step(path) or 0):
                with suppress(CheckpointError, OSError):
                    self._verify(candidate)
                    return f"the one before it is {candidate}: resume with --resume {candidate}"
        return "no complete one of this run is before it: name another, or start the run without --resume"


def _check_state(state: RunState) -> None:
    """Finds before anything is written what would not come back as it was."""
    if state.step < 0:
        raise ValueError(f"step is {state.step}; steps are counted from 0")
    plain = {"values": state.values, "score": state.score}
    try:
        same = json.loads(json.dumps(plain, allow_nan=False)) == plain
    except (TypeError, ValueError) as error:
        raise ValueError(f"values or score: {error}; give what JSON holds, and finite numbers") from error
    if not same:
        raise ValueError("values: JSON makes lists of tuples and strings of other names; give lists and strings")
    for name, tensor in state.tensors.items():
        try:
            load(save({name: torch.empty(0, dtype=tensor.dtype)}))
        except (KeyError, ValueError, SafetensorError) as error:
            raise ValueError(f"tensor {name!r}, {tensor.dtype}: safetensors has no such name or dtype") from error


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors wants them: contiguous, no two in the same memory."""
    copies = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    owners = set({tensor.untyped_storage().data_ptr(): name for name, tensor in copies.items()}.values())
    return {name: tensor if name in owners else tensor.clone() for name, tensor in copies.items()}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    content = json.dumps(value, indent=2, allow_nan=False).encode() + b"\n"
    write_atomically(path, len(content), lambda temporary: temporary.write_bytes(content))


def _read_manifest(path: Path, run: str) -> _Manifest:
    file = path / MANIFEST
    if not path.exists():
        raise CheckpointError(f"{path}: no such state")
    if _step(path) is None:
        raise CheckpointError(f"{path}: expected the folder of a state, named step_ and eight digits")
    try:
        content = json.loads(file.read_bytes())
        version, seal = int(content["format"]), content.pop("seal", None)
    except (ValueError, KeyError, TypeError, FileNotFoundError, NotADirectoryError) as error:
        raise _DamagedError(f"{file}: found no manifest ({error!r}), expected a state's; it is damaged") from error
    if version > FORMAT:
        raise CheckpointError(
            f"{file}: found format {version}, expected {FORMAT}; resume with the version that wrote it"
        )
    if seal != _seal(content):
        raise _DamagedError(f"{file}: found content that its seal is not of; it was altered")
    manifest = _Manifest(**content)
    if manifest.run != run:
        remedy = "resume with the settings that it was made with, or name another folder"
        raise CheckpointError(f"{file}: found the run {manifest.run}, expected {run}; {remedy}")
    if manifest.step != _step(path):
        raise _DamagedError(f"{file}: found step {manifest.step}, expected {_step(path)}; the folder was renamed")
    return manifest


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _best(manifests: dict[int, _Manifest]) -> int | None:
    scored = [(manifest.score, step) for step, manifest in manifests.items() if manifest.score is not None]
    return max(scored)[1] if scored else None


def _step(path: Path) -> int | None:
    match = _STEP.fullmatch(path.name)
    return int(match[1] or match[2]) if match else None


def _states(folder: Path) -> dict[int, Path]:
    """The states in a folder by step, ascending; one set aside counts where nothing has yet taken its place."""
    names = sorted(folder.iterdir()) if folder.is_dir() else []  # those set aside begin with a dot and come first
    found = {step: path for path in names if (step := _step(path)) is not None}
    return dict(sorted(found.items()))


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name.removeprefix('.')}.{os.getpid()}.tmp")


def _put(temporary: Path, target: Path) -> None:
    """Gives a written state its name, durably; at each moment the step has its former state or this one."""
    aside = target.with_name(f".{target.name}.old")
    if target.exists():
        target.rename(aside)
    temporary.rename(target)
    for folder in (target.parent, target.parent.parent):  # the second: the folder itself may be new
        sync(folder)
    shutil.rmtree(aside, ignore_errors=True)


def _clean(folder: Path) -> None:
    """Removes what killed saves left, and brings back a state that one of them had set aside."""
    for aside in folder.glob(".step_*.old"):
        target = folder / aside.name.removeprefix(".").removesuffix(".old")
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(target)
    for leftover in folder.glob(".step_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
