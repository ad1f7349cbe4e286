"""What the miniature's rewards are made of: the rule of ratings, the head's regression, the loss of its CLIP."""

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from services.rewards.head import fold
from services.rewards.openclip import MINIATURE, create_model
from trainer.miniature.aesthetic import auc, fit_head, rank_correlation
from trainer.miniature.clip import EMBEDDING, matched_loss, stored
from trainer.miniature.rating import colourfulness, contrast, exposure, rating


def plain(red: int, green: int, blue: int) -> np.ndarray:
    """One picture of one colour."""
    return np.full((1, 8, 8, 3), (red, green, blue), dtype=np.uint8)


def halves(left: tuple[int, int, int], right: tuple[int, int, int]) -> np.ndarray:
    """One picture of two colours."""
    image = np.empty((1, 8, 8, 3), dtype=np.uint8)
    image[:, :, :4], image[:, :, 4:] = left, right
    return image


def test_the_parts_of_the_rule_by_hand() -> None:
    """Colourfulness of red: √(255² + 127.5²) · 0.3; contrast of black and white: one half."""
    assert colourfulness(plain(255, 0, 0))[0] == pytest.approx(0.3 * np.hypot(255, 127.5))
    assert colourfulness(plain(90, 90, 90))[0] == 0
    assert contrast(halves((0, 0, 0), (255, 255, 255)))[0] == pytest.approx(0.5, abs=1e-3)
    assert contrast(plain(3, 200, 7))[0] == pytest.approx(0, abs=1e-12)
    assert [exposure(plain(level, level, level))[0] for level in (0, 255)] == pytest.approx([0, 0], abs=1e-3)


def test_the_rule_is_what_a_person_would_say() -> None:
    """Vivid and contrasty above pale, pale above grey, grey above black; black is the lowest of all."""
    order = [
        halves((255, 40, 0), (0, 60, 200)),
        halves((200, 150, 140), (120, 130, 150)),
        plain(128, 128, 128),
        plain(10, 10, 10),
    ]
    ratings = [float(rating(image)[0]) for image in order]
    assert ratings == sorted(ratings, reverse=True)
    assert rating(plain(0, 0, 0))[0] == pytest.approx(1.0)


@given(seed=st.integers(0, 10_000))
def test_ratings_are_from_1_to_10(seed: int) -> None:
    """Whatever the pixels."""
    generator = np.random.default_rng(seed)
    low, high = sorted(generator.integers(0, 256, 2))
    images = generator.integers(low, high + 1, (4, 8, 8, 3)).astype(np.uint8)
    assert ((rating(images) >= 1) & (rating(images) <= 10)).all()


def test_the_regression_finds_what_is_linear() -> None:
    """Ratings that are an affine map of the embeddings are found again, in the layout that the services read."""
    generator = torch.Generator().manual_seed(0)
    images = np.random.default_rng(0).integers(0, 256, (400, 8, 8, 3)).astype(np.uint8)
    images = (images * np.linspace(0, 1, 400)[:, None, None, None]).astype(np.uint8)
    ratings = torch.from_numpy(rating(images))
    vectors = F.normalize(torch.randn(400, 16, generator=generator).double(), dim=1)
    vectors[:, 0] = ratings
    scores = fold(fit_head(vectors.float(), images))(vectors.float())
    assert scores == pytest.approx(ratings.numpy(), abs=0.01)


def test_rank_correlation_and_auc_by_hand() -> None:
    """1 for the same order, −1 for the reverse; the share of pairs in the right order."""
    values = np.array([0.1, 0.4, 0.2, 0.9])
    assert rank_correlation(values, values**3) == pytest.approx(1)
    assert rank_correlation(values, -values) == pytest.approx(-1)
    assert auc(values, np.array([False, True, False, True])) == 1
    assert auc(values, np.array([True, False, False, True])) == pytest.approx(2 / 4)


def test_the_loss_counts_every_match() -> None:
    """With one match each it is CLIP's; a picture that two texts describe is no negative of either."""
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(4, 8, generator=generator), dim=1) for _ in range(2))
    scale = torch.tensor(10.0)
    logits = 10 * texts @ images.T
    expected = (F.cross_entropy(logits, torch.arange(4)) + F.cross_entropy(logits.T, torch.arange(4))) / 2
    assert matched_loss(images, texts, scale, torch.eye(4)) == pytest.approx(float(expected), abs=1e-6)
    same = torch.ones(4, 4)
    uniform = matched_loss(images[:1].expand(4, -1), texts[:1].expand(4, -1), scale, same)
    assert float(uniform) == pytest.approx(np.log(4), abs=1e-5)


def test_words_that_were_never_trained_are_stored_as_nothing() -> None:
    """Those of captions are kept; parameters are stored in half precision, running statistics as they are."""
    model = create_model(MINIATURE.stem, {})
    weights = stored(model, torch.float16)  # type: ignore[arg-type]
    tokenize = open_clip.get_tokenizer(MINIATURE.stem)
    painting, zebra = (int(tokenize([word])[0, 1]) for word in ("painting", "zebra"))
    assert weights[EMBEDDING][painting].any()
    assert not weights[EMBEDDING][zebra].any()
    assert weights[EMBEDDING].dtype == torch.float16
    assert {entry.dtype for name, entry in weights.items() if "running_" in name} == {torch.float32}
    assert weights.keys() == model.state_dict().keys()
