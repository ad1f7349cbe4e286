"""What the commands share: options in one line of error each, and exit codes.

0: done. 1: failed. 2: wrong settings. 75: not done, and the same command goes on. 130: interrupted.
"""

import argparse
import logging
import math
import shlex
from collections.abc import Callable, Sequence
from typing import NoReturn

from rich.console import Console
from rich.markup import escape

from services.client import RewardError
from trainer.config import ConfigError
from trainer.failures import EXIT_SUSPENDED, Suspended
from trainer.interrupt import Interrupted
from trainer.local_rewards import LocalRewardsError
from trainer.nearest import nearest
from trainer.settings import Ranks


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `ConfigError`s of one line; an option is never abbreviated."""

    def __init__(self, *, prog: str, description: str, epilog: str | None = None) -> None:
        super().__init__(prog=prog, description=description, epilog=epilog, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print with its usage."""
        raise ConfigError(f"{message.removeprefix('argument ')}; --help lists the options")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The options; positional arguments may stand between them.

        Raises:
            ConfigError: an option is unknown, or its value cannot be read.
        """
        options, rest = self.parse_known_intermixed_args(arguments)
        if rest:
            option = rest[0].partition("=")[0]
            known = [text for text in self._option_string_actions if text.startswith("--")]
            raise ConfigError(f"unknown option {option}: {nearest(option, known)}")
        return options


def number(kind: type[int] | type[float], least: float, most: float, *, above: bool = False) -> Callable[[str], float]:
    """A reader of numbers in a range, `above` its lower end or from it, for an option's `type`."""

    def read(text: str) -> float:
        try:
            value: float = kind(text)
        except ValueError:
            value = math.nan  # in no range
        if not (least < value <= most if above else least <= value <= most):
            name, begin = "a whole number" if kind is int else "a number", "above" if above else "from"
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} {begin} {least:,} to {most:,}")
        return value

    return read


def one_of(*names: str) -> Callable[[str], str]:
    """A reader of one of some names, for an option's `type`."""

    def read(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"unknown {text!r}; {nearest(text, names)}")
        return text

    return read


def command_line(module: str, arguments: Sequence[str], ranks: Ranks) -> str:
    """The command that started this process, as it can be typed again."""
    if ranks.world_size == 1:
        return shlex.join(["python", "-m", module, *arguments])
    machines = ranks.world_size // ranks.local_world_size
    several = ["--nnodes", str(machines), "--rdzv-endpoint", "HOST:PORT"] if machines > 1 else []
    start = ["torchrun", *several, "--nproc-per-node", str(ranks.local_world_size), "-m", module]
    return shlex.join([*start, *arguments])


def run_safely(work: Callable[[], object], console: Console, *, goes_on: str | None = None) -> int:
    """Does the work, and turns every expected failure into one line and an exit code.

    Args:
        work: raises what its parts raise.
        console: for the line.
        goes_on: the command that goes on where this one stopped; None where there is none.
    """
    logging.getLogger("stamina").addHandler(logging.NullHandler())  # a retry that succeeds is no news
    try:
        return _do(work, console)
    except ConfigError as error:
        return fail(console, error, 2)
    except Suspended as error:
        return fail(console, error, EXIT_SUSPENDED)
    except KeyboardInterrupt as error:
        if goes_on is not None and isinstance(error, Interrupted):
            return fail(console, f"interrupted; what is done is kept: go on with: {goes_on}", EXIT_SUSPENDED)
        return fail(console, "interrupted", 130)


def _do(work: Callable[[], object], console: Console) -> int:
    # Only now, for a mistyped option should not wait for torch.
    import torch  # noqa: PLC0415

    from trainer.distributed import RankError  # noqa: PLC0415
    from trainer.evaluate.picture_folder import PictureError  # noqa: PLC0415
    from trainer.judges import JudgeError  # noqa: PLC0415
    from trainer.lora import LoraError  # noqa: PLC0415
    from trainer.models.checkpoints import CheckpointError  # noqa: PLC0415
    from trainer.scoring import ScoreError  # noqa: PLC0415

    expected = (
        *(RewardError, LocalRewardsError, ScoreError, RankError),
        *(CheckpointError, JudgeError, LoraError, PictureError, OSError),
    )
    try:
        work()
    except expected as error:
        return fail(console, error, 1)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return fail(console, f"out of memory: {error}; lower --chunk", 1)
    return 0


def fail(console: Console, error: object, code: int) -> int:
    """Says in one line what went wrong; returns the exit code."""
    message = " ".join(str(error).split()) or type(error).__name__
    console.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    return code
