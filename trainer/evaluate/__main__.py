"""What policies are worth: `python -m trainer.evaluate [NAME=]MODEL … [--images FOLDER] [--reward NAME[=URL]] …`.

Draws the same samples of each, has them scored and judged, and writes `evaluation.json` and `table.md`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from trainer.command import Parser, command_line, number, one_of, run_safely
from trainer.config import ConfigError
from trainer.evaluate.columns import add_reward_options, columns_of
from trainer.inference.sampling import add_sampling_options, sampling_of
from trainer.settings import Ranks

MODULE = "trainer.evaluate"


def main(arguments: Sequence[str] | None = None, *, ends_process: bool = False) -> int:
    """Runs the command line; returns the exit code.

    0: done. 1: failed. 2: wrong settings. 75: not done, and the same command goes on. 130: interrupted twice.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    console = Console(stderr=True, highlight=False)
    ranks = Ranks()
    command = command_line(MODULE, given, ranks)

    def work() -> None:
        options = _parser().parse(given)
        if not options.models and not options.images:
            raise ConfigError(
                "nothing to evaluate: name a model, such as miniature or a run's folder, or --images FOLDER"
            )
        sampling, columns = sampling_of(options), columns_of(options.rewards)
        # Only now, for a mistyped option should not wait for torch.
        from trainer.evaluate.session import evaluate  # noqa: PLC0415

        evaluate(options, sampling, columns, ranks, command, console, ends_process=ends_process)

    return run_safely(work, console, goes_on=command)


def _parser() -> Parser:
    parser = Parser(
        prog=f"python -m {MODULE}",
        description="Sample policies, score and judge the samples, and print a table of means and 95 % intervals.",
        epilog="MODEL is a run's folder, the folder of one of its states, a file of weights (with --vqvae), a "
        "published name such as FoundationVision/var:var_d16.pth, `miniature`, or `pretrained`: what the first run "
        "began with. The same command again goes on where it was stopped. Under torchrun each rank takes a share.",
    )
    parser.add_argument("models", nargs="*", metavar="[NAME=]MODEL", help="a row of the table")
    parser.add_argument(
        "--images", action="append", default=[], metavar="[NAME=]FOLDER",
        help="a row of pictures; sub-folders are named for labels; may be repeated",
    )  # fmt: skip
    parser.add_argument("--size", type=number(int, 8, 4096), help="side of --images in pixels (that of the samples)")
    parser.add_argument("--vqvae", help="tokenizer of files of weights that are of no run: `miniature`, or a file")
    parser.add_argument(
        "--per-class", type=number(int, 1, 10**6), default=50, metavar="N", help="images of each label (50)"
    )
    parser.add_argument("--labels", help="labels to draw, such as 0-499,ball (all)")
    parser.add_argument("--seen", metavar="LABELS", help="labels that were trained on (those of the runs)")
    add_sampling_options(parser)
    parser.add_argument("--seed", type=number(int, 0, 2**31 - 1), default=0, help="of the random numbers (0)")
    add_reward_options(parser)
    parser.add_argument(
        "--classifier",
        type=one_of("miniature", "imagenet", "none"),
        metavar="miniature|imagenet|none",
        help="who knows the labels (that of the models)",
    )
    parser.add_argument("--chunk", type=number(int, 1, 65_536), default=64, help="images drawn and scored at once (64)")
    parser.add_argument("--device", type=one_of("auto", "cpu", "cuda"), metavar="auto|cpu|cuda", default="auto")
    parser.add_argument(
        "--dtype",
        type=one_of("float32", "bfloat16"),
        default="float32",
        metavar="float32|bfloat16",
        help="of the transformer",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs") / "evaluation", metavar="FOLDER", help="(runs/evaluation)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(ends_process=True))
