"""What the latency of a reward costs a training step: `python -m benchmarks.overlap`.

One process trains the miniature on the CPU. Every variant has a learner of its own, all made of the same weights, and
the variants take turns step by step, so that whatever else the machine does meets all alike. The reward is brightness
in this process; a latency is added by a timer for each chunk, which stands for a service that keeps up with sampling
and takes no CPU time. Latencies are multiples of the reference pass, the shortest of the overlapped steps of the round
before. On a machine that others use as well, CPU time plus waiting is the steadier figure: it leaves out what others
took of the cores.
"""

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from services.rewards.brightness import Brightness
from trainer import machine
from trainer.build import make_learner
from trainer.config import Config
from trainer.distributed import Group
from trainer.loop import Learner, train_step
from trainer.options import load_config
from trainer.scoring import Scored, combine
from trainer.settings import Ranks

RECIPE = "mini-bright"
OVERLAPPED, BLOCKING, NO_REFERENCE = "overlapped", "blocking", "overlapped, β = 0"


class Awaited(Future[Scored]):
    """Scores that measure how long they were waited for."""

    waited_s = 0.0

    def result(self, timeout: float | None = None) -> Scored:
        """The scores, once they are there."""
        self.exception(timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What went wrong, once that is known."""
        began_s = time.perf_counter()
        try:
            return super().exception(timeout)
        finally:
            self.waited_s += time.perf_counter() - began_s


class LateReward:
    """Brightness whose answers come after a latency, each chunk's in its own time.

    Args:
        config: its rewards say how scores are shaped.
    """

    def __init__(self, config: Config) -> None:
        self._rewards = config.rewards
        self._answers: list[Awaited] = []
        self.latency_s = 0.0

    def __call__(self, images_BHW3: NDArray[np.uint8]) -> Future[Scored]:
        """Score images; the future is done after the latency, or at once where there is none."""
        raw_B = Brightness().score(images_BHW3, None)
        scored, answer = combine({"brightness": raw_B}, self._rewards, len(images_BHW3)), Awaited()
        self._answers.append(answer)
        if self.latency_s:
            timer = threading.Timer(self.latency_s, answer.set_result, (scored,))
            timer.daemon = True
            timer.start()
        else:
            answer.set_result(scored)
        return answer

    def take_waited_s(self) -> float:
        """Seconds that the step waited for its scores, wherever it did."""
        answers, self._answers = self._answers, []
        return sum(answer.waited_s for answer in answers)


class Steps(NamedTuple):
    """What was measured of a variant, an entry a step."""

    seconds: list[float]
    cpu: list[float]
    reference: list[float]
    waited: list[float]
    latency: list[float]
    loss: list[float]


@dataclass
class Variant:
    """One way to take a step.

    Args:
        order: when the step waits for scores.
        latency: of a chunk's scores, as a multiple of the reference pass.
        config: of its steps.
        learner: its own.
    """

    order: str
    latency: float
    config: Config
    learner: Learner
    steps: Steps = field(default_factory=lambda: Steps([], [], [], [], [], []))

    def __post_init__(self) -> None:
        self._reward = LateReward(self.config)

    def forget(self) -> None:
        """Drop what was measured so far."""
        for values in self.steps:
            values.clear()

    def take_step(self, step: int, reference_s: float) -> None:
        """Take a step and measure it.

        Args:
            step: counted from 0.
            reference_s: what the latency is a multiple of.
        """
        self._reward.latency_s = self.latency * reference_s
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        metrics = train_step(self.learner, self._reward, self.config, step)
        self.steps.seconds.append(time.perf_counter() - began_s)
        self.steps.cpu.append(time.process_time() - began_cpu_s)
        self.steps.reference.append(metrics["seconds/reference"] or 0.0)
        self.steps.waited.append(self._reward.take_waited_s())
        self.steps.latency.append(self._reward.latency_s)
        self.steps.loss.append(metrics["loss"] or 0.0)


def make_variants(options: argparse.Namespace) -> list[Variant]:
    """All orders with all latencies; the first is the free reward that the others are compared with."""
    common = {
        "model.classifier": "none",  # it would hide more of the latency
        "rollout.labels": options.labels,
        "rollout.chunk": options.chunk,
        "optim.minibatch": options.minibatch,
        "run.device": "cpu",
    }
    latencies = tuple(options.latency)
    orders: tuple[tuple[str, dict[str, Any], tuple[float, ...]], ...] = (
        (OVERLAPPED, {}, (0.0, *latencies)),
        (BLOCKING, {"rollout.blocking": True}, latencies),
        (NO_REFERENCE, {"grpo.beta": 0}, (0.0, max(latencies))),
    )
    device, variants = torch.device("cpu"), []
    group = Group(Ranks(), device, timeout_s=60)
    for order, changes, multiples in orders:
        config = load_config(RECIPE, common | changes)
        variants += [Variant(order, latency, config, make_learner(config, group, device)) for latency in multiples]
    return variants


def measure(variants: Sequence[Variant], rounds: int, deadline_s: float) -> int:
    """Take turns for so many rounds after one of warm-up, or until the time is up; returns the rounds that count."""
    began_s, reference_s = time.monotonic(), 0.0
    for step in range(1 + rounds):
        for index in range(len(variants)):
            variants[(step + index) % len(variants)].take_step(step, reference_s)
        reference_s = min(variant.steps.reference[-1] for variant in variants if variant.order == OVERLAPPED)
        if step == 0:  # without latencies, for the reference pass is not known yet
            for variant in variants:
                variant.forget()
        spent_s = time.monotonic() - began_s
        if step and spent_s + spent_s / (1 + step) > deadline_s:
            return step
    return rounds


def report(variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """A row for each variant; ratios are medians of those between steps of one round."""
    free, rows = variants[0].steps, []
    for variant in variants:
        steps = variant.steps
        medians = {f"{name}_s": statistics.median(getattr(steps, name)) for name in Steps._fields if name != "loss"}
        ratios = {"to_free": _ratio(steps.seconds, free.seconds), "own_to_free": _ratio(_own(steps), _own(free))}
        about = {"order": variant.order, "latency": variant.latency}
        rows.append({**about, **medians, **ratios, "steps": steps._asdict()})
    return rows


def _own(steps: Steps) -> list[float]:
    """CPU time and waiting: a step without what others took of the cores."""
    return [cpu_s + waited_s for cpu_s, waited_s in zip(steps.cpu, steps.waited, strict=True)]


def _ratio(ones: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(ones, others, strict=True))


COLUMNS = {
    "latency_s": "s",
    "seconds_s": "s a step",
    "to_free": "÷ free",
    "waited_s": "waited, s",
    "cpu_s": "CPU, s",
    "own_to_free": "CPU + waited, ÷ free",
}


def print_table(rows: Sequence[dict[str, Any]], title: str) -> None:
    """What a person reads."""
    table = Table(title=title, title_justify="left")
    for column in ("order", "latency a chunk", *COLUMNS.values()):
        table.add_column(column, justify="left" if column == "order" else "right")
    for row in rows:
        latency = f"{row['latency']:g} × reference" if row["latency"] else "free"
        table.add_row(row["order"], latency, *(f"{row[name]:.3f}" for name in COLUMNS))
    Console(highlight=False, width=120).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write the numbers where they are asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overlap", description=__doc__)
    parser.add_argument("--steps", type=int, default=8, help="steps of each variant, besides one of warm-up")
    parser.add_argument("--labels", type=int, default=8, help="groups of 16 images a step")
    parser.add_argument("--chunk", type=int, default=32, help="images sampled and sent at once")
    parser.add_argument("--minibatch", type=int, default=64, help="images an update")
    parser.add_argument("--latency", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="in reference passes")
    parser.add_argument("--minutes", type=float, default=6.0, help="no round begins that would end later")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every step's numbers")
    options = parser.parse_args(arguments)
    if options.steps < 1 or min(options.latency) <= 0:
        parser.error(f"--steps is {options.steps}, --latency {options.latency}: they must be at least 1, and above 0")
    variants = make_variants(options)
    rounds = measure(variants, options.steps, 60 * options.minutes)
    rows, images = report(variants), options.labels * variants[0].config.rollout.group_size
    about = {
        "date": machine.today(),
        "commit": machine.commit(),
        "hardware": f"{machine.processor()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "images": images,
        "chunk": options.chunk,
        "rounds": rounds,
    }
    print_table(
        rows,
        f"{about['date']}, commit {about['commit']}, {about['hardware']}, torch {about['torch']}\n"
        f"{images} images a step in chunks of {options.chunk}, median of {rounds} steps each, "
        f"reference pass {rows[0]['reference_s']:.3f} s",
    )
    if options.json is not None:
        options.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
