"""The charts of training: metrics by step, reward against KL, and what evaluations in between have measured."""

import json
from collections.abc import Sequence
from typing import Literal

import numpy as np

from trainer.report.charts import Band, Chart, Dots, Line
from trainer.report.runs import Group, in_words, raw_score
from trainer.report.series import Series, Spread, block_of, columns_of, group_series, spread_of
from trainer.report.text import is_share, show, title_of
from trainer.shaping import Affine

CURVES = ("reward", "label_accuracy", "kl", "success_rate")


def training_curves(group: Group) -> list[Chart]:
    """A chart for each metric that the runs of a group have; raw scores where they are not the reward itself."""
    block, rewards = block_of(group.runs), group.shown.config.rewards
    is_plain = len(rewards) == 1 and rewards[0].weight == 1 and rewards[0].shape == Affine()
    more = [] if is_plain else [raw_score(reward) for reward in rewards]
    charts = (_curve(group, name, title_of(name), *group_series(group, name, block)) for name in (*CURVES, *more))
    return [chart for chart in charts if chart is not None]


def _curve(
    group: Group, name: str, title: str, spread: Spread | None, averaged: Sequence[Series], cut: Sequence[Series]
) -> Chart | None:
    parts = [*spread_parts(spread, averaged), *cut_lines(cut)]
    if not parts:
        return None
    return Chart(
        alt=f"{group.name}: {title} by step, {_in_words(spread, name)}.",
        x="step",
        y=title,
        parts=tuple(parts),
        is_share=is_share(name),
        starts_at_zero=name == "kl",
    )


def spread_parts(spread: Spread | None, averaged: Sequence[Series], colour: int = 0) -> list[Line | Band]:
    """The mean with its band; of unfinished runs also what lies beyond the steps that all of them have."""
    if spread is None:
        return cut_lines(averaged, colour)
    parts: list[Line | Band] = []
    if len(averaged) > 1:
        parts.append(Band(spread.steps_C, spread.low_C, spread.high_C, colour))
        tails = [each for each in averaged if each.steps_N[-1] > spread.steps_C[-1]]
        for each in tails:
            beyond_N = each.steps_N >= spread.steps_C[-1]
            parts.append(Line(each.steps_N[beyond_N], each.values_N[beyond_N], "cut", colour))
    parts.append(Line(spread.steps_C, spread.mean_C, "mean", colour))
    return parts


def cut_lines(series: Sequence[Series], colour: int = 0) -> list[Line | Band]:
    """Runs that were cut short, or go on."""
    return [Line(each.steps_N, each.values_N, "cut", colour) for each in series]


def _in_words(spread: Spread | None, name: str) -> str:
    if spread is None:
        return "the runs have no step in common"
    first, last = (f"{show(spread.mean_C[at], name)} at step {spread.steps_C[at]:.0f}" for at in (0, -1))
    return first if len(spread.steps_C) == 1 else f"from {first} to {last}"


def same_reward(groups: Sequence[Group]) -> list[tuple[str, list[Group]]]:
    """The groups that optimise the same reward, whose numbers can be compared, and that reward in words.

    Where two rewards have the same words, because only their shapes differ, the groups' names tell them apart.
    """
    gathered: dict[str, list[Group]] = {}
    for group in groups:
        rewards = [reward.model_dump(mode="json", exclude={"url"}) for reward in group.shown.config.rewards]
        gathered.setdefault(json.dumps(rewards), []).append(group)
    titles = [" + ".join(in_words(reward) for reward in each[0].shown.config.rewards) for each in gathered.values()]
    return [
        (title if titles.count(title) == 1 else f"{title} ({', '.join(group.name for group in each)})", each)
        for title, each in zip(titles, gathered.values(), strict=True)
    ]


def reward_against_kl(title: str, groups: Sequence[Group]) -> Chart | None:
    """The path of each group that optimises a reward: its runs thin, their mean thick; None where no KL was kept."""
    block = block_of([run for group in groups for run in group.runs])
    lines: list[Line] = []
    ends: list[Dots] = []
    words = []
    for colour, group in enumerate(groups):
        paths = {run: each for run in group.runs if (each := columns_of(run, ("kl", "reward"), block)) is not None}
        kind: Literal["run", "mean"] = "run" if len(paths) > 1 else "mean"
        lines += [Line(kl_N, reward_N, kind, colour) for _, kl_N, reward_N in paths.values()]
        averaged = [paths[run] for run in group.averaged if run in paths]
        kl = spread_of([Series(steps_N, kl_N) for steps_N, kl_N, _ in averaged])
        reward = spread_of([Series(steps_N, reward_N) for steps_N, _, reward_N in averaged])
        if kl is not None and reward is not None:
            lines.append(Line(kl.mean_C, reward.mean_C, "mean", colour))
            ends.append(Dots(kl.mean_C[-1:], reward.mean_C[-1:], colour))
            words.append(f"{group.name} ends at KL {show(kl.mean_C[-1])} with reward {show(reward.mean_C[-1])}")
    if not lines:
        return None
    return Chart(alt=f"Reward against KL for {title}: {'; '.join(words)}.", x="KL", y="reward", parts=(*lines, *ends))


def between_curve(group: Group, name: str, title: str) -> Chart | None:
    """A number of the evaluations before, between and after training; None where there is none in between."""
    series = []
    for run in group.averaged:
        values = {0: run.evaluated("before", name), **{step: each.get(name) for step, each in run.between.items()}}
        values[run.config.run.steps] = run.evaluated("after", name)
        found = [(step, value) for step, value in sorted(values.items()) if value is not None]
        if found:
            series.append(Series(*np.asarray(found, dtype=np.float64).T))
    if not any(run.between for run in group.averaged) or not series:
        return None
    spread = spread_of(series)
    alt = f"{group.name}: {title} by step, {_in_words(spread, name)}."
    return Chart(alt, "step", title, tuple(spread_parts(spread, series)), is_share=is_share(name))
