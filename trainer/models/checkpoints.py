"""Reads and writes VAR and VQVAE weights in the layout of the published checkpoints, strictly.

A source is a local path (`.safetensors`, or a `.pth` of plain tensors) or a published name such as
`FoundationVision/var:var_d16.pth`. Files written here are safetensors whose metadata holds the configuration as JSON;
for a file without it the configuration is read off the shapes.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
import struct
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trainer.models.var import OFFICIAL_DEPTHS, PATCH_NUMS_256, VAR, VARConfig
from trainer.models.vqvae import VQVAE, VQVAEConfig

PUBLISHED_REPOSITORY = "FoundationVision/var"
PUBLISHED_VQVAE = "vae_ch160v4096z32.pth"
PUBLISHED_FILES = (*(f"var_d{depth}.pth" for depth in OFFICIAL_DEPTHS), PUBLISHED_VQVAE)
SHOWN = 3  # entries named in an error; the rest are counted

_PUBLISHED_SOURCE = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+):(?P<file>[^/\\]+)")
_UNREADABLE = (
    *(RuntimeError, OSError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, ImportError),
    *(pickle.UnpicklingError, struct.error, SafetensorError),
)
_DRAWS = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)
Source = str | os.PathLike[str]
State = dict[str, Tensor]
Config = TypeVar("Config", VARConfig, VQVAEConfig)
Made = TypeVar("Made")


class CheckpointError(Exception):
    """A checkpoint could not be found, read, trusted or written.

    The one error of this module. Its message is one line: the file, what was expected, and the remedy.
    """


def load_var(source: Source, *, depth: int | None = None, device: str | torch.device = "cpu") -> VAR:
    """Loads a transformer, in float32 and eval mode.

    Args:
        source: local path or published name.
        depth: the depth that the caller relies on; a published name implies it.
        device: where the weights go.

    Returns:
        The model; its `config` is that of the file.

    Raises:
        CheckpointError: the file is missing, unreadable, or not a VAR of that depth.
    """
    path, state, metadata = _read(source)
    stored = _stored_config(path, metadata, "var")
    if stored is None:
        _require(path, state, "VAR", "word_embed.weight", "class_emb.weight", "lvl_1L", "head.weight")
        config = _construct(path, lambda: _infer_var(state))
    else:
        config = _parse(path, VARConfig, stored)
    published = re.fullmatch(r"var_d(\d+)\.pth", path.name) if _PUBLISHED_SOURCE.fullmatch(str(source)) else None
    expected = depth if depth is not None else int(published[1]) if published else None
    if expected is not None and config.depth != expected:
        raise CheckpointError(
            f"{path}: expected a VAR of depth {expected}, the file holds one of depth {config.depth}; "
            f"name the file of depth {expected}, or set the depth to {config.depth}"
        )
    model = _construct(path, lambda: VAR(config))
    level_1L = state.get("lvl_1L")
    _fill(path, model, state, f"a VAR of depth {config.depth} and width {config.width}", device)
    sides = [scale for scale, side in enumerate(config.patch_nums) for _ in range(side * side)]
    if level_1L is None or level_1L.flatten().tolist() != sides:
        raise CheckpointError(f"{path}: its scales are not {config.patch_nums}, as its configuration says; get it anew")
    return model.eval()


def load_vqvae(
    source: Source, *, patch_nums: tuple[int, ...] | None = None, device: str | torch.device = "cpu"
) -> VQVAE:
    """Loads an image tokenizer, in float32, eval mode and frozen.

    Args:
        source: local path or published name.
        patch_nums: the scales that the caller relies on. The published file fits any ten scales and does not name
            them: without this, those for 256×256 pixels are taken.
        device: where the weights go.

    Returns:
        The model, no parameter of which requires a gradient.

    Raises:
        CheckpointError: the file is missing, unreadable, or not a VQVAE of those scales.
    """
    path, state, metadata = _read(source)
    stored = _stored_config(path, metadata, "vqvae")
    if stored is None:
        _require(path, state, "VQVAE", "quantize.embedding.weight", "encoder.conv_in.weight")
        config = _construct(path, lambda: _infer_vqvae(state, patch_nums or PATCH_NUMS_256))
    else:
        config = _parse(path, VQVAEConfig, stored)
    if patch_nums is not None and config.patch_nums != tuple(patch_nums):
        raise CheckpointError(
            f"{path}: expected a VQVAE of the scales {tuple(patch_nums)}, the file holds one of {config.patch_nums}; "
            "name the tokenizer that its transformer was trained with"
        )
    model = _construct(path, lambda: VQVAE(config))
    _fill(path, model, state, f"a VQVAE of {config.vocab_size} codes and {len(config.patch_nums)} scales", device)
    return model.eval().requires_grad_(False)


def check_pair(var: VAR, vqvae: VQVAE) -> None:
    """Holds a transformer and a tokenizer to each other.

    Raises:
        CheckpointError: vocabulary, latent channels or scales differ.
    """
    ours, theirs = var.config, vqvae.config
    for name, of_var, of_vqvae in (
        ("vocabulary", ours.vocab_size, theirs.vocab_size),
        ("latent channels", ours.latent_channels, theirs.z_channels),
        ("scales", ours.patch_nums, tuple(theirs.patch_nums)),
    ):
        if of_var != of_vqvae:
            raise CheckpointError(
                f"the transformer's {name} are {of_var}, the tokenizer's {of_vqvae}; "
                "name the tokenizer that the transformer was trained with"
            )


def save_var(
    path: Source, model: VAR, metadata: Mapping[str, str] | None = None, *, dtype: torch.dtype | None = None
) -> None:
    """Writes a transformer as safetensors, atomically.

    Args:
        path: the file; its folder is made where it is missing.
        model: on any device.
        metadata: further strings to keep, such as how the weights came to be.
        dtype: floating-point type to store, the model's own without it; loading gives float32 again.

    Raises:
        ValueError: `metadata` uses a name that is taken (`format`, `model`, `config`).
        CheckpointError: the file cannot be written, the disk being full for instance; an older file of that name is
            then left as it was, and nothing half-written stays.
    """
    _save(Path(path), model, "var", metadata or {}, dtype)


def save_vqvae(
    path: Source, model: VQVAE, metadata: Mapping[str, str] | None = None, *, dtype: torch.dtype | None = None
) -> None:
    """Writes an image tokenizer as safetensors, atomically; arguments and errors are those of `save_var`."""
    _save(Path(path), model, "vqvae", metadata or {}, dtype)


def read_metadata(path: Source) -> dict[str, str]:
    """The strings kept in a safetensors file.

    Raises:
        CheckpointError: the file is missing or no safetensors file.
    """
    return _read(path)[2]


def write_atomically(path: Path, needed: int, write: Callable[[Path], object]) -> None:
    """Writes a file so that it is there whole or not at all.

    Args:
        path: the file; its folder is made where it is missing.
        needed: its size in bytes, for the error.
        write: writes everything to the temporary path it is given, in the same folder.

    Raises:
        CheckpointError: the system refused; the temporary file is gone and an older file is left as it was.
    """
    path = Path(os.path.realpath(path))  # a link stays one; what it names is replaced
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: is no regular file, and would be replaced by one; name another")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask wants it; safetensors would make the file its owner's alone
        write(temporary)
        temporary.chmod(mode)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot be written ({_first_line(error)}); it needs {needed:,} bytes and {_free_space(path)}; "
            "make room or name another folder"
        ) from error
    finally:
        with suppress(OSError):  # gone once renamed
            temporary.unlink()


def _save(path: Path, model: VAR | VQVAE, kind: str, metadata: Mapping[str, str], dtype: torch.dtype | None) -> None:
    own = {"format": "pt", "model": kind, "config": json.dumps(asdict(model.config))}
    if taken := sorted(own.keys() & metadata.keys()):
        raise ValueError(f"metadata holds {', '.join(taken)}; these names are taken, choose others")
    state: State = {}
    for name, entry in model.state_dict().items():
        target = dtype if dtype is not None and entry.is_floating_point() else entry.dtype
        state[name] = entry.detach().to("cpu", target).contiguous()
    needed = sum(entry.nbytes for entry in state.values())
    write_atomically(path, needed, lambda temporary: save_file(state, temporary, {**metadata, **own}))


def sync(path: Path) -> None:
    """Have the system write a file or folder to its disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _free_space(path: Path) -> str:
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    return f"{shutil.disk_usage(folder).free:,} are free"


def _read(source: Source) -> tuple[Path, State, dict[str, str]]:
    """The file behind a source, its tensors (mapped, not yet read) and its metadata."""
    path = _resolve(source)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return path, {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        with path.open("rb") as opened:
            is_zip = opened.read(2) == b"PK"  # what torch.save has written since 1.6; the older kind cannot be mapped
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unusual pickle protocol is either read or refused below
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except _UNREADABLE as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path} ({size:,} bytes): expected a checkpoint of plain tensors, but it cannot be read as one "
            f"({_first_line(error)}); it is truncated, no checkpoint, or holds code, which is never run: get it anew"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) and isinstance(k, str) for k, v in state.items()):
        raise CheckpointError(
            f"{path}: expected names and tensors, found {_outline(state)}; "
            "save the model's state_dict() alone, not a whole training state"
        )
    return path, state, {}


def _resolve(source: Source) -> Path:
    path, published = Path(source), _PUBLISHED_SOURCE.fullmatch(str(source))
    if path.is_file():
        return path
    if path.is_dir():
        raise CheckpointError(f"{path}: expected a .safetensors or .pth file, this is a folder; name a file in it")
    names = f"{PUBLISHED_REPOSITORY}:NAME with NAME one of {', '.join(PUBLISHED_FILES)}"
    if published is None:
        raise CheckpointError(f"{path}: no such file; correct the path, or use a published name, {names}")
    if published["repository"] != PUBLISHED_REPOSITORY or published["file"] not in PUBLISHED_FILES:
        raise CheckpointError(f"{source}: no such published checkpoint; expected {names}, or a path that exists")
    with suppress(OSError, EntryNotFoundError):  # published files do not change, so the cache needs no network
        return Path(hf_hub_download(PUBLISHED_REPOSITORY, published["file"], local_files_only=True))
    try:
        return Path(hf_hub_download(PUBLISHED_REPOSITORY, published["file"]))
    except (OSError, EntryNotFoundError, RuntimeError) as error:
        raise CheckpointError(
            f"{source}: not in the local cache and cannot be fetched ({_first_line(error.__cause__ or error)}); "
            f"connect to the network once, or copy {published['file']} here by hand and name its path"
        ) from error


def _stored_config(path: Path, metadata: Mapping[str, str], kind: str) -> dict[str, Any] | None:
    if "config" not in metadata:
        return None
    if metadata.get("model") != kind:
        raise CheckpointError(
            f"{path}: expected a {kind.upper()}, the file holds a {metadata.get('model', '?').upper()}; name the other"
        )
    try:
        stored = json.loads(metadata["config"])
    except ValueError:
        stored = None
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path}: the configuration in its metadata is not a JSON object; write the file anew")
    return stored


def _parse(path: Path, kind: Callable[..., Config], stored: dict[str, Any]) -> Config:
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
    return _construct(path, lambda: kind(**values))


class _WithoutDraws(TorchFunctionMode):
    """Leaves new parameters unset: drawing values that a file replaces takes longer than reading it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        given = kwargs or {}
        return (given["tensor"] if "tensor" in given else args[0]) if func in _DRAWS else func(*args, **given)


def _construct(path: Path, make: Callable[[], Made]) -> Made:
    """Makes a configuration or an empty model out of what the file says."""
    try:
        with _WithoutDraws():
            return make()
    except (TypeError, ValueError, IndexError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{path}: its configuration or shapes are those of no model here ({_first_line(error)}); get the file anew"
        ) from error


def _infer_var(state: State) -> VARConfig:
    """The configuration that the shapes of an official state dict imply."""
    width, latent_channels = state["word_embed.weight"].shape
    scale_mul, hidden = state.get("blocks.0.attn.scale_mul_1H11"), state.get("blocks.0.ffn.fc1.bias")
    return VARConfig(
        depth=_count(state, r"blocks\.(\d+)\."),
        width=width,
        heads=scale_mul.shape[1] if scale_mul is not None else width // 64,
        patch_nums=tuple(math.isqrt(n) for n in torch.bincount(state["lvl_1L"].flatten()).tolist()),
        vocab_size=state["head.weight"].shape[0],
        latent_channels=latent_channels,
        num_classes=state["class_emb.weight"].shape[0] - 1,
        l2_norm_attention=scale_mul is not None,
        shared_adaln="shared_ada_lin.1.weight" in state,
        mlp_ratio=len(hidden) / width if hidden is not None else 4.0,
    )


def _infer_vqvae(state: State, patch_nums: tuple[int, ...]) -> VQVAEConfig:
    """The configuration that the shapes of an official state dict imply; GroupNorm has the published 32 groups."""
    vocab_size, z_channels = state["quantize.embedding.weight"].shape
    ch = state["encoder.conv_in.weight"].shape[0]
    levels = range(_count(state, r"encoder\.down\.(\d+)\."))
    widths = [state.get(f"encoder.down.{level}.block.0.conv1.bias") for level in levels]
    return VQVAEConfig(
        vocab_size=vocab_size,
        z_channels=z_channels,
        ch=ch,
        ch_mult=tuple(1 if width is None else len(width) // ch for width in widths),
        num_res_blocks=_count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        patch_nums=tuple(patch_nums),
        share_quant_resi=_count(state, r"quantize\.quant_resi\.qresi_ls\.(\d+)\."),
    )


def _count(state: State, pattern: str) -> int:
    found = [int(match[1]) for match in (re.match(pattern, name) for name in state) if match]
    return max(found, default=-1) + 1


def _require(path: Path, state: State, kind: str, *names: str) -> None:
    if absent := [name for name in names if name not in state]:
        raise CheckpointError(
            f"{path}: expected a {kind}, the file has {_outline(state)} and lacks {_few(absent)}; "
            f"name a file that holds a {kind}"
        )


def _fill(path: Path, model: nn.Module, state: State, kind: str, device: str | torch.device) -> None:
    """Copies the tensors into a model without values, once all names and shapes agree."""
    wanted = {name: tuple(entry.shape) for name, entry in model.state_dict().items()}
    found = {name: tuple(entry.shape) for name, entry in state.items()}
    faults = []
    if missing := sorted(wanted.keys() - found.keys()):
        faults.append(f"{len(missing)} entries missing ({_few(missing)})")
    if unknown := sorted(found.keys() - wanted.keys()):
        faults.append(f"{len(unknown)} unknown ({_few(unknown)})")
    differing = sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name])
    if differing:
        described = [f"{name} is {found[name]} and not {wanted[name]}" for name in differing]
        faults.append(f"{len(differing)} of another shape ({_few(described)})")
    if faults:
        raise CheckpointError(
            f"{path}: expected {kind}: {'; '.join(faults)}; name a file of that layout, or get this one anew"
        )
    model.to_empty(device=device).load_state_dict(state, strict=True)


def _few(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _outline(state: object) -> str:
    if not isinstance(state, dict):
        return f"a {type(state).__name__}"
    return f"{len(state)} entries ({_few(sorted(map(str, state)))})"


def _first_line(error: BaseException) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return "it holds no plain tensors"  # torch's own message advises to run the code
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
