"""The picture of a run."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.pictures import save_grid
from trainer.plot import draw_run


def finished_run(folder: Path, reward: float, accuracy: float | None) -> Path:
    """What the picture needs of a run of two steps."""
    lines = [{"step": step, "reward": reward * step, "label_accuracy": accuracy} for step in (1, 2)]
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps({"recipe": "tiny", "seed": 0, "steps": 2, "seconds": 1.0}))
    for step in (0, 2):
        images = np.full((8, 4, 4, 3), 100 * step, dtype=np.uint8)
        save_grid(folder / "grids" / f"step_{step:06d}.png", images, columns=2)
    return folder


@pytest.mark.parametrize(("reward", "accuracy"), [(0.4, 0.9), (0.4, None), (4.0, 0.9), (-1.0, None)])
def test_a_run_is_drawn(tmp_path: Path, reward: float, accuracy: float | None) -> None:
    """Rewards of any range, with and without a judge."""
    draw_run(finished_run(tmp_path / "run", reward, accuracy), tmp_path / "pictures" / "run.png")
    with Image.open(tmp_path / "pictures" / "run.png") as picture:
        colours = {tuple(pixel) for pixel in np.asarray(picture.convert("RGB")).reshape(-1, 3).tolist()}
    assert (0xC2, 0x57, 0x1A) in colours  # the reward
    assert ((0x2A, 0x6F, 0x97) in colours) == (accuracy is not None)


def test_a_run_without_grids_is_refused(tmp_path: Path) -> None:
    """With what it holds and what it takes."""
    folder = finished_run(tmp_path / "run", 0.5, None)
    (folder / "grids" / "step_000000.png").unlink()
    with pytest.raises(ValueError, match="2 steps and 1 grids; it takes 1 step and 2 grids"):
        draw_run(folder, tmp_path / "run.png")
