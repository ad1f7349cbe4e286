"""Checkpoints load strictly or fail with one clear line; a file is written whole or not at all."""

import json
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.conftest import TINY
from trainer.models.checkpoints import (
    PUBLISHED_FILES,
    CheckpointError,
    check_pair,
    load_var,
    load_vqvae,
    read_metadata,
    save_var,
    save_vqvae,
    write_atomically,
)
from trainer.models.var import VAR
from trainer.models.vqvae import VQVAE, VQVAEConfig

SIDES = TINY.patch_nums


class Malicious:
    """Unpickling this would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def equal(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in state.items())


def failure(load: Callable[[], object]) -> str:
    """The message of the error that must come: one line, not a wall."""
    with pytest.raises(CheckpointError) as caught:
        load()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


def test_saved_models_load_again(var: VAR, vqvae: VQVAE, tmp_path: Path) -> None:
    """Weights, configuration and metadata survive the round trip; missing folders are made."""
    var_path, vqvae_path = tmp_path / "new" / "var.safetensors", tmp_path / "new" / "vqvae.safetensors"
    save_var(var_path, var, {"seed": "7"})
    save_vqvae(vqvae_path, vqvae)
    loaded_var, loaded_vqvae = load_var(var_path, depth=2), load_vqvae(vqvae_path, patch_nums=SIDES)
    assert equal(loaded_var.state_dict(), var.state_dict())
    assert equal(loaded_vqvae.state_dict(), vqvae.state_dict())
    assert (loaded_var.config, loaded_vqvae.config) == (var.config, vqvae.config)
    assert not loaded_var.training
    assert not loaded_vqvae.training
    assert all(p.requires_grad for p in loaded_var.parameters())
    assert not any(p.requires_grad for p in loaded_vqvae.parameters())
    assert read_metadata(var_path)["seed"] == "7"
    check_pair(loaded_var, loaded_vqvae)
    assert sorted(os.listdir(tmp_path / "new")) == ["var.safetensors", "vqvae.safetensors"]


def test_a_checkpoint_is_as_readable_as_any_file(var: VAR, tmp_path: Path) -> None:
    """Its mode is what the umask leaves, so that another user's service or container can load it."""
    save_var(tmp_path / "var.safetensors", var)
    (tmp_path / "plain").touch()
    assert (tmp_path / "var.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_half_precision_storage(var: VAR, tmp_path: Path) -> None:
    """Weights stored as float16 come back as float32, rounded once; integers stay as they are."""
    path = tmp_path / "var.safetensors"
    save_var(path, var, dtype=torch.float16)
    assert load_file(path)["head.weight"].dtype == torch.float16
    loaded = load_var(path).state_dict()
    assert loaded["head.weight"].dtype == torch.float32
    assert equal(loaded, {k: v.half().float() if v.is_floating_point() else v for k, v in var.state_dict().items()})


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_official_layout_loads(var: VAR, vqvae: VQVAE, tmp_path: Path, zipped: bool) -> None:
    """A bare state dict written by torch.save loads; its configuration is read off the shapes."""
    for name, model in (("var.pth", var), ("vqvae.pth", vqvae)):
        torch.save(model.state_dict(), tmp_path / name, _use_new_zipfile_serialization=zipped)
    loaded_var, loaded_vqvae = load_var(tmp_path / "var.pth"), load_vqvae(tmp_path / "vqvae.pth", patch_nums=SIDES)
    assert (loaded_var.config, loaded_vqvae.config) == (var.config, vqvae.config)
    assert equal(loaded_var.state_dict(), var.state_dict())
    assert equal(loaded_vqvae.state_dict(), vqvae.state_dict())


def test_wrong_depth(var: VAR, tmp_path: Path) -> None:
    """A file of another depth than asked for names both."""
    torch.save(var.state_dict(), tmp_path / "var_d16.pth")
    message = failure(lambda: load_var(tmp_path / "var_d16.pth", depth=16))
    assert "var_d16.pth: expected a VAR of depth 16, the file holds one of depth 2" in message


def test_wrong_keys_and_shapes(var: VAR, tmp_path: Path) -> None:
    """Missing, unknown and misshapen entries are counted, and the first few named."""
    state = dict(var.state_dict())
    for name in [name for name in state if name.startswith("blocks.1.ffn")]:
        state[name.replace("ffn", "mlp")] = state.pop(name)
    state["head.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "var.pth")
    message = failure(lambda: load_var(tmp_path / "var.pth"))
    assert (
        "4 entries missing (blocks.1.ffn.fc1.bias, blocks.1.ffn.fc1.weight, blocks.1.ffn.fc2.bias and 1 more)"
        in message
    )
    assert "4 unknown (blocks.1.mlp" in message
    assert "1 of another shape (head.bias is (3,) and not (64,))" in message


def test_wrong_model_or_pair(var: VAR, vqvae: VQVAE, tmp_path: Path) -> None:
    """A tokenizer is not taken for a transformer, nor one tokenizer for another."""
    save_vqvae(tmp_path / "a.safetensors", vqvae)
    torch.save(vqvae.state_dict(), tmp_path / "a.pth")
    assert "expected a VAR, the file holds a VQVAE" in failure(lambda: load_var(tmp_path / "a.safetensors"))
    assert "lacks word_embed.weight" in failure(lambda: load_var(tmp_path / "a.pth"))
    assert "expected a VQVAE of the scales (1, 2)" in failure(
        lambda: load_vqvae(tmp_path / "a.safetensors", patch_nums=(1, 2))
    )
    assert "ema_vocab_hit_SV is (4, 64) and not (10, 64)" in failure(lambda: load_vqvae(tmp_path / "a.pth"))
    other = VQVAE(VQVAEConfig(vocab_size=32, z_channels=8, ch=32, patch_nums=SIDES))
    assert "vocabulary are 64, the tokenizer's 32" in failure(lambda: check_pair(var, other))


@pytest.mark.parametrize("name", ["var.safetensors", "var.pth"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated(var: VAR, tmp_path: Path, name: str, share: float) -> None:
    """A file that ends early is named with its size."""
    path = tmp_path / name
    save_var(path, var) if path.suffix == ".safetensors" else torch.save(var.state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    message = failure(lambda: load_var(path))
    assert f"{path} ({int(share * len(whole)):,} bytes): expected a checkpoint" in message
    assert "get it anew" in message


@pytest.mark.parametrize("content", [b"<!DOCTYPE html>\n<p>not found</p>\n", b"PK\x03\x04 not quite", bytes(200)])
@pytest.mark.parametrize("name", ["var.safetensors", "var.pth"])
def test_not_a_checkpoint(tmp_path: Path, name: str, content: bytes) -> None:
    """An error page or other bytes in place of weights are called what they are."""
    (tmp_path / name).write_bytes(content)
    assert "no checkpoint" in failure(lambda: load_var(tmp_path / name))


def test_code_is_refused_and_not_run(tmp_path: Path) -> None:
    """A pickle that would run code is refused, in either format of torch.save."""
    trap = tmp_path / "trap"
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"head.weight": Malicious(trap)}))
    torch.save({"head.weight": Malicious(trap)}, tmp_path / "zip.pth")
    for name in ("plain.pth", "zip.pth"):
        message = failure(lambda name=name: load_var(tmp_path / name))
        assert "holds code, which is never run" in message
        assert "weights_only" not in message
    assert not trap.exists()


def test_training_state_is_refused(var: VAR, tmp_path: Path) -> None:
    """A dict that wraps the weights says what to save."""
    torch.save({"model": var.state_dict(), "step": 3}, tmp_path / "var.pth")
    assert "2 entries (model, step); save the model's state_dict() alone" in failure(
        lambda: load_var(tmp_path / "var.pth")
    )


@pytest.mark.parametrize("config", ["{", "[]", '{"depth": 2}', '{"depth": 2, "width": 128, "heads": 3}', '{"hue": 1}'])
def test_spoilt_configuration(var: VAR, tmp_path: Path, config: str) -> None:
    """Metadata that does not describe a model is refused."""
    save_file(var.state_dict(), tmp_path / "var.safetensors", {"model": "var", "config": config})
    assert "configuration" in failure(lambda: load_var(tmp_path / "var.safetensors"))


def test_scales_that_contradict_the_configuration(var: VAR, tmp_path: Path) -> None:
    """Level indices that belong to other scales are refused although their shape fits."""
    state = {name: entry.clone() for name, entry in var.state_dict().items()}
    state["lvl_1L"][0, 1] = 0
    metadata = {"model": "var", "config": json.dumps(vars(TINY))}
    save_file(state, tmp_path / "var.safetensors", metadata)
    assert "its scales are not (1, 2, 3, 4)" in failure(lambda: load_var(tmp_path / "var.safetensors"))


def test_missing_files_and_unknown_names(tmp_path: Path) -> None:
    """A path that is not there and a name that is not published list what is."""
    for source in (tmp_path / "var.pth", "FoundationVision/var:var_d17.pth", "someone/else:var_d16.pth"):
        message = failure(lambda source=source: load_var(source))
        assert all(name in message for name in (str(source), *PUBLISHED_FILES))
    assert "this is a folder" in failure(lambda: load_var(tmp_path))


def test_offline(tmp_path: Path) -> None:
    """A published name without network and cache says how to go on."""
    code = (
        "from trainer.models.checkpoints import CheckpointError, load_var\n"
        "try: load_var('FoundationVision/var:var_d16.pth')\n"
        "except CheckpointError as error: print(error)"
    )
    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert child.stdout.startswith("FoundationVision/var:var_d16.pth: not in the local cache and cannot be fetched")
    assert "name its path" in child.stdout


def test_full_disk(var: VAR, tmp_path: Path) -> None:
    """A write that the system stops leaves the older file whole, nothing beside it, and says what it needed."""
    path = tmp_path / "var.safetensors"
    save_var(path, var, {"version": "old"})
    whole = path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = load_var(path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole // 2, hard))
    try:
        message = failure(lambda: save_var(path, model, {"version": "new"}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    needed = sum(entry.nbytes for entry in model.state_dict().values())
    assert f"{path}: cannot be written" in message
    assert f"it needs {needed:,} bytes" in message
    assert "are free; make room or name another folder" in message
    assert os.listdir(tmp_path) == ["var.safetensors"]
    assert read_metadata(path)["version"] == "old"


def test_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    """Whatever stops a writer half-way, a failing system or an interrupt, its temporary file goes."""
    path = tmp_path / "state.bin"
    path.write_bytes(b"old")
    for error, expected in ((OSError(28, "No space left on device"), CheckpointError), (KeyboardInterrupt(), None)):

        def write(temporary: Path, error: BaseException = error) -> None:
            temporary.write_bytes(b"half")
            raise error

        with pytest.raises(expected or type(error)):
            write_atomically(path, 8, write)
        assert os.listdir(tmp_path) == ["state.bin"]
        assert path.read_bytes() == b"old"


def test_only_a_file_is_replaced(tmp_path: Path) -> None:
    """A link stays one, and what it names is written; a pipe is left alone."""
    link, pipe, real = tmp_path / "link", tmp_path / "pipe", tmp_path / "folder" / "real"
    link.symlink_to(real)
    write_atomically(link, 3, lambda temporary: temporary.write_bytes(b"new"))
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    os.mkfifo(pipe)
    message = failure(lambda: write_atomically(pipe, 3, lambda temporary: temporary.write_bytes(b"new")))
    assert "pipe: is no regular file" in message
    assert pipe.is_fifo()


def test_impossible_folder(var: VAR, tmp_path: Path) -> None:
    """A folder that cannot be made is the same one error."""
    (tmp_path / "file").write_text("")
    assert "cannot be written" in failure(lambda: save_var(tmp_path / "file" / "var.safetensors", var))


def test_metadata_may_not_use_our_names(var: VAR, tmp_path: Path) -> None:
    """The configuration cannot be overwritten by a caller's strings."""
    with pytest.raises(ValueError, match="config"):
        save_var(tmp_path / "var.safetensors", var, {"config": "mine"})
