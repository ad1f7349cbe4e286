"""The rewards that a table has columns of: `--reward NAME[=URL]`, each with the prompts that follow it."""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from trainer.command import Parser, number
from trainer.config import ConfigError, RewardConfig
from trainer.local_rewards import LocalRewards, LocalRewardsError
from trainer.nearest import nearest
from trainer.scoring import Scored, ScoreError, Scorer, collect
from trainer.settings import load_settings

READY_S = 30.0


@dataclass
class Asked:
    """A `--reward` and the prompts given after it."""

    name: str
    url: str | None
    prompts: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Column:
    """One score: a reward, and the prompt where there is one."""

    reward: RewardConfig

    @property
    def name(self) -> str:
        """`mini-clip: a painting`."""
        return self.reward.name if self.reward.prompt is None else f"{self.reward.name}: {self.reward.prompt}"


class _AddReward(argparse.Action):
    def __call__(self, parser: object, options: argparse.Namespace, value: Any, option: str | None = None) -> None:
        name, _, url = str(value).partition("=")
        options.rewards = [*options.rewards, Asked(name, url or None)]


class _AddPrompt(argparse.Action):
    def __call__(self, parser: object, options: argparse.Namespace, value: Any, option: str | None = None) -> None:
        if not options.rewards:
            raise ConfigError("--prompt is for the --reward before it: name the reward first")
        options.rewards[-1].prompts.append(str(value))


def add_reward_options(parser: Parser) -> None:
    """Adds what `columns_of` reads."""
    group = parser.add_argument_group("scores")
    group.add_argument(
        "--reward",
        action=_AddReward,
        dest="rewards",
        default=[],
        metavar="NAME[=URL]",
        help="a reward service to score by; without a url it is started here; may be repeated",
    )
    group.add_argument(
        "--prompt",
        action=_AddPrompt,
        default=argparse.SUPPRESS,
        metavar="TEXT",
        help="of the --reward before it; each one is a score of its own",
    )
    group.add_argument(
        "--score-timeout",
        type=number(float, 0, 86_400, above=True),
        default=300.0,
        metavar="S",
        help="seconds that a reward may be away before the command stops (300)",
    )


def columns_of(asked: Sequence[Asked]) -> tuple[Column, ...]:
    """The columns that were asked for.

    Raises:
        ConfigError: a reward has no such name or url, or a column is there twice.
    """
    columns: list[Column] = []
    for each in asked:
        prompts: list[str | None] = [*each.prompts] or [None]
        try:
            columns += [Column(RewardConfig(name=each.name, url=each.url, prompt=p)) for p in prompts]
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            message = problem["msg"].removeprefix("Value error, ")
            raise ConfigError(f"--reward {each.name}: {problem['input']!r}: {message}") from error
    names = [column.name for column in columns]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"--reward {twice} is given twice: give each once")
    if any(column.reward.url is None for column in columns):
        served = served_names()
        for column in columns:
            if column.reward.url is None and column.reward.name not in served:
                raise ConfigError(
                    f"--reward: unknown reward {column.reward.name!r}, and it has no url; "
                    f"{nearest(column.reward.name, served)}"
                )
    return tuple(columns)


@cache
def served_names() -> tuple[str, ...]:
    """The rewards that can be served here, as `python -m services list` knows them.

    Raises:
        LocalRewardsError: it cannot be asked.
    """
    command = [sys.executable, "-m", "services", "list"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError) as error:
        raise LocalRewardsError(f"python -m services list: {error}") from error
    return tuple(line.split()[0] for line in done.stdout.splitlines() if line.strip())


class Scorers:
    """A client for each column; what is sent is scored by all of them at once."""

    def __init__(
        self, columns: Sequence[Column], services: LocalRewards, urls: dict[str, str], timeout_s: float
    ) -> None:
        """Nothing is reached yet; see `open`."""
        self._columns, self._services, self._urls, self._timeout_s = tuple(columns), services, urls, timeout_s
        self._scorers: dict[str, Scorer] = {}

    def open(self, stack: ExitStack) -> None:
        """Reach every service, until the stack is closed.

        Raises:
            ConfigError: a prompt is missing or of no use, or a variable of the environment is wrong.
            RewardError: a service cannot be reached or is not ready in time.
        """
        for column in self._columns:
            reward = column.reward
            try:
                scorer = Scorer(
                    [reward],
                    {reward.name: reward.url or self._urls[reward.name]},
                    timeout_s=self._timeout_s,
                    ready_timeout_s=min(self._timeout_s, READY_S),
                    token=load_settings().token,
                )
            except ScoreError as error:
                remedy = "give it --prompt TEXT" if reward.prompt is None else "leave its --prompt out"
                raise ConfigError(f"--reward {reward.name}: {str(error).partition(',')[0]}; {remedy}") from error
            self._scorers[column.name] = stack.enter_context(scorer)
            self._services.when_dead(scorer.abort)

    @property
    def models(self) -> dict[str, str]:
        """Name and version of the model behind each column."""
        return {name: scorer.models[next(iter(scorer.models))] for name, scorer in self._scorers.items()}

    def submit(self, images_BHW3: NDArray[np.uint8]) -> dict[str, Future[Scored]]:
        """Starts scoring uint8 images (B, H, W, 3)."""
        return {name: scorer.submit(images_BHW3) for name, scorer in self._scorers.items()}


def collect_scores(pending: dict[str, Future[Scored]]) -> dict[str, NDArray[np.float64]]:
    """Waits for the scores of a batch: float64 (B,) for each column.

    Raises:
        RewardError, ScoreError: a score did not come or is not a number; the other columns are not waited for.
    """
    scores: dict[str, NDArray[np.float64]] = {}
    try:
        for name, future in pending.items():
            scores[name] = next(iter(collect([future]).raw.values()))
    except BaseException:
        for future in pending.values():
            future.cancel()
        raise
    return scores
