"""What the tests of the report make pages from: real runs, evaluated and swept.

A module of its own, for a test's file is imported once as a test and once more by others.
"""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from trainer.evaluate.__main__ import main as evaluate
from trainer.local_rewards import LocalRewards
from trainer.run import main as train

STEPS = 3


class Folders(NamedTuple):
    """What a report is made from: two finished runs, one that was killed, an evaluation and a sweep."""

    seeds: tuple[Path, Path]
    killed: Path
    evaluation: Path
    sweep: Path


@cache
def make_folders(parent: Path, model: str) -> Folders:
    """Real ones, made once for all tests of the report, here and in the browser."""
    parent.mkdir()
    with LocalRewards(["brightness", "mini-aesthetic"], parent / "services.log") as services:
        content = {
            "summary": "A tiny run <of tests>.",
            "model": json.loads(model),
            "rollout": {"labels": 2, "group_size": 4, "chunk": 8},
            "optim": {"lr": 1.0e-3, "minibatch": 4},
            "rewards": [{"name": "brightness", "url": services.urls["brightness"], "shape": {"at_least": 0.58}}],
            "eval": {
                "samples": 8,
                "every": 2,
                "rewards": [{"name": "mini-aesthetic", "url": services.urls["mini-aesthetic"]}],
            },
            "run": {"dir": str(parent / "runs"), "steps": STEPS, "device": "cpu", "grid_every": 1},
        }
        recipe = parent / "tiny.yaml"
        recipe.write_text(yaml.safe_dump(content, sort_keys=False))
        for seed in range(2):
            assert train([str(recipe), "--run.seed", str(seed)]) == 0
        seeds = (parent / "runs" / "tiny", parent / "runs" / "tiny-2")
        shape = ("--rewards.0.shape", "{at_least: 0.5}", "--rollout.group_size", "2", "--run.name", "killed")
        assert train([str(recipe), *shape]) == 0
        reward = f"brightness={services.urls['brightness']}"
        arguments = (str(seeds[0]), "--per-class", "3", "--seen", "0-1", "--device", "cpu", "--reward", reward)
        assert evaluate([*arguments, "--out", str(parent / "evaluation")]) == 0
    killed = parent / "runs" / "killed"
    _kill(killed)
    return Folders(seeds, killed, parent / "evaluation", _sweep(parent / "sweep", seeds, killed))


def _kill(run: Path) -> None:
    """Leave of a run what a kill in its last step would."""
    (run / "summary.json").unlink()
    metrics = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(metrics[:-40])
    grid = max((run / "grids").glob("step_*.png"))
    grid.write_bytes(grid.read_bytes()[:60])


def _sweep(folder: Path, seeds: tuple[Path, Path], killed: Path) -> Path:
    points = [
        ("4", 4.0, [(0, seeds[0], True), (1, seeds[1], True)]),
        ("2", 2.0, [(0, killed, False), (1, None, False)]),
    ]
    content: dict[str, Any] = {
        "name": "tiny-groups",
        "summary": "How many samples of a label.",
        "axis": "G",
        "points": [],
    }
    for name, value, runs in points:
        described = []
        for seed, run, done in runs:
            place = f"{name}/tiny-seed-{seed}" if run is not None else None
            if run is not None:
                shutil.copytree(run, folder / str(place))
            described.append({"seed": seed, "folder": place, "done": done, "steps": 1})
        content["points"].append({"name": name, "value": value, "runs": described})
    (folder / "sweep.json").write_text(json.dumps(content))
    return folder
