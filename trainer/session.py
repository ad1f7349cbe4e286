"""One run from start to end: its folder, its services, the evaluation before and after, and the steps in between."""

import json
import os
import platform
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from trainer.build import make_learner
from trainer.config import Config
from trainer.evaluation import Samples, draw_samples, score_samples, spread_labels
from trainer.local_rewards import LocalRewards
from trainer.loop import Learner, train_step
from trainer.metrics import Metrics, MetricsLog
from trainer.models.checkpoints import save_var, write_atomically
from trainer.pictures import save_grid
from trainer.scoring import Scorer
from trainer.settings import Settings

PACKAGES = ("torch", "torchvision", "numpy", "safetensors", "redis", "fastapi", "httpx", "pydantic")
READY_S = 30.0
GRID_COLUMNS = 16
GRID_ROWS = 4


def train(config: Config, recipe: str, console: Console) -> Path:
    """Trains by a resolved configuration and returns the run's folder.

    Args:
        config: validated settings.
        recipe: the name it came from.
        console: for progress and the closing table.

    Raises:
        ConfigError, CheckpointError, JudgeError, LocalRewardsError, RewardError, ScoreError, FloatingPointError,
        OSError: with a message of one line; services that the run started are stopped first.
    """
    torch.manual_seed(config.run.seed)
    learner = make_learner(config)
    folder = make_folder(config.run.dir, config.run.name or recipe)
    _write(folder / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))
    _write(folder / "versions.json", json.dumps(_versions(learner.vqvae), indent=2) + "\n")
    console.print(f"[bold]{escape(recipe)}[/] → {escape(f'{folder}   {config.summary}')}", soft_wrap=True)
    local = [reward.name for reward in config.rewards if reward.url is None]
    with LocalRewards(local, folder / "services.log") as services:
        urls = services.urls | {reward.name: reward.url for reward in config.rewards if reward.url is not None}
        for name, url in urls.items():
            started = "  (started for this run)" if name in services.urls else ""
            console.print(escape(f"reward {name}: {url}{started}"), soft_wrap=True)
        timeout_s = config.run.score_timeout_s
        ready_s, token = min(timeout_s, READY_S), Settings().token
        with Scorer(config.rewards, urls, timeout_s=timeout_s, ready_timeout_s=ready_s, token=token) as scorer:
            services.when_dead(scorer.abort)
            return _train(config, recipe, learner, scorer, folder, console)


def _train(config: Config, recipe: str, learner: Learner, scorer: Scorer, folder: Path, console: Console) -> Path:
    before = _evaluate(config, learner, scorer)
    _grid(config, learner, folder, 0)
    began = time.perf_counter()
    excluded = 0.0  # seconds of grids and evaluations, which are not training
    with MetricsLog(folder, config.run.steps, console) as log:
        for step in range(config.run.steps):
            log.write(step + 1, train_step(learner, scorer.submit, config, step))
            paused = time.perf_counter()
            done = step + 1 == config.run.steps
            if done or (config.run.grid_every and (step + 1) % config.run.grid_every == 0):
                _grid(config, learner, folder, step + 1)
            excluded += time.perf_counter() - paused
    seconds = time.perf_counter() - began - excluded
    metadata = {"recipe": recipe, "seed": str(config.run.seed), "steps": str(config.run.steps)}
    save_var(folder / "checkpoint" / "var.safetensors", learner.policy, metadata)  # first: what follows may fail
    after = _evaluate(config, learner, scorer)
    summary = {
        "recipe": recipe,
        "seed": config.run.seed,
        "steps": config.run.steps,
        "seconds": round(seconds, 1),
        "before": before,
        "after": after,
    }
    _write(folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    _closing_table(summary, folder, console)
    return folder


def make_folder(parent: Path, name: str) -> Path:
    """A new folder `parent/name`, or `name-2`, `name-3` … where that is taken; two runs never share one."""
    parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, 10_000):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise OSError(f"{parent} holds 9,999 runs named {name}; set another --run.name or --run.dir")


def evaluation_samples(config: Config, learner: Learner) -> Samples:
    """The images that a run is measured by, before and after: set by `eval.seed`, not by the run's."""
    return draw_samples(
        learner.policy,
        learner.vqvae,
        spread_labels(config.eval.samples, learner.classes),
        temperature=config.rollout.temperature,
        seed=config.eval.seed,
        chunk=config.rollout.chunk,
        autocast=learner.autocast(),
    )


def _evaluate(config: Config, learner: Learner, scorer: Scorer) -> Metrics:
    samples = evaluation_samples(config, learner)
    return score_samples(samples, scorer.submit, learner.judge, chunk=config.rollout.chunk)


def _grid(config: Config, learner: Learner, folder: Path, step: int) -> None:
    """Samples of the same labels and seeds each time: a column a label, a row a seed."""
    columns = np.asarray(learner.classes[:: max(1, len(learner.classes) // GRID_COLUMNS)][:GRID_COLUMNS])
    samples = draw_samples(
        learner.policy,
        learner.vqvae,
        np.tile(columns, GRID_ROWS),
        temperature=config.rollout.temperature,
        seed=config.eval.seed + 1,
        chunk=config.rollout.chunk,
        autocast=learner.autocast(),
    )
    save_grid(folder / "grids" / f"step_{step:06d}.png", samples.images_BHW3, columns=len(columns))


def _write(path: Path, text: str) -> None:
    content = text.encode()
    write_atomically(path, len(content), lambda temporary: temporary.write_bytes(content))


def _versions(model: nn.Module) -> dict[str, str]:
    device, system = next(model.parameters()).device, os.uname()
    return {
        "python": platform.python_version(),
        "platform": f"{system.sysname} {system.release} {system.machine}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": str(torch.get_num_threads()),
        **{package: version(package) for package in PACKAGES},
    }


def _closing_table(summary: Mapping[str, Any], folder: Path, console: Console) -> None:
    table = Table(
        title=f"{escape(summary['recipe'])}: {summary['steps']} steps in {summary['seconds']:.0f} s",
        title_justify="left",
    )
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    for name, label, form in (
        ("reward", "reward", "{:.3f}"),
        ("raw_score", "raw score", "{:.3f}"),
        ("success_rate", "success rate", "{:.1%}"),
        ("label_accuracy", "label accuracy", "{:.1%}"),
    ):
        values = [summary[when][name] for when in ("before", "after")]
        table.add_row(label, *("–" if value is None else form.format(value) for value in values))
    console.print(table)
    for line in (
        f"samples     {folder / 'grids'}",
        f"metrics     {folder / 'metrics.jsonl'}   tensorboard --logdir {folder.parent}",
        f"checkpoint  {folder / 'checkpoint' / 'var.safetensors'}",
    ):
        console.print(escape(line), soft_wrap=True)
