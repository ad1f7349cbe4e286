"""The commands of the programme, in their order; each goes on where it was stopped, so the whole does."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from PIL import Image

from trainer.interrupt import Interrupt
from trainer.miniature.objects import CLASSES
from trainer.miniature.render import HELD_OUT_SEED, POLICY_WORLD, render_set
from trainer.sweep.found import latest
from trainer.sweep.plan import Plan, Run, read_sweep

PAPER, KL, GROUPS = SWEEPS = ("mini-paper", "mini-kl", "mini-groups")
PRETRAINED, RENDERS = "pretrained", "renders"
PER_CLASS = 32
TOP_K = 112  # of the miniature's 512 codes: the share that 900 is of the published 4,096
REWARDS = (
    *("--reward", "brightness", "--reward", "mini-aesthetic"),
    *("--reward", "mini-clip", "--prompt", "an old picture", "--prompt", "a painting"),
)
SECONDS_AN_IMAGE = 0.025  # sampled and learnt from, on two CPU cores
SECONDS_A_RUN = 25  # its start, and its evaluations before and after
SECONDS_A_ROW = 25  # of an evaluation
LOOK_S = 0.2
STOP_S = 10.0


@dataclass(frozen=True)
class Stage:
    """One command: what it is for, and what follows `python -m`."""

    title: str
    arguments: tuple[str, ...]


def evaluation(folder: Path, seed: int, *, plain: bool) -> Path:
    """Where the evaluation of a seed's policies goes: by plain samples, or by those of inference (the first seed's)."""
    return folder / "evaluations" / f"{'plain' if plain else 'inference'}-seed-{seed}"


def programme(folder: Path, seeds: Sequence[int], jobs: int, settings: Sequence[str]) -> Iterator[Stage]:
    """All stages for some seeds, each made when those before it are done: only then is known in which folder a run is.

    Args:
        folder: where everything goes.
        seeds: of the runs.
        jobs: runs at a time.
        settings: options that all runs take.
    """
    text = ",".join(map(str, seeds))
    for name in SWEEPS:
        arguments = ("trainer.sweep", name, "--seeds", text, "--jobs", str(jobs), "--dir", str(folder), *settings)
        yield Stage(f"runs of {name}", arguments)
    for seed in seeds:
        runs = {name: plan_of(folder, name).runs([seed]) for name in (PAPER, KL)}
        paper = [f"{run.point}={folder_of(run)}" for run in runs[PAPER]]
        kl = [f"β {run.point}={folder_of(run)}" for run in runs[KL]]
        shared = ("--per-class", str(PER_CLASS), "--device", "cuda" if "cuda" in settings else "cpu", *REWARDS)
        for plain in (True, False) if seed == seeds[0] else (True,):
            sampling = ("--plain",) if plain else ("--top-k", str(TOP_K), "--images", f"{RENDERS}={folder / RENDERS}")
            title = f"samples of seed {seed}, {'as in training' if plain else 'as at inference'}"
            models = ("miniature", *paper, *(kl if plain else ()))
            models = (f"{PRETRAINED}={models[0]}", *models[1:])
            out = ("--out", str(evaluation(folder, seed, plain=plain)))
            yield Stage(title, ("trainer.evaluate", *models, *sampling, *shared, *out))
    yield _report(folder, seeds)


def _report(folder: Path, seeds: Sequence[int]) -> Stage:
    """The page that shows all runs of the programme."""
    runs = [str(folder_of(run)) for run in plan_of(folder, PAPER).runs(seeds)]
    evaluations = [
        part
        for seed, plain in ((seeds[0], False), *((seed, True) for seed in seeds))
        for part in ("--evaluation", str(evaluation(folder, seed, plain=plain)))
    ]
    sweeps = [part for name in (KL, GROUPS) for part in ("--sweep", str(folder / name))]
    out = ("--out", str(folder / "report.html"))
    return Stage("the report", ("trainer.report", *runs, *evaluations, *sweeps, *out))


def plan_of(folder: Path, sweep: str) -> Plan:
    """A sweep of the programme, in its folder."""
    name, file = read_sweep(sweep)
    return Plan(name, file, folder / name)


def folder_of(run: Run) -> Path:
    """Where a run of the programme is: not in a folder that it left without a state, to begin anew in another."""
    return latest(run) or run.config.run.dir / str(run.config.run.name)


def expected_minutes(folder: Path, seeds: Sequence[int]) -> float:
    """How long all of it takes on two CPU cores, two runs at a time."""
    runs = [run for name in SWEEPS for run in plan_of(folder, name).runs(seeds)]
    images = sum(run.images_a_step * run.config.run.steps for run in runs)
    rows = sum(run.config.run.dir.parent.name != GROUPS for run in runs) + len(seeds)
    rows += len(plan_of(folder, PAPER).file.points) + 2  # as at inference: the first seed's, pre-trained, renders
    return (images * SECONDS_AN_IMAGE + len(runs) * SECONDS_A_RUN / 2 + rows * SECONDS_A_ROW) / 60


def write_renders(folder: Path) -> None:
    """Held-out renders of the policy's world, a folder a label: what the table's row of real pictures is of."""
    done = folder / ".done"
    if done.exists():
        return
    renders = render_set(HELD_OUT_SEED, PER_CLASS * len(CLASSES), POLICY_WORLD)
    for index, (image, label) in enumerate(zip(renders.images, renders.labels, strict=True)):
        place = folder / CLASSES[label] / f"{index:04d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place)
    done.touch()


def run_stage(stage: Stage, interrupt: Interrupt, lock: IO[bytes]) -> int:
    """Runs a stage as a process of its own, to which a first signal is passed on; returns its exit code.

    Args:
        stage: what is run.
        interrupt: of this process.
        lock: of the programme's folder; the stage holds it, too, for it outlives a kill of this process.
    """
    # In a session of its own, so that Ctrl-C reaches it once, by way of this process.
    process = subprocess.Popen(
        [sys.executable, "-m", *stage.arguments],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        pass_fds=(lock.fileno(),),
    )
    told = False
    try:
        with interrupt.deferred():
            while process.poll() is None:
                if interrupt.requested and not told:
                    told = True
                    process.send_signal(signal.SIGTERM)
                time.sleep(LOOK_S)
    finally:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
            process.kill()
        process.wait()
    return process.returncode
