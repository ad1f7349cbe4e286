"""A model behind the service, beside itself in process: `python -m benchmarks.behind [--reward vit-l-14]`.

Clients with 16 images of 256×256 a request keep 64 to 512 images in flight, with and without a log of Redis; in process
the same reward is given full batches, one after the other, on one thread. What is compared takes turns, round by round;
a figure is the median of the rounds, a ratio that of the rounds' ratios. `vit-l-14` is the `clip` reward with random
weights, in bfloat16 on a GPU; `mini-clip` shows on a processor that all of it works.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.contenders import OURS, request_of
from benchmarks.load import load
from benchmarks.queue import fleet, images_of
from benchmarks.vit_l_14 import VIT_L_14, write_vit_l_14
from services.images import encode_batch
from services.rewards import create_reward
from services.rewards.base import Reward
from services.rewards.options import RewardOptions, Runtime
from trainer import machine

REQUEST_IMAGES, SIDE = 16, 256
PROMPT = "a painting"
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
"""By which a score of CLIP may differ in another batch."""
IN_PROCESS = "in process"


class Behind(NamedTuple):
    """What was seen at one load.

    Attributes:
        images_s: images a second.
        of_in_process: the same, of what was seen in process just before.
        p50_ms, p99_ms: of a request; 0 in process.
    """

    images_s: float
    of_in_process: float
    p50_ms: float = 0.0
    p99_ms: float = 0.0


@contextlib.contextmanager
def model(name: str, max_batch: int) -> Iterator[tuple[str, Reward, dict[str, str], str]]:
    """A reward by its name for the services, itself, their settings, and its precision."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = "bfloat16" if device == "cuda" else "float32"
    settings = {"REWARD_DEVICE": device, "REWARD_PRECISION": precision, "REWARD_MAX_BATCH": str(max_batch)}
    settings["REWARD_CLIP_PROMPT"] = PROMPT
    runtime = Runtime(device=device, precision=precision, max_batch=max_batch)
    with tempfile.TemporaryDirectory() as folder:
        if name == "vit-l-14":
            path = str(write_vit_l_14(Path(folder)))
            settings |= {"REWARD_CLIP_MODEL": VIT_L_14, "REWARD_CLIP_WEIGHTS": path}
            options = RewardOptions(clip_model=VIT_L_14, clip_weights=path, clip_prompt=PROMPT, runtime=runtime)
            service = "clip"
        else:
            options, service = RewardOptions(clip_prompt=PROMPT, runtime=runtime), name
        reward = create_reward(service, options)
        reward.warmup()
        yield service, reward, settings, precision


def in_process(reward: Reward, images_BHWC: NDArray[np.uint8], seconds: float) -> float:
    """Images a second of full batches, one after the other."""
    began_s, count = time.perf_counter(), 0
    while time.perf_counter() - began_s < seconds:
        reward.score(images_BHWC, None)
        count += len(images_BHWC)
    return count / (time.perf_counter() - began_s)


def run(options: argparse.Namespace) -> dict[str, list[Behind]]:
    """Measure everything in turn: a list of the rounds by what is measured."""
    results: dict[str, list[Behind]] = {}
    batch_BHWC = images_of(options.max_batch, SIDE)
    request_BHWC = batch_BHWC[:REQUEST_IMAGES]
    with model(options.reward, options.max_batch) as (service, reward, settings, precision):
        expected = np.asarray(reward.score(request_BHWC, None)).tolist()
        in_process(reward, batch_BHWC, options.seconds / 3)
        for number in range(options.rounds):
            for aof in (False, True) if number % 2 else (True, False):
                limit = in_process(reward, batch_BHWC, options.seconds)
                results.setdefault(IN_PROCESS, []).append(Behind(limit, 1.0))
                with fleet(1, shared=True, aof=aof, reward=service, settings=settings) as running:
                    request = request_of(OURS, "w1", encode_batch(request_BHWC), running.port)
                    for flying in options.in_flight:
                        seen = load(
                            running.port,
                            request,
                            clients=flying // REQUEST_IMAGES,
                            seconds=options.seconds,
                            images=REQUEST_IMAGES,
                            pid=running.api,
                            expected=expected,
                            tolerance=TOLERANCE[precision],
                        )
                        row = Behind(seen.images_s, seen.images_s / limit, seen.p50_ms, seen.p99_ms)
                        results.setdefault(f"{flying} in flight, {'AOF' if aof else 'no AOF'}", []).append(row)
    return results


def show(results: dict[str, list[Behind]]) -> None:
    """Print the table."""
    table = Table("", "images/s", "of in process", "p50 ms", "p99 ms")
    for name, rows in results.items():
        images_s, of_in_process, *times = (statistics.median(column) for column in zip(*rows, strict=True))
        cells = [f"{time_ms:.0f}" if time_ms else "–" for time_ms in times]
        table.add_row(name, f"{images_s:,.0f}", f"{of_in_process:.2f}", *cells)
    Console(width=120).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.behind", description=__doc__)
    parser.add_argument("--reward", choices=("vit-l-14", "mini-clip"), default="vit-l-14")
    parser.add_argument("--in-flight", default="64,128,256,512", help="images, one after the other")
    parser.add_argument("--max-batch", type=int, default=64, help="images in a forward pass")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--json", type=Path, help="a file to keep every figure in")
    options = parser.parse_args(arguments)
    options.in_flight = [int(number) for number in options.in_flight.split(",")]
    if bad := [number for number in options.in_flight if number < REQUEST_IMAGES or number % REQUEST_IMAGES]:
        parser.error(f"--in-flight has {bad[0]}, must be multiples of {REQUEST_IMAGES}, the images of a request")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else machine.processor()
    about = {
        "date": machine.today(),
        "commit": machine.commit(),
        "device": device,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "reward": options.reward,
        "max_batch": options.max_batch,
        "rounds": options.rounds,
        "seconds": options.seconds,
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    results = run(options)
    show(results)
    if options.json:
        kept = {name: [row._asdict() for row in rows] for name, rows in results.items()}
        options.json.write_text(json.dumps({"about": about, "results": kept}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
