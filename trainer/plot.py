"""One picture of a run: `python -m trainer.plot RUN OUT.png` draws its curves and its samples before and after."""

import argparse
import json
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
from PIL import Image

ROWS = 2  # of the sample grids that are shown
CURVES = (
    ("success_rate", "success rate", "#c2571a"),
    ("label_accuracy", "label accuracy (not optimised)", "#2a6f97"),
)


def draw_run(run: Path, out: Path) -> None:
    """Draws success rate and label accuracy by step, above the first and the last sample grid.

    Args:
        run: a run's folder.
        out: the PNG to write.

    Raises:
        ValueError: the folder holds no finished step or fewer than two grids.
        OSError: a file cannot be read or written.
    """
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    grids = sorted((run / "grids").glob("step_*.png"))
    if not lines or len(grids) < 2:
        raise ValueError(f"{run} holds {len(lines)} steps and {len(grids)} grids; it takes 1 step and 2 grids to draw")
    summary = json.loads((run / "summary.json").read_text())
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 - after the backend is chosen

    figure, axes = plt.subplots(3, 1, figsize=(10, 6.4), height_ratios=(2.1, 1.3, 1.3), layout="constrained")
    steps = [line["step"] for line in lines]
    for name, label, colour in CURVES:
        if all(line.get(name) is not None for line in lines):
            axes[0].plot(steps, [line[name] for line in lines], color=colour, label=label, linewidth=1.8)
    axes[0].set(ylim=(0, 1.02), xlim=(steps[0], steps[-1]), xlabel="step")
    axes[0].set_title(
        f"{summary['recipe']}, seed {summary['seed']}: {summary['steps']} steps in {summary['seconds']:.0f} s"
    )
    axes[0].legend(loc="center right", frameon=False)
    axes[0].spines[["top", "right"]].set_visible(False)
    for axis, grid, title in ((axes[1], grids[0], "before"), (axes[2], grids[-1], "after")):
        picture = np.asarray(Image.open(grid))
        axis.imshow(picture[: round(len(picture) * ROWS / 4)])
        axis.set_title(f"{title}: same labels, same seeds", fontsize=10)
        axis.axis("off")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer.plot", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    try:
        draw_run(arguments.run, arguments.out)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
