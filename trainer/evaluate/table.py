"""The paper's Table 1 (arXiv 2505.23331) as Markdown: a row a model, a column a measure, each mean ± its interval."""

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.evaluate.measures import COLOURFULNESS, SCORE
from trainer.evaluate.summary import DIVERSITY, PAINTED_SHARE, STYLE_SHARE, TOP1, TOP5

TITLES = {TOP1: "top-1 accuracy", TOP5: "top-5 accuracy", PAINTED_SHARE: "painted, by pixels"}
SHARES = (TOP1, TOP5, STYLE_SHARE, PAINTED_SHARE)
DASH = "–"


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of an evaluation's rows, as `evaluation.json` holds them.

    ± is half of the 95 % interval's width; shares are in per cent. Where seen and unseen labels are told apart, each
    row is followed by one for either.
    """
    names = list(dict.fromkeys(name for row in rows for each in row["splits"].values() for name in each["measures"]))
    names = [name for name in names if any(_measure(row["splits"]["all"], name) for row in rows)]
    order = sorted(names, key=_place)
    lines = [
        ["model", "images", *(_title(name) for name in order)],
        ["---", "---:", *("---:" for _ in order)],
    ]
    for row in rows:
        for split, each in row["splits"].items():
            name = row["name"] if split == "all" else f"{row['name']}, {split} labels"
            cells = [_cell(name_of, _measure(each, name_of)) for name_of in order]
            lines.append([name.replace("|", "\\|"), f"{each['images']:,}", *cells])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _place(name: str) -> int:
    order = (SCORE, TOP1, TOP5, COLOURFULNESS, DIVERSITY, STYLE_SHARE, PAINTED_SHARE)
    return next(place for place, prefix in enumerate(order) if name.startswith(prefix))


def _title(name: str) -> str:
    return TITLES.get(name, name.removeprefix(SCORE).removeprefix(STYLE_SHARE)).replace("|", "\\|")


def _measure(split: Mapping[str, Any], name: str) -> Mapping[str, float | None] | None:
    found: Mapping[str, float | None] | None = split["measures"].get(name)
    return found


def _cell(name: str, measure: Mapping[str, float | None] | None) -> str:
    if measure is None:
        return DASH
    mean, low, high = (measure[key] for key in ("mean", "low", "high"))
    assert mean is not None
    is_share = name.startswith(SHARES)
    factor, unit = (100, " %") if is_share else (1, "")
    half = None if low is None or high is None else (high - low) / 2 * factor
    digits = 1 if is_share or name == COLOURFULNESS else 3
    return f"{mean * factor:.{digits}f}{unit}" + ("" if half is None else f" ± {half:.{digits}f}")
