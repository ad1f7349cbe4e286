"""One picture of a run: `python -m trainer.plot RUN OUT.png` draws its curves and its samples before and after."""

import argparse
import json
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
from PIL import Image

ROWS = 2  # of the sample grids that are shown
REWARD_COLOUR, LABEL_COLOUR = "#c2571a", "#2a6f97"


def draw_run(run: Path, out: Path) -> None:
    """Draws reward and label accuracy by step, above the first and the last sample grid.

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
    steps, rewards = [line["step"] for line in lines], [line["reward"] for line in lines]
    title = f"{summary['recipe']}, seed {summary['seed']}: {summary['steps']} steps in {summary['seconds']:.0f} s"
    axes[0].plot(steps, rewards, color=REWARD_COLOUR, label="reward", linewidth=1.8)
    axes[0].set(xlim=(steps[0], max(steps[-1], 2)), xlabel="step", title=title)
    axes[0].spines[["top", "right"]].set_visible(False)
    is_share = min(rewards) >= 0 and max(rewards) <= 1
    if is_share:
        axes[0].set_ylim(0, 1.02)
    if all(line.get("label_accuracy") is not None for line in lines):
        axis = axes[0] if is_share else axes[0].twinx()
        accuracy = [line["label_accuracy"] for line in lines]
        axis.plot(steps, accuracy, color=LABEL_COLOUR, label="label accuracy (not optimised)", linewidth=1.8)
        axis.set_ylim(0, 1.02)
    figure.legend(loc="outside upper right", frameon=False, ncols=2)
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
