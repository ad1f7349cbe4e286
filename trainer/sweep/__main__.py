"""Many runs from one file: `python -m trainer.sweep NAME|FILE [--seeds 0-2] [--jobs N] … [--section.key value …]`."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from trainer.command import Parser, command_line, fail, number, run_safely
from trainer.config import ConfigError
from trainer.options import parse_overrides
from trainer.settings import Ranks
from trainer.sweep.plan import Plan, Run, parse_seeds, read_sweep, refuse_own, sweep_names

MODULE = "trainer.sweep"


def main(arguments: Sequence[str] | None = None, *, ends_process: bool = False) -> int:
    """Runs the command line; returns the exit code.

    0: all runs are done. 1: one has failed. 2: wrong settings. 75: not done, and the same command goes on.
    130: interrupted twice.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    console, out = Console(stderr=True, highlight=False), Console(highlight=False)
    try:
        own, settings = split_settings(given)
        options = _parser().parse(own)
        if options.list:
            list_sweeps(out)
            return 0
        if options.sweep is None:
            raise ConfigError("name a sweep or its YAML file; --list lists those that come with the project")
        refuse_own(parse_overrides(settings), "options")
        name, file = read_sweep(options.sweep)
        plan = Plan(name, file, options.dir / name, tuple(settings))
        seeds = parse_seeds(options.seeds)
        runs = plan.runs(seeds, [] if options.points is None else options.points.split(","))
    except ConfigError as error:
        return fail(console, error, 2)
    succeeded = True

    def work() -> None:
        nonlocal succeeded
        # Only now, for a mistyped option should not wait for torch.
        from trainer.sweep.session import check, sweep  # noqa: PLC0415
        from trainer.sweep.table import show, summarise  # noqa: PLC0415

        check(runs)
        if options.dry_run:
            show_commands(runs, out)
            return
        if options.summary:
            show(summarise(plan, seeds), console)
            return
        command = command_line(MODULE, given, Ranks())
        succeeded = sweep(plan, runs, int(options.jobs), command, console, ends_process=ends_process)

    return run_safely(work, console, goes_on=command_line(MODULE, given, Ranks())) or int(not succeeded)


def split_settings(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command's own options, and those of the runs, which are known by the dot in their names."""
    own, settings, rest = list[str](), list[str](), list(given)
    while rest:
        option = rest.pop(0)
        is_setting = option.startswith("--") and "." in option.partition("=")[0]
        (settings if is_setting else own).append(option)
        if is_setting and "=" not in option and rest:
            settings.append(rest.pop(0))
    return own, settings


def list_sweeps(console: Console) -> None:
    """Prints each sweep's name and its one line."""
    names = sweep_names()
    width = max(map(len, names))
    for name in names:
        console.print(f"[bold]{name:<{width}}[/]  {escape(read_sweep(name)[1].summary)}", soft_wrap=True)


def show_commands(runs: Sequence[Run], console: Console) -> None:
    """Prints the command of each run, in the order in which they start."""
    for run in runs:
        console.print(escape(shlex.join(["python", "-m", *run.arguments])), soft_wrap=True)


def _parser() -> Parser:
    parser = Parser(
        prog=f"python -m {MODULE}",
        description="Run every point of a sweep with every seed, and sum up in sweep.json, summary.md and a table.",
        epilog="Every setting of a recipe is an option for all runs, e.g. --run.steps 20. The same command again "
        "goes on where it was stopped: runs that are done are left alone.",
    )
    parser.add_argument("sweep", nargs="?", metavar="NAME|FILE", help="a sweep of the project, or a YAML file")
    parser.add_argument("--seeds", default="0", metavar="0-2|0,1,2", help="of the runs of each point (0)")
    parser.add_argument("--points", metavar="NAME,…", help="run these points only")
    parser.add_argument("--jobs", type=number(int, 1, 1024), default=1, metavar="N", help="runs at a time (1)")
    parser.add_argument("--dir", type=Path, default=Path("runs") / "sweeps", metavar="FOLDER", help="(runs/sweeps)")
    parser.add_argument("--list", action="store_true", help="list the sweeps and exit")
    parser.add_argument("--dry-run", action="store_true", help="print the commands of the runs and exit")
    parser.add_argument("--summary", action="store_true", help="only write and print the summary again")
    return parser


if __name__ == "__main__":
    sys.exit(main(ends_process=True))
