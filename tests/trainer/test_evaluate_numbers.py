"""The numbers of an evaluation: means and their intervals, diversity, ranks, and the table they are shown in."""

import numpy as np
import pytest
from numpy.typing import NDArray

from trainer.evaluate.bootstrap import Estimate, estimate_diversity, estimate_means
from trainer.evaluate.measures import COLOURFULNESS, LABELS, PAINTED, RANKS, STYLE, THUMBNAILS, label_ranks, thumbnails
from trainer.evaluate.summary import summarise
from trainer.evaluate.table import markdown_table
from trainer.miniature.quality import diversity, held_out


def one_mean(values_N: NDArray[np.float64], labels_N: NDArray[np.int64], replicates: int = 1000) -> Estimate:
    """The estimate of one measure."""
    return estimate_means(values_N[:, None], labels_N, replicates=replicates)[0]


@pytest.mark.parametrize("per_class", [3, 10])
def test_intervals_cover_the_truth_as_often_as_they_say(per_class: int) -> None:
    """95 % of 400 evaluations of 20 classes of different means, within three standard errors; also of few pictures."""
    generator, covered = np.random.default_rng(1), 0
    labels_N = np.repeat(np.arange(20), per_class)
    means_C = generator.normal(0, 5, 20)
    for _ in range(400):
        found = one_mean(means_C[labels_N] + generator.normal(size=len(labels_N)), labels_N, 200)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= means_C.mean() <= found.high
    assert covered / 400 == pytest.approx(0.95, abs=3 * np.sqrt(0.95 * 0.05 / 400))


def test_the_spread_between_classes_is_no_part_of_the_interval() -> None:
    """Labels are chosen, not drawn: an interval is that of the pictures of each. Unlabelled ones are one class."""
    values_N = np.repeat([0.0, 100.0], 50) + np.random.default_rng(0).normal(size=100)
    labelled = one_mean(values_N, np.repeat([0, 1], 50))
    unlabelled = one_mean(values_N, np.full(100, -1))
    assert labelled.high is not None
    assert labelled.low is not None
    assert unlabelled.high is not None
    assert unlabelled.low is not None
    assert labelled.high - labelled.low == pytest.approx(2 * 1.96 / 10, rel=0.25)
    assert unlabelled.high - unlabelled.low > 10


def test_too_few_pictures_have_no_interval() -> None:
    """One picture says nothing of its spread; where a class has one, all are taken for one class."""
    assert one_mean(np.array([3.0]), np.array([0])) == (3.0, None, None)
    found = one_mean(np.array([1.0, 2.0, 3.0]), np.array([0, 0, 1]))
    assert found == one_mean(np.array([1.0, 2.0, 3.0]), np.array([7, 7, 7]))


def test_the_same_pictures_have_the_same_interval() -> None:
    """Bit for bit; of several measures as of each alone."""
    generator = np.random.default_rng(2)
    values_NM, labels_N = generator.normal(size=(60, 3)), np.repeat(np.arange(6), 10)
    assert estimate_means(values_NM, labels_N) == estimate_means(values_NM, labels_N)
    for measure in range(3):
        alone = one_mean(values_NM[:, measure], labels_N)
        assert alone == pytest.approx(estimate_means(values_NM, labels_N)[measure])


def test_diversity_is_the_miniatures() -> None:
    """The mean RMS distance of two pictures of a class, as docs/miniature.md has it; in any order of the pictures."""
    renders = held_out(96)
    labels_N = np.arange(96) % 16
    found = estimate_diversity(thumbnails(renders.images), labels_N)
    assert found is not None
    assert found.mean == pytest.approx(diversity(renders.images), rel=1e-5)
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.mean < found.high
    order_N = np.random.default_rng(0).permutation(96)
    shuffled = estimate_diversity(thumbnails(renders.images)[order_N], labels_N[order_N])
    assert shuffled is not None
    assert shuffled.mean == pytest.approx(found.mean)


def test_diversity_covers_the_truth() -> None:
    """The expected distance lies in 95 % of the intervals, or a little less for so few; alike pictures have 0."""
    generator, covered = np.random.default_rng(3), 0
    labels_N = np.repeat(np.arange(8), 8)
    truth = np.mean([np.sqrt(((a - b) ** 2).mean()) for a, b in generator.random((20_000, 2, 12))])
    for _ in range(200):
        found = estimate_diversity(generator.random((64, 12)).astype(np.float32), labels_N, replicates=200)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= truth <= found.high
    assert 0.88 <= covered / 200 <= 1.0
    assert estimate_diversity(np.full((6, 12), 0.5, dtype=np.float32), np.repeat([0, 1], 3)) == (0.0, 0.0, 0.0)
    assert estimate_diversity(np.zeros((4, 12), dtype=np.float32), np.repeat([0, 1], 2)) is None


def test_thumbnails_of_any_size_are_block_means() -> None:
    """256 pixels as the mean of each 16×16."""
    images = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
    expected = images.reshape(2, 16, 16, 16, 16, 3).mean(axis=(2, 4)).transpose(0, 3, 1, 2).reshape(2, -1) / 255
    assert thumbnails(images) == pytest.approx(expected, abs=1e-6)


def test_a_rank_counts_the_likelier_classes() -> None:
    """0 is recognised, below 5 among the first five; without a label there is none."""
    scores = np.array([[0.1, 0.5, 0.4], [0.1, 0.5, 0.4], [0.1, 0.5, 0.4]])
    assert label_ranks(scores, np.array([1, 0, -1])).tolist() == [0, 2, -1]
    with pytest.raises(ValueError, match="label 3 is none of the classifier's 3"):
        label_ranks(scores, np.array([1, 0, 3]))


def arrays(count: int) -> dict[str, NDArray[np.float64] | NDArray[np.float32] | NDArray[np.int64]]:
    """What was measured of `count` pictures of four labels in turn."""
    generator = np.random.default_rng(0)
    labels_N = np.arange(count) % 4
    return {
        LABELS: labels_N,
        RANKS: np.where(labels_N == 3, 7, 0),
        STYLE: np.where(labels_N == 0, 1, 0),
        PAINTED: np.where(labels_N == 0, 1, 0),
        COLOURFULNESS: generator.random(count) * 100,
        THUMBNAILS: generator.random((count, 768)).astype(np.float32),
        "score/judge": labels_N.astype(np.float64),
    }


def test_seen_and_unseen_labels_are_told_apart() -> None:
    """Each split has its own pictures; all of them together are the whole."""
    summary = summarise(arrays(40), columns=["judge"], styles=("photo", "sketch"), seen=(0, 1))
    found = {split: (each["images"], each["classes"], each["measures"]) for split, each in summary.items()}
    assert {split: counts[:2] for split, counts in found.items()} == {
        "all": (40, 4),
        "seen": (20, 2),
        "unseen": (20, 2),
    }
    means = {split: {name: m and m["mean"] for name, m in each[2].items()} for split, each in found.items()}  # type: ignore[attr-defined]
    assert [means[split]["score/judge"] for split in ("all", "seen", "unseen")] == [1.5, 0.5, 2.5]
    assert [means[split]["accuracy/top1"] for split in ("all", "seen", "unseen")] == [0.75, 1.0, 0.5]
    assert [means[split]["style/sketch"] for split in ("all", "seen", "unseen")] == [0.25, 0.5, 0.0]
    assert [means[split]["painted"] for split in ("all", "seen", "unseen")] == [0.25, 0.5, 0.0]


def test_the_table_has_a_row_a_model_and_a_column_a_measure() -> None:
    """Each mean ± half the interval's width, shares in per cent; what does not apply is a dash."""
    rows = [
        {
            "name": "a|b",
            "splits": {
                "all": {
                    "images": 1200,
                    "measures": {
                        "score/mini-clip: a painting": {"mean": 0.25, "low": 0.2, "high": 0.3},
                        "accuracy/top1": {"mean": 0.5, "low": 0.48, "high": 0.53},
                        "accuracy/top5": None,
                        "diversity": None,
                    },
                },
                "seen": {"images": 600, "measures": {"accuracy/top1": {"mean": 1.0, "low": None, "high": None}}},
            },
        }
    ]
    assert markdown_table(rows).splitlines() == [
        "| model | images | mini-clip: a painting | top-1 accuracy |",
        "| --- | ---: | ---: | ---: |",
        "| a\\|b | 1,200 | 0.250 ± 0.050 | 50.0 % ± 2.5 |",
        "| a\\|b, seen labels | 600 | – | 100.0 % |",
    ]
