"""From what was measured of each picture to the numbers of a table's row, for all labels, the seen and the unseen."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.evaluate.bootstrap import Estimate, estimate_diversity, estimate_means
from trainer.evaluate.measures import COLOURFULNESS, LABELS, PAINTED, RANKS, SCORE, STYLE, THUMBNAILS, Arrays
from trainer.evaluate.picture_folder import UNLABELLED

TOP1, TOP5, DIVERSITY = "accuracy/top1", "accuracy/top5", "diversity"
STYLE_SHARE, PAINTED_SHARE = "style/", "painted"
Split = dict[str, object]


def summarise(
    arrays: Arrays, *, columns: Sequence[str], styles: Sequence[str], seen: Sequence[int]
) -> dict[str, Split]:
    """The numbers of a row: `all`, and `seen` and `unseen` where labels are told apart and some pictures have them.

    Args:
        arrays: of all pictures of the row.
        columns: the scores, by name.
        styles: that the judge of style tells apart; none where there is no judge.
        seen: labels that were trained on; none where all were.

    Returns:
        For each split its `images`, `classes` and `measures`; a measure is `mean`, `low` and `high`
        of its interval and `std` over pictures, or None.
    """
    labels_N = arrays[LABELS].astype(np.int64)
    splits = {"all": np.ones(len(labels_N), dtype=bool)}
    if seen:
        is_seen = np.isin(labels_N, list(seen))
        splits |= {"seen": is_seen, "unseen": ~is_seen & (labels_N != UNLABELLED)}
    return {
        name: _split({key: values[rows] for key, values in arrays.items()}, columns, styles)
        for name, rows in splits.items()
        if rows.any()
    }


def _split(arrays: Arrays, columns: Sequence[str], styles: Sequence[str]) -> Split:
    labels_N = arrays[LABELS].astype(np.int64)
    values: dict[str, NDArray[np.float64]] = {
        f"{SCORE}{name}": arrays[f"{SCORE}{name}"].astype(np.float64) for name in columns
    }
    if RANKS in arrays and (labels_N != UNLABELLED).all():
        values[TOP1], values[TOP5] = ((arrays[RANKS] < k).astype(np.float64) for k in (1, 5))
    values[COLOURFULNESS] = arrays[COLOURFULNESS].astype(np.float64)
    for index, style in enumerate(styles):
        values[f"{STYLE_SHARE}{style}"] = (arrays[STYLE] == index).astype(np.float64)
    if PAINTED in arrays:
        values[PAINTED_SHARE] = arrays[PAINTED].astype(np.float64)
    estimates = dict(zip(values, estimate_means(np.stack(list(values.values()), axis=1), labels_N), strict=True))
    measures: dict[str, Split | None] = {TOP1: None, TOP5: None}
    measures |= {name: _measure(each, float(values[name].std())) for name, each in estimates.items()}
    is_labelled = (labels_N != UNLABELLED).all()
    thumbnails_ND = arrays[THUMBNAILS].astype(np.float32)
    diversity = estimate_diversity(thumbnails_ND, labels_N) if is_labelled else None
    measures[DIVERSITY] = None if diversity is None else _measure(diversity, None)
    return {
        "images": len(labels_N),
        "classes": len(np.unique(labels_N[labels_N != UNLABELLED])),
        "measures": measures,
    }


def _measure(estimate: Estimate, std: float | None) -> Split:
    return {**estimate._asdict(), "std": std}
