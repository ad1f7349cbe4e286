"""One page of everything: `python -m trainer.report RUN… [--evaluation FOLDER …] [--sweep FOLDER …] --out report.html`.

Reads the folders and changes none of them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from trainer.command import Parser, run_safely
from trainer.config import ConfigError

MODULE = "trainer.report"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code.

    0: done. 1: a file cannot be read or written. 2: wrong options. 130: interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    console = Console(stderr=True, highlight=False)
    return run_safely(lambda: _write(_parser().parse(given), console), console)


def _write(options: argparse.Namespace, console: Console) -> None:
    if not (options.runs or options.evaluations or options.sweeps):
        raise ConfigError("nothing to report: name a run's folder, or give --evaluation FOLDER or --sweep FOLDER")
    out: Path = options.out
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; name the file: --out {out / 'report.html'}")
    if out.exists() and not out.is_file():
        raise ConfigError(f"--out {out} is no regular file, and would be replaced by one; name another")
    # Only now, for a mistyped option should not wait for torch.
    from trainer.models.checkpoints import write_atomically  # noqa: PLC0415
    from trainer.report import evaluations, sweeps  # noqa: PLC0415
    from trainer.report.files import find_folders  # noqa: PLC0415
    from trainer.report.page import Report, render  # noqa: PLC0415
    from trainer.report.runs import read_run  # noqa: PLC0415

    runs = find_folders(options.runs, "config.yaml", "a run's folder")
    evaluated = find_folders(options.evaluations, evaluations.FILE, "an evaluation's folder")
    swept = find_folders(options.sweeps, sweeps.FILE, "a sweep's folder")
    report = Report(
        title=options.title,
        runs=[read_run(folder) for folder in runs],
        evaluations=[(folder.resolve().name, evaluations.read_evaluation(folder)) for folder in evaluated],
        sweeps=[sweeps.read_sweep(folder) for folder in swept],
    )
    content = render(report).encode("utf-8", "replace")
    write_atomically(out, len(content), lambda temporary: temporary.write_bytes(content))
    console.print(escape(f"{out}  {len(content) / 1e6:.1f} MB"), soft_wrap=True)


def _parser() -> Parser:
    parser = Parser(
        prog=f"python -m {MODULE}",
        description="Write one self-contained HTML file about runs, evaluations and sweeps.",
        epilog="RUN is the folder of a run, finished or not. Runs that differ in their seed alone are shown together.",
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="the folder of a run")
    for option, what in (("evaluation", "trainer.evaluate"), ("sweep", "trainer.sweep")):
        parser.add_argument(
            f"--{option}", dest=f"{option}s", action="extend", nargs="+", default=[], metavar="FOLDER",
            help=f"folders that {what} has written; name the runs before it",
        )  # fmt: skip
    parser.add_argument("--title", default="Training report", metavar="TEXT", help="of the page (Training report)")
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="(report.html)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
