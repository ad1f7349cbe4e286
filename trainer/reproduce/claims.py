"""The paper's claims, each with the bar that it is held to in miniature, and what was measured.

A bar is what the claim says, written down before the programme was run. All are functions of the programme's numbers.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

from trainer.reproduce.numbers import Programme
from trainer.reproduce.stages import GROUPS, KL, PAPER, PRETRAINED

AESTHETIC = "score/mini-aesthetic"
PAINTING = "score/mini-clip: a painting"
OLD_PICTURE = "score/mini-clip: an old picture"
STYLE, PAINTED = "style/painting", "painted"
MOST_GROUPED = 16  # the claim is of G up to it


class Claim(NamedTuple):
    """A claim, its bar, what each seed says, what they say together, and whether the bar is met by that."""

    text: str
    bar: str
    seeds: Sequence[str]
    together: str
    holds: bool


def claims(programme: Programme) -> list[Claim]:
    """All of them, in the paper's order."""
    return [
        _success(programme, "bright"),
        _success(programme, "dark"),
        _aesthetic(programme),
        _label_survives(programme),
        _unseen(programme),
        _rises(programme, "old-picture", OLD_PICTURE, '"an old picture" comes quickly'),
        _rises(programme, "painting", PAINTING, '"a painting" rises without demonstrations'),
        _discovered(programme, STYLE, "paintings are discovered, by the judge of style, which no reward has seen"),
        _discovered(programme, PAINTED, "paintings are discovered, by their pixels"),
        _both_rise(programme),
        _colourful(programme),
        _hacks(programme),
        _groups(programme),
    ]


def _claim(
    programme: Programme,
    text: str,
    bar: str,
    value: Callable[[int], float],
    form: Callable[[float], str],
    meets: Callable[[float], bool],
) -> Claim:
    """A claim of the mean over seeds of one number."""
    values = programme.over_seeds(value)
    mean = fmean(values)
    return Claim(text, bar, [form(each) for each in values], form(mean), meets(mean))


def _per_cent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _points(value: float) -> str:
    return f"{100 * value:+.1f} points".replace("-", "−")


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _change(programme: Programme, point: str, name: str, seed: int) -> float:
    """How much an evaluation's number has moved in a run of the paper's experiments."""
    run = programme.run(PAPER, point, seed)
    return float(run["after"][name]) - float(run["before"][name])


def _success(programme: Programme, point: str) -> Claim:
    return _claim(
        programme,
        f"{point} reaches its target",
        "success ≥ 95 %",
        lambda seed: float(programme.run(PAPER, point, seed)["after"]["success_rate"]),
        _per_cent,
        lambda mean: mean >= 0.95,
    )


def _aesthetic(programme: Programme) -> Claim:
    return _claim(
        programme,
        "aesthetic rises by about a point",
        "≥ +1.0 of 1 to 10",
        lambda seed: _change(programme, "aesthetic", "raw_score", seed),
        _signed,
        lambda mean: mean >= 1.0,
    )


def _label_survives(programme: Programme) -> Claim:
    return _claim(
        programme,
        "… and the label survives",
        "label accuracy down by at most 5 points",
        lambda seed: _change(programme, "aesthetic", "label_accuracy", seed),
        _points,
        lambda mean: mean >= -0.05,
    )


def _gain(programme: Programme, split: str, seed: int) -> float:
    after, before = (programme.measure(row, AESTHETIC, seed, split=split) for row in ("aesthetic-half", PRETRAINED))
    return after - before


def _unseen(programme: Programme) -> Claim:
    pairs = [(_gain(programme, "seen", seed), _gain(programme, "unseen", seed)) for seed in programme.seeds]
    seen, unseen = (fmean(gains) for gains in zip(*pairs, strict=True))
    return Claim(
        "trained on half of the labels, the unseen rise as well",
        "unseen gain ≥ 60 % of seen gain",
        [f"{_signed(unseen)} of {_signed(seen)}" for seen, unseen in pairs],
        f"{_signed(unseen)} of {_signed(seen)}: {unseen / seen:.0%}".replace("%", " %"),
        seen > 0 and unseen >= 0.6 * seen,
    )


def _rises(programme: Programme, point: str, column: str, text: str) -> Claim:
    """By how many standard deviations of the pre-trained samples a score has risen."""

    def value(seed: int) -> float:
        before, after = (programme.measure(row, column, seed) for row in (PRETRAINED, point))
        return (after - before) / programme.measure(PRETRAINED, column, seed, key="std")

    return _claim(
        programme,
        text,
        "score up by ≥ 2 standard deviations of pre-trained samples",
        value,
        _signed,
        lambda mean: mean >= 2,
    )


def _discovered(programme: Programme, name: str, text: str) -> Claim:
    pairs = [
        (programme.measure(PRETRAINED, name, seed), programme.measure("painting", name, seed))
        for seed in programme.seeds
    ]
    before, after = (fmean(shares) for shares in zip(*pairs, strict=True))
    return Claim(
        text,
        "from < 1 % to ≥ 50 % of the samples",
        [f"{_per_cent(old)} → {_per_cent(new)}" for old, new in pairs],
        f"{_per_cent(before)} → {_per_cent(after)}",
        before < 0.01 and after >= 0.5,
    )


def _both_rise(programme: Programme) -> Claim:
    def gains(seed: int) -> tuple[float, float]:
        row = "painting-aesthetic"
        painting, rating = (
            programme.measure(row, name, seed) - programme.measure(PRETRAINED, name, seed)
            for name in (PAINTING, AESTHETIC)
        )
        return painting, rating

    pairs = [gains(seed) for seed in programme.seeds]
    painting, rating = (fmean(each) for each in zip(*pairs, strict=True))
    return Claim(
        "painting with aesthetic: both scores rise",
        "both up",
        [f"{_signed(a)}, {_signed(b)}" for a, b in pairs],
        f"{_signed(painting)} (cosine), {_signed(rating)} (rating)",
        painting > 0 and rating > 0,
    )


def _colourful(programme: Programme) -> Claim:
    pairs = [
        tuple(programme.measure(row, "colourfulness", seed) for row in ("painting", "painting-aesthetic"))
        for seed in programme.seeds
    ]
    alone, both = (fmean(each) for each in zip(*pairs, strict=True))
    return Claim(
        "… and the pictures stay colourful",
        "colourfulness above that of painting alone",
        [f"{b:.1f} against {a:.1f}" for a, b in pairs],
        f"{both:.1f} against {alone:.1f}",
        both > alone,
    )


def _hacks(programme: Programme) -> Claim:
    def lost(seed: int) -> float:
        kept, without = (float(programme.run(KL, beta, seed)["after"]["label_accuracy"]) for beta in ("0.2", "0"))
        return without - kept

    def variety(seed: int) -> float:
        kept, without = (programme.measure(f"β {beta}", "diversity", seed) for beta in ("0.2", "0"))
        return without / kept

    labels, ratios = programme.over_seeds(lost), programme.over_seeds(variety)
    together = f"{_points(fmean(labels))}, {fmean(ratios):.2f} ×"
    return Claim(
        "without KL the policy hacks the reward",
        "β = 0 against β = 0.2 at equal steps: label accuracy ≥ 20 points lower, or diversity within a class ≤ half",
        [f"{_points(points)}, {ratio:.2f} ×" for points, ratio in zip(labels, ratios, strict=True)],
        together,
        fmean(labels) <= -0.2 or fmean(ratios) <= 0.5,
    )


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's ρ of two sequences of equal length, in [−1, 1]; ties share their mean rank. Needs two values."""

    def ranks(values: Sequence[float]) -> list[float]:
        ordered = sorted(values)
        return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]

    a, b = ranks(first), ranks(second)
    mean_a, mean_b = fmean(a), fmean(b)
    spread = (sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b)) ** 0.5
    return sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True)) / spread if spread else 0.0


def _groups(programme: Programme) -> Claim:
    sizes = [size for size in map(int, programme.points(GROUPS)) if size <= MOST_GROUPED]

    def rewards(seed: int) -> list[float]:
        return [float(programme.run(GROUPS, str(size), seed)["after"]["reward"]) for size in sizes]

    each = [rewards(seed) for seed in programme.seeds]
    means = [fmean(values) for values in zip(*each, strict=True)]
    falls = [f"G {small} → {large}" for (small, a), (large, b) in pairwise(zip(sizes, means, strict=True)) if b < a]
    rho = rank_correlation(sizes, means)
    return Claim(
        "more samples a group help at fixed compute",
        "reward at the end rises with G up to 16 (rank correlation above 0; exceptions named)",
        [f"ρ {_signed(rank_correlation(sizes, values))}" for values in each],
        f"ρ {_signed(rho)} of the means" + (f"; falls: {', '.join(falls)}" if falls else ""),
        rho > 0,
    )
