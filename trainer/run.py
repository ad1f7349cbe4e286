"""The entry: `python -m trainer.run [RECIPE] [--section.key value …]`.

Parses the settings, starts what the run needs, calls the training step, writes the run's folder, closes everything.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from services.client import RewardError
from trainer.command import command_line, fail
from trainer.config import ConfigError
from trainer.failures import EXIT_SUSPENDED, Stopped, Suspended
from trainer.interrupt import Interrupted
from trainer.local_rewards import LocalRewardsError
from trainer.options import DEFAULT_RECIPE, load_config, parse_overrides, read_recipe, recipe_names
from trainer.settings import Ranks


def main(arguments: Sequence[str] | None = None, *, ends_process: bool = False) -> int:
    """Runs the command line; returns the exit code.

    0: all steps are done. 1: failed. 2: wrong settings. 75: not done, and `--resume` goes on. 130: interrupted at once.
    """
    parser = argparse.ArgumentParser(
        prog="python -m trainer.run",
        description="Fine-tune a next-scale image model by GRPO against reward services.",
        epilog="Every setting of a recipe is an option, e.g. --run.steps 20 --optim.lr 1e-4 --rewards.0.url http://…; "
        "--resume [FOLDER] goes on with the latest run of that name, or with the one in FOLDER.",
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
    return run_safely(known.recipe, given[1:] if has_recipe else given, console, ends_process=ends_process)


def list_recipes(console: Console) -> None:
    """Prints each recipe's name and its one line."""
    names = recipe_names()
    width = max(map(len, names))
    for name in names:
        summary = escape(str(read_recipe(name)[1].get("summary", "")))
        console.print(f"[bold]{name:<{width}}[/]  {summary}", soft_wrap=True)


def run_safely(  # noqa: PLR0911 - a return for each exit code
    recipe: str, options: Sequence[str], console: Console, *, ends_process: bool
) -> int:
    """Trains, and turns every expected failure into one line and an exit code."""
    logging.getLogger("stamina").addHandler(logging.NullHandler())  # a retry that succeeds is no news
    try:
        options, resume, must_resume = take_resume(options)
        config = load_config(recipe, parse_overrides(options))
        # Only now, for a mistyped option should not wait for torch.
        import torch  # noqa: PLC0415

        from trainer.distributed import RankError  # noqa: PLC0415
        from trainer.judges import JudgeError  # noqa: PLC0415
        from trainer.lora import LoraError  # noqa: PLC0415
        from trainer.models.checkpoints import CheckpointError  # noqa: PLC0415
        from trainer.scoring import ScoreError  # noqa: PLC0415
        from trainer.session import Start  # noqa: PLC0415
        from trainer.start import train  # noqa: PLC0415

        start = Start(
            recipe, resume, must_resume, command_line("trainer.run", [recipe, *options], Ranks()), ends_process
        )
        expected = (
            *(RewardError, LocalRewardsError, ScoreError, RankError, Stopped, FloatingPointError),
            *(CheckpointError, JudgeError, LoraError),
        )
        try:
            train(config, start, console)
        except Suspended as error:
            return fail(console, error, code=EXIT_SUSPENDED)
        except expected as error:
            return fail(console, error, code=1)
        except (torch.OutOfMemoryError, MemoryError) as error:
            remedy = "lower optim.micro_batch or rollout.chunk, or set model.recompute true or model.lora"
            return fail(console, f"out of memory: {error}; {remedy}", code=1)
        except OSError as error:
            remedy = "make room there, or set another --run.dir that can be written"
            return fail(console, f"run.dir {config.run.dir}: {error}; {remedy}", code=1)
    except ConfigError as error:
        return fail(console, error, code=2)
    except KeyboardInterrupt as error:
        kept = "the services are stopped; --resume goes on from the last state that was saved, if there is one"
        return fail(console, f"interrupted; {kept}", code=EXIT_SUSPENDED if isinstance(error, Interrupted) else 130)
    return 0


def take_resume(options: Sequence[str]) -> tuple[list[str], Path | None, bool]:
    """The options without `--resume [FOLDER]`, the folder, and whether it was there.

    Raises:
        ConfigError: it is there twice.
    """
    left, given, folder = list(options), False, None
    for form in [option for option in options if option.partition("=")[0] == "--resume"]:
        if given:
            raise ConfigError("--resume is given twice: give it once")
        given, position = True, left.index(form)
        _, equals, text = left.pop(position).partition("=")
        if not equals and position < len(left) and not left[position].startswith("--"):
            text = left.pop(position)
        folder = Path(text) if text else None
    return left, folder, given


if __name__ == "__main__":
    sys.exit(main(ends_process=True))
