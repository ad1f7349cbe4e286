"""The paper's experiments in miniature: `python -m trainer.reproduce [--seeds 0-2] [--dir FOLDER] [--results FILE]`."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from trainer.command import Parser, command_line, number, run_safely
from trainer.failures import EXIT_SUSPENDED, Suspended
from trainer.settings import Ranks

MODULE = "trainer.reproduce"


class StageError(OSError):
    """A command of the programme has failed; the message names it."""


def main(arguments: Sequence[str] | None = None, *, ends_process: bool = False) -> int:
    """Runs the command line; returns the exit code.

    0: done. 1: a command of the programme has failed. 2: wrong settings. 75: not done, and the same command goes on.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    console = Console(stderr=True, highlight=False)
    command = command_line(MODULE, given, Ranks())

    def work() -> None:
        options = _parser().parse(given)
        # Only now, for a mistyped option should not wait for torch.
        from trainer.sweep.plan import parse_seeds  # noqa: PLC0415

        seeds = parse_seeds(options.seeds)
        reproduce(options.dir, seeds, options.jobs, options.results, command, console, ends_process=ends_process)

    return run_safely(work, console, goes_on=command)


def reproduce(
    folder: Path,
    seeds: Sequence[int],
    jobs: int | None,
    results: Path | None,
    command: str,
    console: Console,
    *,
    ends_process: bool,
) -> None:
    """Runs what is left of the programme, and writes down what came of it.

    Args:
        folder: where its runs, evaluations and report go.
        seeds: of its runs.
        jobs: runs at a time; None for one a core on a CPU, one on a GPU.
        results: the page whose tables are filled; its pictures go into `pictures/` beside it. None for neither.
        command: that goes on where this one stopped.
        console: for what is being done.
        ends_process: whether the process ends with it.

    Raises:
        ConfigError: a setting is wrong, or another reproduction is at work in the folder.
        Suspended: it was told to stop; the same command goes on.
        StageError: a command has failed.
    """
    import torch  # noqa: PLC0415

    from trainer.interrupt import Interrupt  # noqa: PLC0415
    from trainer.reproduce import document, numbers, plots, stages  # noqa: PLC0415
    from trainer.run_folder import hold  # noqa: PLC0415

    if results is not None:
        document.check(results)
    on_gpu = torch.cuda.is_available()
    settings = ("--run.device", "cuda") if on_gpu else ()
    jobs = jobs or (1 if on_gpu else len(os.sched_getaffinity(0)))
    minutes = stages.expected_minutes(folder, seeds)
    console.print(
        f"The programme, seed {', '.join(map(str, seeds))} → {escape(str(folder))}: about {minutes:.0f} minutes on two "
        "CPU cores, less what is done already. It can be stopped, and the same command goes on.",
        soft_wrap=True,
    )
    with Interrupt(console, is_last=ends_process) as interrupt, hold(folder, "reproduction is", "--dir") as lock:
        stages.write_renders(folder / stages.RENDERS)
        for stage in stages.programme(folder, seeds, jobs, settings):
            console.rule(escape(stage.title))
            code = stages.run_stage(stage, interrupt, lock)
            if interrupt.requested or code == EXIT_SUSPENDED:
                raise Suspended(f"stopped at {stage.title}; what is done is kept: go on with: {command}")
            if code:
                raise StageError(
                    f"{stage.title}: exit code {code}, see above; the same command goes on once it is mended"
                )
        if results is not None:
            found = numbers.read(folder, seeds)
            plots.draw_all(folder, found, results.parent / "pictures")
            document.write(results, found)
            console.print(escape(f"{results}, {folder / 'report.html'}"), soft_wrap=True)


def _parser() -> Parser:
    parser = Parser(
        prog=f"python -m {MODULE}",
        description="Run the paper's experiments in miniature, evaluate and report them.",
        epilog="The same command again goes on where it was stopped.",
    )
    parser.add_argument("--seeds", default="0", metavar="0-2|0,1,2", help="of the runs (0)")
    parser.add_argument(
        "--jobs", type=number(int, 1, 1024), metavar="N", help="runs at a time (one a core; 1 on a GPU)"
    )
    parser.add_argument(
        "--dir", type=Path, default=Path("runs") / "reproduce", metavar="FOLDER", help="(runs/reproduce)"
    )
    parser.add_argument("--results", type=Path, metavar="FILE", help="a page to fill, such as docs/results.md")
    return parser


if __name__ == "__main__":
    sys.exit(main(ends_process=True))
