"""Numbers as the page shows them; what is missing is a dash."""

import math
from collections.abc import Sequence

DASH = "–"
SHARES = ("success_rate", "label_accuracy")
TITLES = {
    "reward": "reward",
    "raw_score": "raw score",
    "success_rate": "success rate",
    "label_accuracy": "label accuracy",
    "kl": "KL",
    "seconds": "seconds",
}


def title_of(name: str) -> str:
    """What a metric is called; a raw score is called by its reward."""
    return TITLES.get(name, name.removeprefix("raw_score/"))


def is_share(name: str) -> bool:
    """Whether a metric is a share, from 0 to 1."""
    return name.rpartition("/")[2] in SHARES


def show(value: float | None, name: str = "") -> str:
    """A number to the digits that its metric deserves: shares in per cent, seconds whole."""
    if value is None or not math.isfinite(value):
        return DASH
    if is_share(name):
        text = f"{100 * value:.1f} %"
    elif name == "seconds":
        text = f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
    else:
        text = f"{value:.3f}" if abs(value) < 1 else f"{value:,.2f}"
    return text.replace("-", "−")


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that are there; None where none is."""
    found = [value for value in values if value is not None]
    return math.fsum(found) / len(found) if found else None


def value_range(values: Sequence[float | None], name: str = "") -> str:
    """`0.368 to 0.405`: the smallest and the largest; nothing where they read the same."""
    found = [value for value in values if value is not None]
    ends = [show(end(found), name) for end in (min, max)] if found else []
    return " to ".join(ends) if len(set(ends)) > 1 else ""


def mean_and_range(values: Sequence[float | None], name: str = "") -> str:
    """`0.387 (0.368 to 0.405)`: the mean over runs, with the smallest and the largest where they differ."""
    ends = value_range(values, name)
    return show(mean(values), name) + (f" ({ends})" if ends else "")


def show_change(values: Sequence[float | None], name: str = "") -> str:
    """The mean of some differences, with its sign, and in percentage points where they are of shares."""
    change = mean(values)
    if change is None:
        return DASH
    text = f"{100 * change:+.1f} points" if is_share(name) else f"{change:+.3f}"
    return text.replace("-", "−")
