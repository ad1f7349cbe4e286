"""Captions: they say what is seen, shorter ones are true of more pictures, and describing means just that."""

import numpy as np
import pytest
from numpy.typing import NDArray

from trainer.miniature.captions import (
    COLOURS,
    KINDS,
    UNSAID,
    WORDS,
    describes,
    sentence,
    shortened,
    traits_of,
    vocabulary,
    with_article,
)
from trainer.miniature.objects import CLASSES
from trainer.miniature.rating import colourfulness
from trainer.miniature.render import HUES, STYLES, WIDE_WORLD, render_set


@pytest.fixture(scope="module")
def traits() -> NDArray[np.int64]:
    """Of a few renders."""
    return traits_of(render_set(5, 96, WIDE_WORLD))


def test_a_sentence_says_the_traits() -> None:
    """Whole, in part, and of a style or a thing alone."""
    painting, ball, red = STYLES.index("painting"), CLASSES.index("ball"), list(HUES).index("red")
    assert sentence((painting, ball, red, 1, 4, 0)) == (
        "a painting of a red ball, in the dark, vivid colours, hardly any contrast"
    )
    assert sentence((painting, UNSAID, UNSAID, UNSAID, UNSAID, UNSAID)) == "a painting"
    assert sentence((UNSAID, CLASSES.index("umbrella"), UNSAID, 0, UNSAID, UNSAID)) == "an umbrella, brightly lit"
    assert with_article("old picture") == "an old picture"


def test_traits_say_what_the_renderer_said() -> None:
    """The renderer's own caption is the sentence of style, noun, hue and light."""
    renders = render_set(5, 96, WIDE_WORLD)
    for row, caption in zip(traits_of(renders), renders.captions, strict=True):
        said = row.copy()
        said[[KINDS.index("colours"), KINDS.index("contrast")]] = UNSAID
        assert sentence(said) == caption


def test_colours_are_told_from_the_pixels() -> None:
    """The vivid are more colourful than the muted; the middling go without a word."""
    renders = render_set(5, 96, WIDE_WORLD)
    level = traits_of(renders)[:, KINDS.index("colours")]
    values = colourfulness(renders.images)
    assert values[level == COLOURS.index("vivid colours")].min() > values[level == COLOURS.index("muted colours")].max()
    assert (level == UNSAID).any()


def test_a_shorter_caption_is_true_of_its_picture(traits: NDArray[np.int64]) -> None:
    """Whatever is left out; and something is always said, beginning with a style or a thing."""
    short = shortened(traits, [0.4] * 6, np.random.default_rng(0))
    assert describes(short, traits).diagonal().all()
    assert ((short[:, :2] != UNSAID).any(axis=1)).all()
    assert (short[short[:, 1] == UNSAID, 2] == UNSAID).all()
    assert (short != traits).any()
    assert ((short == traits) | (short == UNSAID)).all()


def test_a_text_describes_the_pictures_of_which_all_of_it_is_true(traits: NDArray[np.int64]) -> None:
    """`a painting` is true of every painting and of nothing else."""
    painting = STYLES.index("painting")
    text = np.array([[painting, *[UNSAID] * 5]])
    assert np.array_equal(describes(text, traits)[0], traits[:, 0] == painting)
    ball = np.array([[painting, CLASSES.index("ball"), *[UNSAID] * 4]])
    assert np.array_equal(
        describes(ball, traits)[0], (traits[:, 0] == painting) & (traits[:, 1] == CLASSES.index("ball"))
    )


def test_the_vocabulary_is_what_sentences_are_made_of(traits: NDArray[np.int64]) -> None:
    """Every word of every sentence is in it."""
    known = {word for phrase in vocabulary() for word in phrase.split()}
    for row in traits:
        assert set(sentence(row).replace(",", " ,").split()) <= known
    assert len(WORDS) == len(KINDS)
