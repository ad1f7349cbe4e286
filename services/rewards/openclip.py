"""Loads `open_clip` models: by pretrained tag, or from a file in OpenAI's or open_clip's layout."""

import contextlib
import difflib
import logging
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from open_clip.factory import convert_state_dict, download_pretrained
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms import Compose

from services.rewards.activation import Sign, refuse_other, sign_of
from services.rewards.sources import Source, WeightsError, check_file, sha256_of

OPENAI_MARKS = ("input_resolution", "context_length", "vocab_size")
"""Numbers that OpenAI's state dicts hold beside the weights."""
REASON_CHARS = 120
SHOWN = 3
MINIATURE = Path(__file__).parent / "weights" / "mini-clip.json"

State = dict[str, Tensor]


class Loaded(NamedTuple):
    """A model with what belongs to it.

    Attributes:
        model: in float32, frozen, in eval mode, on the CPU.
        tokenizer: turns texts into token indices.
        transform: what makes its input of a PIL image.
    """

    model: nn.Module
    tokenizer: Any
    transform: Compose


def load_clip(name: str, source: Source, *, cache_dir: Path | None = None) -> Loaded:
    """Load a model.

    Args:
        name: of an `open_clip` model, or `mini-clip`.
        source: one of the model's pretrained tags, or a file: safetensors, a state dict that `torch.save` wrote,
            perhaps under `state_dict`, or a TorchScript archive as OpenAI published it.
        cache_dir: where downloads are kept; open_clip's own place by default.

    Raises:
        WeightsError: there is no such model or tag, or its weights cannot be had, read or used.
    """
    config = config_of(name)
    if source.path is None:
        path, preprocessing = _download(name, config, source, cache_dir)
        state = read_state(path)
    else:
        path, preprocessing = check_file(source.path, source.sha256), {}
        state = read_state(path)
        sign = sign_of(path, openais=any(mark in state for mark in OPENAI_MARKS))
        if sign is not None:
            refuse_other(name, config, sign)
    model = create_model(name, preprocessing)
    _fill(model, name, path, state)
    transform = image_transform_v2(PreprocessCfg(**open_clip.get_model_preprocess_cfg(model)), is_train=False)
    try:
        with _without_chatter():
            tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # likewise
        raise WeightsError(
            f"the tokenizer of {name} cannot be had: {_reason(error)}: have it in the hub's cache"
        ) from error
    return Loaded(model.eval().requires_grad_(False), tokenizer, transform)


def config_of(name: str) -> dict[str, Any]:
    """The configuration of a model, as open_clip has it.

    Raises:
        WeightsError: there is no such model.
    """
    if MINIATURE.stem not in open_clip.list_models():
        open_clip.add_model_config(MINIATURE)
    config: dict[str, Any] | None = open_clip.get_model_config(name)
    if config is None:
        close = difflib.get_close_matches(name, open_clip.list_models(), n=SHOWN)
        remedy = f"did you mean {' or '.join(close)}?" if close else "open_clip.list_models() lists them"
        raise WeightsError(f"open_clip knows no model {name!r}: {remedy}")
    return config


def read_state(path: Path) -> State:
    """The tensors of a checkpoint, by name; nothing in the file is run.

    Raises:
        WeightsError: it is no checkpoint, or holds more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        elif _is_torchscript(path):
            content = _published_archive(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"weights {path} hold more than tensors, or are no checkpoint, and are not opened: "
            "save the model's state_dict() as safetensors"
        ) from error
    except Exception as error:  # a damaged file makes anything of its readers fail
        raise WeightsError(f"weights {path} cannot be read: {_reason(error)}: fetch them again") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content or not all(isinstance(key, str) for key in content):
        raise WeightsError(f"weights {path} hold a {type(content).__name__}: give tensors by name")
    state = {key.removeprefix("module."): value for key, value in content.items()}
    strangers = [key for key, value in state.items() if not isinstance(value, Tensor) and key not in OPENAI_MARKS]
    if strangers:
        raise WeightsError(f"weights {path}: {strangers[0]!r} is no tensor: give the state dict of an open_clip model")
    return {key: value if isinstance(value, Tensor) else torch.tensor(0) for key, value in state.items()}


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def _published_archive(path: Path) -> State:
    """The tensors of a TorchScript archive: a program, and so accepted only where it is one that OpenAI published."""
    if sha256_of(path) not in _openai_digests():
        raise WeightsError(
            f"weights {path} are a program (TorchScript) that OpenAI did not publish: "
            "save its state_dict() as safetensors"
        )
    state: State = dict(torch.jit.load(path, map_location="cpu").state_dict())
    return state | {mark: torch.tensor(0) for mark in OPENAI_MARKS}


def _openai_digests() -> set[str]:
    """Of OpenAI's archives; their addresses hold them."""
    models = open_clip.list_pretrained_models_by_tag("openai")
    return {open_clip.get_pretrained_url(model, "openai").split("/")[-2] for model in models}


def _download(name: str, config: dict[str, Any], source: Source, cache_dir: Path | None) -> tuple[Path, dict[str, Any]]:
    """The file of a tag, and the pre-processing that it wants."""
    tag = str(source.name)
    known = open_clip.get_pretrained_cfg(name, tag)
    if not known:
        tags = open_clip.list_pretrained_tags_by_model(name)
        remedy = f"give one of {', '.join(tags)}, or a path" if tags else "there are none by name, give a path"
        raise WeightsError(f"model {name} has no weights {tag!r}: {remedy}")
    refuse_other(name, config, Sign(f"weights {tag!r}", bool(known.get("quick_gelu"))))
    try:
        return Path(download_pretrained(known, cache_dir=None if cache_dir is None else str(cache_dir))), known
    except Exception as error:  # of the hub's client, urllib or the disk
        raise WeightsError(
            f"weights {tag!r} of {name} cannot be fetched: fetch them where there is a network, or give the path of a "
            f"file ({_reason(error)})"
        ) from error


def create_model(name: str, preprocessing: dict[str, Any]) -> nn.Module:
    """Create a model with random weights.

    Args:
        name: of an `open_clip` model, or `mini-clip`.
        preprocessing: in place of the model's own, where not None.

    Raises:
        WeightsError: there is no such model.
    """
    config_of(name)
    changes = {key: value for key, value in preprocessing.items() if value is not None}
    try:
        with _without_chatter():
            model: nn.Module = open_clip.create_model(name, pretrained_text=False, force_preprocess_cfg=changes)
    except Exception as error:  # of the hub's client, for a text tower that has its configuration there
        raise WeightsError(
            f"model {name} cannot be made: {_reason(error)}: have the hub's files in its cache"
        ) from error
    return model


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Keep from the log what open_clip says there of a model that has no weights; it is about to get them."""
    root = logging.getLogger()

    def is_not_open_clips(record: logging.LogRecord) -> bool:
        return "open_clip" not in record.pathname

    root.addFilter(is_not_open_clips)
    try:
        yield
    finally:
        root.removeFilter(is_not_open_clips)


def _fill(model: nn.Module, name: str, path: Path, state: State) -> None:
    """Put the weights into the model, all of them and no other."""
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    for mark in OPENAI_MARKS:
        state.pop(mark, None)
    state = convert_state_dict(model, state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    own = model.state_dict()
    for scalar in ("logit_scale", "logit_bias"):  # of no or of one dimension
        if scalar in state and scalar in own:
            state[scalar] = state[scalar].reshape(own[scalar].shape)
    wrong = [f"{key} is missing" for key in own if key not in state]
    wrong += [f"{key} is unknown" for key in state if key not in own]
    wrong += [
        f"{key} is {tuple(state[key].shape)} in place of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise WeightsError(f"weights {path} are not of {name}: {', '.join(wrong[:SHOWN])}{more}; name their model")
    model.load_state_dict(state)


def _reason(error: BaseException) -> str:
    """An error of others in a few printable words."""
    words = "".join(letter if letter.isprintable() else " " for letter in str(error))
    return " ".join(words.split())[:REASON_CHARS] or type(error).__name__


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Convolutions on a GPU in float32 proper, not in TF32."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield
