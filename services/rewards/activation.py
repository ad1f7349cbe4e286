"""Which activation weights were trained with, as far as anything tells.

A model's activation is no part of its weights: OpenAI's were trained with QuickGELU, and in a model without it they
load and give wrong embeddings. Weights that are seen to want another activation than the named model's are refused.
"""

import contextlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import open_clip

from services.rewards.sources import WeightsError

QUICK_GELU_WORDS = re.compile(r"(?<![a-z])quick[-_.]?gelu(?![a-z])")
QUICK_GELU_MAKERS = ("openai", "metaclip", "dfn2b", "dfn5b")
GELU_MAKERS = ("laion", "datacomp", "commonpool", "hps")
"""What files of weights with either activation are commonly called after: the beginning of a word of their names."""
QUICK_GELU_SUFFIX = "-quickgelu"
HUB_FOLDER = "models--"
"""How the folder of a repository in the hub's cache begins: `models--OWNER--NAME`."""


class Sign(NamedTuple):
    """What tells the activation of a file of weights.

    Attributes:
        reason: which weights, and how it is known, in words before "want".
        quick_gelu: whether it is QuickGELU, in place of GELU.
    """

    reason: str
    quick_gelu: bool


def sign_of(path: Path, *, openais: bool) -> Sign | None:
    """The first sign that speaks: what is in the file, what is beside it, what open_clip knows by its name, its name.

    A file, its folder, and its repository in the hub's cache all have names. Who published what is known by
    open_clip's list of pretrained weights before it is guessed by a maker's name: some makers have trained with either.

    Args:
        path: of the weights; the file itself is not opened.
        openais: whether it holds the marks of OpenAI's layout.

    Returns:
        The sign, or None if there is none.
    """
    if openais:
        return Sign(f"weights {path} are OpenAI's and", quick_gelu=True)
    said = _configuration_beside(path)
    if said is not None:
        return Sign(f"weights {path}, by the open_clip_config.json beside them,", said)
    names = [path.name, path.parent.name, *(part for part in path.parts if part.startswith(HUB_FOLDER))]
    published = _published()
    for name in names:
        if name in published:
            tag, quick_gelu = published[name]
            return Sign(
                f"weights {path} are open_clip's {tag!r} by their name (change it if they are not) and", quick_gelu
            )
    if any(QUICK_GELU_WORDS.search(name.lower()) for name in names):
        return Sign(f"weights {path} are QuickGELU's by their name (change it if they are not) and", quick_gelu=True)
    words = [word for name in names for word in re.split(r"[^a-z0-9]+", name.lower())]
    for makers, quick_gelu in ((QUICK_GELU_MAKERS, True), (GELU_MAKERS, False)):
        for maker in makers:
            if any(word.startswith(maker) for word in words):
                return Sign(f"weights {path} are {maker}'s by their name (change it if they are not) and", quick_gelu)
    return None


def _configuration_beside(path: Path) -> bool | None:
    """What open_clip's configuration in the same folder says; None if there is none that can be read."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        content = json.loads((path.parent / "open_clip_config.json").read_text("utf-8"))
        return bool(content["model_cfg"].get("quick_gelu", False))
    return None


def _published() -> dict[str, tuple[str, bool]]:
    """Of all weights that open_clip knows, by the names that they have on a disk: their tag, and whether QuickGELU.

    The names are the last part of their address, the repository's on the hub, and its folder's in the hub's cache.
    """
    known: dict[str, tuple[str, bool]] = {}
    for model, tag in open_clip.list_pretrained():
        config = open_clip.get_pretrained_cfg(model, tag)
        entry = tag, bool(config.get("quick_gelu"))
        if config.get("url"):
            known[config["url"].rsplit("/", 1)[-1]] = entry
        if config.get("hf_hub"):
            owner, repository = config["hf_hub"].split("/")[:2]
            known[repository] = known[f"{HUB_FOLDER}{owner}--{repository}"] = entry
    return known


def refuse_other(name: str, config: dict[str, Any], sign: Sign) -> None:
    """Make sure that a model has the activation that its weights want.

    Args:
        name: of the model.
        config: its configuration, as open_clip has it.
        sign: of the weights.

    Raises:
        WeightsError: it has another; the message names the model to name.
    """
    if bool(config.get("quick_gelu")) == sign.quick_gelu:
        return
    other = name + QUICK_GELU_SUFFIX if sign.quick_gelu else name.removesuffix(QUICK_GELU_SUFFIX)
    if other == name or other not in open_clip.list_models():
        return  # there is no other to name: open_clip has paired these itself
    wanted = "QuickGELU" if sign.quick_gelu else "GELU"
    raise WeightsError(f"{sign.reason} want {wanted}, which model {name} has not: name the model {other}")
