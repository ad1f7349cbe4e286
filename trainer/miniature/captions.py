"""What a caption says of a picture, word for word, and which pictures it is true of.

Shape legend: N pictures · H, W pixels · T texts.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.miniature.objects import CLASSES
from trainer.miniature.rating import colourfulness, contrast
from trainer.miniature.render import HUES, STYLES, Renders

LIGHTS = ("brightly lit", "in the dark")
COLOURS = ("hardly any colour", "muted colours", "", "rich colours", "vivid colours")
COLOUR_STEPS = (20.0, 45.0, 70.0, 95.0)  # of `colourfulness`
CONTRASTS = ("hardly any contrast", "little contrast", "", "clear contrast", "strong contrast")
CONTRAST_STEPS = (0.07, 0.10, 0.14, 0.18)  # of `contrast`
UNSAID = -1

KINDS = ("style", "noun", "hue", "light", "colours", "contrast")
WORDS: tuple[Sequence[str], ...] = (STYLES, CLASSES, tuple(HUES), LIGHTS, COLOURS, CONTRASTS)


def traits_of(renders: Renders) -> NDArray[np.int64]:
    """What the renderer's captions and the pixels say of each picture.

    Args:
        renders: pictures uint8 (N, H, W, 3), perhaps changed since they were drawn, and what they are.

    Returns:
        int64 (N, 6): for each of `KINDS` an index into its `WORDS`, or `UNSAID`.
    """
    hues = {name: index for index, name in enumerate(HUES)}
    rows = []
    for caption in renders.captions:
        words = caption.replace(",", "").split()
        light = next((index for index, light in enumerate(LIGHTS) if caption.endswith(light)), UNSAID)
        rows.append((next((hues[word] for word in words if word in hues), UNSAID), light))
    said = np.array(rows, dtype=np.int64)
    colour = _level(colourfulness(renders.images), COLOUR_STEPS)
    contrasts = _level(contrast(renders.images), CONTRAST_STEPS)
    return np.stack([renders.styles, renders.labels, said[:, 0], said[:, 1], colour, contrasts], axis=1)


def _level(values: NDArray[np.float64], steps: Sequence[float]) -> NDArray[np.int64]:
    """The step that each value stands on; the middle one goes without saying."""
    level = np.searchsorted(np.array(steps), values, side="right").astype(np.int64)
    return np.where(level == len(steps) // 2, UNSAID, level)


def sentence(traits: Sequence[int]) -> str:
    """The caption of these traits (6,): `a painting of a red ball, in the dark, vivid colours`."""
    style, noun, hue, light, colours, contrasts = (
        WORDS[kind][value] if value != UNSAID else "" for kind, value in enumerate(traits)
    )
    thing = f"{hue} {noun}".strip() if noun else ""
    start = " of ".join(with_article(part) for part in (style, thing) if part)
    return ", ".join(part for part in (start, light, colours, contrasts) if part)


def vocabulary() -> list[str]:
    """Everything that a caption is made of."""
    return ["a", "an", "of", ",", *(phrase for phrases in WORDS for phrase in phrases if phrase)]


def with_article(noun: str) -> str:
    """`an old picture`, `a painting`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def shortened(traits_NK: NDArray[np.int64], keep: Sequence[float], rng: np.random.Generator) -> NDArray[np.int64]:
    """What is left of traits (N, 6) when each is said with its own probability; something always is."""
    kept = np.where(rng.random(traits_NK.shape) < np.array(keep), traits_NK, UNSAID)
    bare = (kept[:, :2] == UNSAID).all(axis=1)  # neither style nor thing: no sentence to begin with
    kept[bare, 0] = traits_NK[bare, 0]
    kept[kept[:, 1] == UNSAID, 2] = UNSAID  # a hue is of a thing
    return kept


def describes(texts_TK: NDArray[np.int64], pictures_NK: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether all that a text says is true of a picture, (T, N)."""
    said_TNK = (texts_TK[:, None] == UNSAID) | (texts_TK[:, None] == pictures_NK[None])
    return np.asarray(said_TNK.all(axis=2))
