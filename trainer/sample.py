"""Look at what policies draw: `python -m trainer.sample [NAME=]MODEL … [--compare] [--labels LABELS] [--seeds SEEDS]`.

Writes a grid, or a file for each image, as PNGs that hold their settings.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from trainer.command import Parser, command_line, number, one_of, run_safely
from trainer.config import ConfigError
from trainer.inference.sampling import Sampling, add_sampling_options, sampling_of
from trainer.settings import Ranks

MODULE = "trainer.sample"
DEFAULT_LABELS = 8  # spread over the labels, where none is named
MOST_SEEDS = 10_000
MOST_PIXELS = 100_000_000  # of a grid


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code.

    0: done. 1: failed. 2: wrong settings. 130: interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    console = Console(stderr=True, highlight=False)

    def work() -> None:
        options = _parser().parse(given)
        sampling, seeds = sampling_of(options), parse_seeds(options.seeds)
        _draw_all(options, sampling, seeds, command_line(MODULE, given, Ranks()), console)

    return run_safely(work, console)


def _parser() -> Parser:
    parser = Parser(
        prog=f"python -m {MODULE}",
        description="Draw images of labels: the same labels and seeds of each model.",
        epilog="MODEL is a run's folder, the folder of one of its states, a file of weights (with --vqvae), a "
        "published name such as FoundationVision/var:var_d16.pth, `miniature`, or `pretrained`: what the first run "
        "began with.",
    )
    parser.add_argument("models", nargs="+", metavar="[NAME=]MODEL", help="a panel of the grid")
    parser.add_argument("--compare", action="store_true", help="put what the run began with before it: `pretrained`")
    parser.add_argument("--vqvae", help="tokenizer of files of weights that are of no run: `miniature`, or a file")
    parser.add_argument("--labels", help=f"by index or name, such as 0-3,ball ({DEFAULT_LABELS} spread over all)")
    parser.add_argument("--seeds", default="0-3", help="such as 0-3,7 (0-3)")
    parser.add_argument(
        "--per-seed", type=number(int, 1, 10**6), default=1, metavar="N", help="images of each label and seed (1)"
    )
    add_sampling_options(parser)
    parser.add_argument("--chunk", type=number(int, 1, 65_536), default=64, help="images drawn at once (64)")
    parser.add_argument("--device", type=one_of("auto", "cpu", "cuda"), metavar="auto|cpu|cuda", default="auto")
    parser.add_argument(
        "--dtype",
        type=one_of("float32", "bfloat16"),
        default="float32",
        metavar="float32|bfloat16",
        help="of the transformer",
    )
    parser.add_argument("--zoom", type=number(int, 1, 64), default=1, help="times that a grid is enlarged (1)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs") / "samples.png", metavar="PATH",
        help="a .png for one grid, or a folder for a file an image (runs/samples.png)",
    )  # fmt: skip
    return parser


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds of a comma-separated list such as `0-3,7`, in its order.

    Raises:
        ConfigError: it is none, or too long.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) >= 2**31:
            raise ConfigError(f"--seeds: {part!r} is no seed; write numbers from 0 to {2**31 - 1:,}, such as 0-3,7")
        count = int(last or first) - int(first) + 1
        if not 0 < count <= MOST_SEEDS - len(seeds):
            raise ConfigError(f"--seeds: {part!r} is {count} seeds; give from 1 to {MOST_SEEDS:,} of them")
        seeds += range(int(first), int(last or first) + 1)
    if len(set(seeds)) < len(seeds):
        twice = next(seed for seed in seeds if seeds.count(seed) > 1)
        raise ConfigError(f"--seeds: {twice} is given twice; name each seed once")
    return tuple(seeds)


def _draw_all(
    options: argparse.Namespace, sampling: Sampling, seeds: tuple[int, ...], command: str, console: Console
) -> None:
    # Only now, for a mistyped option should not wait for torch.
    from trainer.build import choose_device  # noqa: PLC0415
    from trainer.contact_sheet import Panel, check_names, check_size, join, save_images, save_sheet  # noqa: PLC0415
    from trainer.inference.drawing import draw  # noqa: PLC0415
    from trainer.inference.labels import label_names  # noqa: PLC0415
    from trainer.inference.loading import load_policy  # noqa: PLC0415
    from trainer.inference.sources import PRETRAINED, find_sources  # noqa: PLC0415

    models = [*([PRETRAINED] if options.compare else []), *options.models]
    sources, is_sheet = find_sources(models, options.vqvae), options.out.suffix.lower() == ".png"
    if not is_sheet:
        check_names([source.name for source in sources])
    device, weights, panels = choose_device(options.device), list[str](), list[Panel]()
    settings = {"command": command, "sampling": sampling.to_dict(), "dtype": options.dtype, "device": device.type}
    for source in sources:
        policy = load_policy(source, device, options.dtype)
        labels, rows = _labels_of(options.labels, policy.var.config.num_classes, label_names(source.world))
        side, per_label = policy.vqvae.config.image_size, len(seeds) * int(options.per_seed)
        if is_sheet:
            check_size(len(labels), per_label * len(sources), side * int(options.zoom), MOST_PIXELS)
        if panels and (side != panels[0].images_BHW3.shape[1] or len(labels) != len(panels[0].rows)):
            raise ConfigError(f"{source.name} and {panels[0].name} have other labels or sizes: draw them one by one")
        weights.append(policy.digest())
        about = {"model": str(source.state or source.var), "vqvae": source.vqvae, "weights": weights[-1]}
        keys, parts = itertools.product(labels, seeds, range(int(options.per_seed))), list[Panel]()
        while part := tuple(itertools.islice(keys, int(options.chunk))):
            images = draw(policy, [k[0] for k in part], [k[2] for k in part], sampling, seeds=[k[1] for k in part])
            parts.append(Panel(source.name, images, part, rows, about))
            if not is_sheet:  # at once: there may be more of them than the memory holds
                save_images(options.out, parts.pop(), settings)
        if is_sheet:
            panels.append(join(parts))
    if is_sheet:
        save_sheet(options.out, panels, settings, zoom=int(options.zoom))
    said = json.dumps([digest[:12] for digest in weights])
    console.print(escape(f"{options.out}   {sampling}   weights {said}"), soft_wrap=True)


def _labels_of(text: str | None, count: int, names: tuple[str, ...]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The labels that are drawn, and what their rows are called."""
    from trainer.evaluation import spread_labels  # noqa: PLC0415
    from trainer.inference.labels import parse_labels  # noqa: PLC0415

    names = names if len(names) == count else ()
    if text:
        labels = parse_labels(text, count, names, "--labels")
    else:
        labels = tuple(spread_labels(min(DEFAULT_LABELS, count), tuple(range(count))).tolist())
    return labels, tuple(names[label] if names else str(label) for label in labels)


if __name__ == "__main__":
    sys.exit(main())
