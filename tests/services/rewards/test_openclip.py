"""Loading of open_clip models: both layouts, and everything that must not be loaded."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from services.rewards import openclip
from services.rewards.openclip import OPENAI_MARKS, load_clip
from services.rewards.sources import Source, WeightsError, parse_source, sha256_of
from tests.services.rewards.models import SMALL_NAME, random_model, saved

QUICK = f"{SMALL_NAME}-quickgelu"


def openai_layout(model: nn.Module, path: Path) -> Source:
    """Its weights as OpenAI lays them out: half precision, with three numbers beside them."""
    state = {name: entry.half() if entry.is_floating_point() else entry for name, entry in model.state_dict().items()}
    torch.save(
        state | {mark: torch.tensor(value) for mark, value in zip(OPENAI_MARKS, (56, 77, 49408), strict=True)}, path
    )
    return parse_source(str(path))


def same(model: nn.Module, other: nn.Module, tolerance: float = 0.0) -> bool:
    """Whether all weights agree."""
    theirs = other.state_dict()
    return all(
        torch.allclose(entry, theirs[name], atol=tolerance, rtol=0) for name, entry in model.state_dict().items()
    )


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_weights_in_open_clips_layout_come_back(name: str, small_vit: nn.Module, tmp_path: Path) -> None:
    """Bit for bit, and the model is frozen and in eval mode."""
    model, tokenizer, _ = load_clip(SMALL_NAME, saved(small_vit, tmp_path / name))
    assert same(model, small_vit)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer(["a picture"]).shape == (1, 77)


def test_weights_under_state_dict_with_a_prefix_come_back(small_vit: nn.Module, tmp_path: Path) -> None:
    """As open_clip's own training and HPSv2.1 store them: beside an epoch, each name behind `module.`."""
    state = {f"module.{name}": entry for name, entry in small_vit.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state}, tmp_path / "hps.pt")
    assert same(load_clip(SMALL_NAME, parse_source(str(tmp_path / "hps.pt"))).model, small_vit)


def test_weights_in_openais_layout_come_back(small_vit: nn.Module, tmp_path: Path) -> None:
    """To half precision, into the model with QuickGELU."""
    source = openai_layout(small_vit, tmp_path / "clip.pt")
    assert same(load_clip(QUICK, source).model, small_vit, tolerance=1e-3)


def test_openais_weights_are_refused_without_quickgelu(small_vit: nn.Module, tmp_path: Path) -> None:
    """They would load, and every embedding would be wrong; the message names the model to name."""
    source = openai_layout(small_vit, tmp_path / "clip.pt")
    with pytest.raises(WeightsError, match=f"are OpenAI's and want QuickGELU.*name the model {QUICK}"):
        load_clip(SMALL_NAME, source)


@pytest.mark.parametrize("folder", ["vit_large_patch14_clip_224.openai", "metaclip"])
def test_weights_that_a_path_tells_to_be_openais_are_refused_too(
    folder: str, small_vit: nn.Module, tmp_path: Path
) -> None:
    """Converted weights have no marks; the hub's folders have the maker's name."""
    (tmp_path / folder).mkdir()
    source = saved(small_vit, tmp_path / folder / "open_clip_model.safetensors")
    with pytest.raises(WeightsError, match="by their name"):
        load_clip(SMALL_NAME, source)
    load_clip(QUICK, source)


@pytest.mark.parametrize("name", ["CLIP-ViT-L-14-laion2B-s32B-b82K", "HPS_v2.1", "datacomp_xl"])
def test_weights_that_are_gelu_by_their_name_are_refused_under_quickgelu(
    name: str, small_vit: nn.Module, tmp_path: Path
) -> None:
    """The other way round, which the default model invites."""
    source = saved(small_vit, tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightsError, match=f"want GELU, which model {QUICK} has not: name the model {SMALL_NAME}$"):
        load_clip(QUICK, source)
    load_clip(SMALL_NAME, source)


def test_a_maker_is_a_word_of_the_name_and_not_of_a_distant_folder(small_vit: nn.Module, tmp_path: Path) -> None:
    """A home folder says nothing of the weights; a repository's folder in the hub's cache does."""
    far = tmp_path / "openai-user" / "weights"
    far.mkdir(parents=True)
    load_clip(SMALL_NAME, saved(small_vit, far / "mine.safetensors"))
    cached = tmp_path / "models--timm--vit_large_patch14_clip_224.openai" / "snapshots" / "1a2b"
    cached.mkdir(parents=True)
    with pytest.raises(WeightsError, match="are open_clip's 'openai' by their name"):
        load_clip(SMALL_NAME, saved(small_vit, cached / "model.safetensors"))


@pytest.mark.parametrize("quick", [True, False])
def test_a_configuration_beside_the_weights_is_believed(quick: bool, small_vit: nn.Module, tmp_path: Path) -> None:
    """In both directions."""
    source = saved(small_vit, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": quick}}))
    right, wrong = (QUICK, SMALL_NAME) if quick else (SMALL_NAME, QUICK)
    load_clip(right, source)
    with pytest.raises(WeightsError, match=f"name the model {right}$"):
        load_clip(wrong, source)


def test_a_tag_of_openais_is_refused_without_quickgelu() -> None:
    """Before anything is downloaded."""
    with pytest.raises(WeightsError, match="name the model ViT-L-14-quickgelu"):
        load_clip("ViT-L-14", parse_source("openai"))


def test_the_activation_matters(small_source: Source) -> None:
    """The reason for all this: the same weights give other embeddings, and no error."""
    pictures = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, quick = (load_clip(name, small_source).model.encode_image(pictures) for name in (SMALL_NAME, QUICK))  # type: ignore[operator]
    assert (plain - quick).abs().max() > 1e-4


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_a_published_program_is_read_and_any_other_refused(
    small_vit: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A TorchScript archive is code: only those whose digests OpenAI published are opened."""
    path = tmp_path / "ViT.pt"
    example = (torch.zeros(1, 3, 56, 56), torch.zeros(1, 77, dtype=torch.int64))
    model = copy.deepcopy(small_vit)
    mask = model._buffers.pop("attn_mask")  # OpenAI's own model does not count it among its weights
    model.attn_mask = mask
    with torch.no_grad():
        torch.jit.trace(model, example).save(str(path))
    source = parse_source(str(path))
    with pytest.raises(WeightsError, match=r"are a program \(TorchScript\) that OpenAI did not publish: save its"):
        load_clip(QUICK, source)
    monkeypatch.setattr(openclip, "_openai_digests", lambda: {sha256_of(path)})
    assert same(load_clip(QUICK, source).model, small_vit)
    with pytest.raises(WeightsError, match="OpenAI's"):
        load_clip(SMALL_NAME, source)


def test_the_published_digests_are_known() -> None:
    """Of ViT-L/14 among them; they stand in OpenAI's own addresses."""
    digests = openclip._openai_digests()
    assert "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836" in digests
    assert all(len(digest) == 64 for digest in digests)


class Evil:
    """What a pickle may do to whoever opens it."""

    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("run",))


def test_a_pickle_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of other pickles than tensors' nothing is executed."""
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"a": Evil()}, protocol=2))
    for name in ("evil.pt", "old.pt"):
        with pytest.raises(WeightsError, match=r"hold more than tensors.*are not opened: save"):
            load_clip(SMALL_NAME, parse_source(str(tmp_path / name)))
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x05\x06" + bytes(18)])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_damaged_file_is_one_clear_error(content: bytes, suffix: str, tmp_path: Path) -> None:
    """One line with the file and the remedy."""
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    with pytest.raises(
        WeightsError, match=r"cannot be read: .*: fetch them again|are no checkpoint, and are not opened"
    ) as caught:
        load_clip(SMALL_NAME, parse_source(str(path)))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_cut_short_is_refused(small_source: Source, tmp_path: Path) -> None:
    """Also where no digest is given."""
    assert small_source.path is not None
    (tmp_path / "cut.safetensors").write_bytes(small_source.path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="cannot be read"):
        load_clip(SMALL_NAME, parse_source(str(tmp_path / "cut.safetensors")))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    """Position embeddings of another size are not stretched in silence."""
    model = random_model(SMALL_NAME)
    model.visual.positional_embedding = nn.Parameter(torch.zeros(10, 64))  # type: ignore[union-attr]
    with pytest.raises(WeightsError, match=r"visual.positional_embedding is \(10, 64\) in place of \(17, 64\); name"):
        load_clip(SMALL_NAME, saved(model, tmp_path / "other.safetensors"))
    with pytest.raises(WeightsError, match=r"is missing.*and .* more"):
        load_clip("mini-clip", saved(model, tmp_path / "other.safetensors"))


def test_an_unknown_model_or_tag_is_answered_with_known_ones() -> None:
    """What was meant is among them."""
    with pytest.raises(WeightsError, match=r"did you mean .*ViT-L-14"):
        load_clip("ViT-L-41", parse_source("openai"))
    with pytest.raises(WeightsError, match="no weights 'opanai': give one of openai"):
        load_clip("ViT-L-14", parse_source("opanai"))
    with pytest.raises(WeightsError, match="there are none by name, give a path"):
        load_clip("mini-clip", parse_source("openai"))


def test_weights_that_cannot_be_fetched_are_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Offline; the hub's client keeps from the network itself."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        WeightsError, match=r"'openai' of ViT-B-32-quickgelu cannot be fetched: fetch them where there is a network"
    ) as caught:
        load_clip("ViT-B-32-quickgelu", parse_source("openai"), cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_loading_says_nothing_of_random_weights(small_source: Source, caplog: pytest.LogCaptureFixture) -> None:
    """open_clip warns of a model without weights while it is created; it is filled right after."""
    with caplog.at_level("INFO"):
        load_clip(SMALL_NAME, small_source)
    assert not caplog.records
