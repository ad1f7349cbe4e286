"""Which activation weights want: what tells it, in which order, and that all published weights are told right."""

import json
from pathlib import Path

import open_clip
import pytest

from services.rewards.activation import HUB_FOLDER, QUICK_GELU_SUFFIX, Sign, refuse_other, sign_of
from services.rewards.openclip import config_of
from services.rewards.sources import WeightsError
from tests.services.rewards.models import SMALL_NAME

QUICK = SMALL_NAME + QUICK_GELU_SUFFIX
ALL = open_clip.list_pretrained()


def places(name: str, tag: str) -> list[Path]:
    """Where a pair's weights lie: under their address's name, in the hub's cache, in a folder as their repository."""
    config = open_clip.get_pretrained_cfg(name, tag)
    found = []
    if config["url"]:
        found.append(Path("/weights") / config["url"].rsplit("/", 1)[-1])
    if config["hf_hub"]:
        owner, repository, file = config["hf_hub"].split("/")
        file = file or "open_clip_model.safetensors"
        found.append(Path("/cache") / f"{HUB_FOLDER}{owner}--{repository}" / "snapshots" / "1a2b" / file)
        found.append(Path("/weights") / repository / file)
    return found


def model_named(name: str, sign: Sign | None) -> str:
    """The model that is to have the weights: the given one if it is accepted, else the one that the refusal names."""
    try:
        if sign is not None:
            refuse_other(name, config_of(name), sign)
    except WeightsError as error:
        return str(error).rsplit(" ", 1)[-1]
    return name


@pytest.mark.parametrize(("name", "tag"), ALL, ids=[f"{name}:{tag}" for name, tag in ALL])
def test_published_weights_are_told_by_their_names(name: str, tag: str) -> None:
    """By path as by tag: the right model is accepted, and the other, where there is one, refused in its favour."""
    quick = bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu"))
    plain = name.removesuffix(QUICK_GELU_SUFFIX)
    kinds = [model for model in (plain, plain + QUICK_GELU_SUFFIX) if model in open_clip.list_models()]
    (right,) = [model for model in kinds if len(kinds) == 1 or bool(config_of(model).get("quick_gelu")) == quick]
    signs = [Sign(f"weights {tag!r}", quick), *(sign_of(path, openais=False) for path in places(name, tag))]
    assert len(signs) > 1
    for sign in signs:
        assert {model_named(model, sign) for model in kinds} == {right}, sign


def test_the_list_has_weights_of_both_kinds_that_makers_names_would_misjudge() -> None:
    """So that the test above is none of makers' names alone."""
    wanted = {
        "vit_b_32-quickgelu-laion400m_e32-46683a32.pt": True,
        "models--timm--vit_base_patch32_clip_224.laion400m_e31/snapshots/1a2b/open_clip_model.safetensors": True,
        "models--timm--vit_huge_patch14_clip_224.metaclip_altogether/snapshots/1a2b/open_clip_model.safetensors": False,
        "models--apple--DFN2B-CLIP-ViT-L-14-39B/snapshots/1a2b/open_clip_pytorch_model.bin": False,
        "models--apple--DFN2B-CLIP-ViT-L-14/snapshots/1a2b/open_clip_pytorch_model.bin": True,
    }
    signs = {path: sign_of(Path("/cache") / path, openais=False) for path in wanted}
    assert {path: sign.quick_gelu for path, sign in signs.items() if sign is not None} == wanted


def test_no_name_is_of_weights_of_both_kinds() -> None:
    """Or open_clip's list could not tell them apart."""
    kinds: dict[str, set[bool]] = {}
    for name, tag in ALL:
        for path in places(name, tag):
            key = path.parts[2] if len(path.parts) > 3 else path.name
            kinds.setdefault(key, set()).add(bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu")))
    assert [key for key, both in kinds.items() if len(both) > 1] == []


def test_the_first_sign_that_speaks_decides(tmp_path: Path) -> None:
    """OpenAI's marks, the configuration beside the file, open_clip's list, the word QuickGELU, the makers' names."""
    published = tmp_path / "DFN2B-CLIP-ViT-L-14-39B"
    published.mkdir()
    steps = [
        (tmp_path / "plain" / "mine.pt", None),
        (tmp_path / "laion" / "mine.pt", False),
        (tmp_path / "laion" / "mine-quickgelu.pt", True),
        (tmp_path / "laion" / "mine_quick_gelu-2.pt", True),
        (published / "quickgelu.pt", False),
    ]
    for path, expected in steps:
        sign = sign_of(path, openais=False)
        assert (None if sign is None else sign.quick_gelu) == expected, path
    path = published / "quickgelu.pt"
    (published / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": True}}))
    sign = sign_of(path, openais=False)
    assert sign is not None
    assert sign.quick_gelu
    (published / "open_clip_config.json").write_text(json.dumps({"model_cfg": {}}))
    sign = sign_of(path, openais=False)
    assert sign is not None
    assert not sign.quick_gelu
    sign = sign_of(path, openais=True)
    assert sign is not None
    assert sign.quick_gelu


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model_cfg": 3}', '"model_cfg"', "\x00"])
def test_a_configuration_that_says_nothing_is_passed_over(content: str, tmp_path: Path) -> None:
    """The next sign is looked at."""
    (tmp_path / "open_clip_config.json").write_text(content)
    assert sign_of(tmp_path / "mine.pt", openais=False) is None
    sign = sign_of(tmp_path / "metaclip.pt", openais=False)
    assert sign is not None
    assert sign.quick_gelu


def test_the_refusal_says_how_it_is_known_and_what_to_do() -> None:
    """In one line."""
    sign = sign_of(Path("/weights/vit_b_32-quickgelu-laion400m_e32-46683a32.pt"), openais=False)
    assert sign is not None
    with pytest.raises(
        WeightsError,
        match=rf"are open_clip's 'laion400m_e32' by their name \(change it if they are not\) and want QuickGELU, "
        rf"which model {SMALL_NAME} has not: name the model {QUICK}$",
    ):
        refuse_other(SMALL_NAME, config_of(SMALL_NAME), sign)
    refuse_other(QUICK, config_of(QUICK), sign)
