"""Means and their bootstrap intervals over pictures whose classes are given.

The labels of an evaluation are chosen, the pictures of each are drawn. So pictures are resampled, within each class: an
interval tells how far a number would move with other random numbers for the same labels, not for other labels. Of n
pictures n − 1 are drawn, each weighing n / (n − 1), which makes the variance of a mean right also where n is small
(Rao and Wu 1988, "Resampling inference with complex survey data", JASA 83: 231–241, §2 with m = n − 1).

Shape legend: N pictures · M measures · n pictures of a class · R replicates · D numbers of a thumbnail.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

REPLICATES, LEVEL, SEED = 1000, 0.95, 0
MOST_COMPARED = 2000  # pictures of a class whose distances are taken
BLOCK = 4_000_000  # numbers of a block of counts

Floats = NDArray[np.float64]


class Estimate(NamedTuple):
    """A number and the ends of its interval; None where there are too few pictures."""

    mean: float
    low: float | None
    high: float | None


def estimate_means(values_NM: Floats, labels_N: NDArray[np.int64], *, replicates: int = REPLICATES) -> list[Estimate]:
    """The mean over pictures of each of M measures, with its 95 % interval.

    Args:
        values_NM: float64 (N, M), N at least 1.
        labels_N: int64 (N,). Where a class has one picture alone, all pictures are taken for one class.
        replicates: R, of the bootstrap.
    """
    count = len(labels_N)
    groups = _groups(labels_N)
    if min(map(len, groups)) < 2:
        groups = [np.arange(count)]
    means = values_NM.mean(axis=0)
    if count < 2:
        return [Estimate(float(mean), None, None) for mean in means]
    generator = np.random.default_rng(SEED)
    totals_RM = np.zeros((replicates, values_NM.shape[1]))
    for rows in groups:
        size, values_nM = len(rows), values_NM[rows]
        for place, counts_Rn in _resampled(size, replicates, generator):
            totals_RM[place] += counts_Rn @ values_nM * (size / (size - 1))
    return [_with_interval(mean, values) for mean, values in zip(means, (totals_RM / count).T, strict=True)]


def estimate_diversity(
    thumbnails_ND: NDArray[np.float32], labels_N: NDArray[np.int64], *, replicates: int = REPLICATES
) -> Estimate | None:
    """Within-class diversity: the mean over classes of the mean RMS distance of two pictures of a class.

    Args:
        thumbnails_ND: float32 (N, D) in [0, 1].
        labels_N: int64 (N,); classes with fewer than three pictures do not count.
        replicates: R, of the bootstrap; a picture is not compared with itself, however often it is drawn.

    Returns:
        None where no class has three pictures.
    """
    groups = [rows[:MOST_COMPARED] for rows in _groups(labels_N) if len(rows) >= 3]
    if not groups:
        return None
    generator = np.random.default_rng(SEED)
    means, sums_R, used_R = [], np.zeros(replicates), np.zeros(replicates)
    for rows in groups:
        size, distances_nn = len(rows), _distances(thumbnails_ND[rows])
        means.append(distances_nn.sum() / (size * (size - 1)))
        for place, counts_Rn in _resampled(size, replicates, generator):
            pairs_R = (size - 1) ** 2 - (counts_Rn**2).sum(axis=1)  # one picture, drawn each time, makes none
            distance_R = ((counts_Rn @ distances_nn) * counts_Rn).sum(axis=1)
            sums_R[place] += np.divide(distance_R, pairs_R, out=np.zeros_like(pairs_R), where=pairs_R > 0)
            used_R[place] += pairs_R > 0
    return _with_interval(float(np.mean(means)), sums_R[used_R > 0] / used_R[used_R > 0])


def _groups(labels_N: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    return [np.flatnonzero(labels_N == label) for label in np.unique(labels_N)]


def _resampled(size: int, replicates: int, generator: np.random.Generator) -> Iterator[tuple[slice, Floats]]:
    """How often each of n pictures is drawn in each replicate, float64 (r, n), in blocks with their places."""
    step = max(1, BLOCK // size)
    for first in range(0, replicates, step):
        place = slice(first, min(first + step, replicates))
        counts = generator.multinomial(size - 1, np.full(size, 1 / size), size=place.stop - place.start)
        yield place, counts.astype(np.float64)


def _distances(thumbnails_nD: NDArray[np.float32]) -> Floats:
    """RMS distances of each two pictures, float64 (n, n)."""
    rows_nD = thumbnails_nD.astype(np.float64)
    return np.stack([np.sqrt(((rows_nD - row_D) ** 2).mean(axis=1)) for row_D in rows_nD])


def _with_interval(mean: float, replicates_R: Floats) -> Estimate:
    low, high = np.quantile(replicates_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(mean), float(low), float(high))
