"""The entry: `python -m trainer.run [RECIPE] [--section.key value …]`.

Parses the settings, starts what the run needs, calls the training step, writes the run's folder, closes everything.
"""

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from rich.console import Console
from rich.markup import escape

from services.client import RewardError
from trainer.config import DEFAULT_RECIPE, ConfigError, load_config, parse_overrides, read_recipe, recipe_names
from trainer.local_rewards import LocalRewardsError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0 done, 1 failed, 2 wrong settings, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.run",
        description="Fine-tune a next-scale image model by GRPO against reward services.",
        epilog="Every setting of a recipe is an option, e.g. --run.steps 20 --optim.lr 1e-4 --rewards.0.url http://…",
    )
    parser.add_argument("recipe", nargs="?", default=DEFAULT_RECIPE, help=f"name or .yaml file ({DEFAULT_RECIPE})")
    parser.add_argument("--list", action="store_true", help="list the recipes and exit")
    given = list(sys.argv[1:] if arguments is None else arguments)
    has_recipe = bool(given) and not given[0].startswith("-")
    known = parser.parse_args([*given[:1]] if has_recipe else [a for a in given if a in ("-h", "--help", "--list")])
    console = Console(stderr=True, highlight=False)
    if known.list or "--list" in given:
        list_recipes(Console(highlight=False))
        return 0
    if "-h" in given or "--help" in given:
        parser.print_help()
        return 0
    return run_safely(known.recipe, given[1:] if has_recipe else given, console)


def list_recipes(console: Console) -> None:
    """Prints each recipe's name and its one line."""
    names = recipe_names()
    width = max(map(len, names))
    for name in names:
        summary = escape(str(read_recipe(name)[1].get("summary", "")))
        console.print(f"[bold]{name:<{width}}[/]  {summary}", soft_wrap=True)


def run_safely(recipe: str, options: Sequence[str], console: Console) -> int:
    """Trains, and turns every expected failure into one line and an exit code."""
    logging.getLogger("stamina").addHandler(logging.NullHandler())  # a retry that succeeds is no news
    previous = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        config = load_config(recipe, parse_overrides(options))
        # Only now, for a mistyped option should not wait for torch.
        from trainer.judges import JudgeError  # noqa: PLC0415
        from trainer.models.checkpoints import CheckpointError  # noqa: PLC0415
        from trainer.scoring import ScoreError  # noqa: PLC0415
        from trainer.session import train  # noqa: PLC0415

        expected = (RewardError, LocalRewardsError, ScoreError, CheckpointError, JudgeError, FloatingPointError)
        try:
            train(config, recipe, console)
        except expected as error:
            return _fail(console, error, code=1)
        except OSError as error:
            remedy = "make room there, or set another --run.dir that can be written"
            return _fail(console, f"run.dir {config.run.dir}: {error}; {remedy}", code=1)
    except ConfigError as error:
        return _fail(console, error, code=2)
    except KeyboardInterrupt:
        kept = "the services are stopped; a checkpoint is written after the last step, not before"
        return _fail(console, f"interrupted; {kept}", code=130)
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def _on_sigterm(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _fail(console: Console, error: object, *, code: int) -> int:
    message = " ".join(str(error).split()) or type(error).__name__
    console.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
