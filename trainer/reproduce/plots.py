"""The pictures of docs/results.md: every experiment before and after, progress by step, and the two ablations."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from statistics import fmean

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from trainer.models.checkpoints import write_atomically
from trainer.plot import draw_run
from trainer.reproduce.numbers import Programme
from trainer.reproduce.stages import GROUPS, KL, PAPER, folder_of, plan_of

REWARD_COLOUR, LABEL_COLOUR = "#c2571a", "#2a6f97"
CELL, GAP = 64, 2  # pixels of a grid's samples, and between them
SHOWN = (0, 1, 2, 3, 4, 5)  # columns of a grid, of which a strip shows the first row
ZOOM = 2
STRIPS = ("old-picture", "painting", "painting-aesthetic")  # experiments whose progress is shown


def draw_all(folder: Path, programme: Programme, pictures: Path) -> list[Path]:
    """Draws every picture, of the first seed where it shows samples.

    Args:
        folder: of the programme.
        programme: its numbers.
        pictures: where the PNGs go.

    Returns:
        The runs' pictures, in the order of the experiments.
    """
    drawn = []
    for run in plan_of(folder, PAPER).runs(programme.seeds[:1]):
        drawn.append(pictures / f"{run.recipe}.png")
        draw_run(folder_of(run), drawn[-1])
        if run.point in STRIPS:
            draw_strip(folder_of(run) / "grids", pictures / f"strip-{run.recipe}.png")
    draw_ablation(programme, KL, "β, the weight of the KL", pictures / "mini-kl.png")
    draw_ablation(programme, GROUPS, "G, samples a group, at equal images and updates", pictures / "mini-groups.png")
    return drawn


def draw_strip(grids: Path, out: Path) -> None:
    """The same labels and seeds as training goes on: a row a label, a column a grid (the paper's Figures 3 and 5)."""
    step = CELL + GAP
    columns = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(grids.glob("step_*.png"))]
    strip = np.full((len(SHOWN) * step - GAP, len(columns) * step - GAP, 3), 255, np.uint8)
    for x, grid in enumerate(columns):
        for y, label in enumerate(SHOWN):
            cell = grid[:CELL, label * step : label * step + CELL]
            strip[y * step : y * step + CELL, x * step : x * step + CELL] = cell
    picture = Image.fromarray(strip)
    _save(picture.resize((picture.width * ZOOM, picture.height * ZOOM), Image.Resampling.NEAREST), out)


def draw_ablation(programme: Programme, sweep: str, axis: str, out: Path) -> None:
    """Reward and label accuracy at the end by a sweep's axis: a dot a seed, a line through the means."""
    points = programme.points(sweep)
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(8, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        for axes, name, colour in ((left, "reward", REWARD_COLOUR), (right, "label_accuracy", LABEL_COLOUR)):
            values = [
                [float(programme.run(sweep, point, seed)["after"][name]) for seed in programme.seeds]
                for point in points
            ]
            _draw_points(axes, points, values, colour)
            axes.set(xlabel=axis, title=f"{name.replace('_', ' ')} at the end")
        right.set_ylim(0, 1.02)
        memory = BytesIO()
        figure.savefig(memory, dpi=120, format="png", metadata={"Software": None})
    memory.seek(0)
    _save(Image.open(memory), out)


def _draw_points(axes: "mpl.axes.Axes", points: Sequence[str], values: Sequence[Sequence[float]], colour: str) -> None:
    places = range(len(points))
    axes.plot(places, [fmean(each) for each in values], color=colour, linewidth=1.8)
    for place, each in zip(places, values, strict=True):
        axes.plot([place] * len(each), each, "o", color=colour, markersize=4, alpha=0.7)
    axes.set_xticks(list(places), points)
    axes.spines[["top", "right"]].set_visible(False)


def _save(picture: Image.Image, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    memory = BytesIO()
    picture.save(memory, "PNG", optimize=True)
    content = memory.getvalue()
    write_atomically(out, len(content), lambda temporary: temporary.write_bytes(content))
