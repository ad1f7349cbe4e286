"""Whole training steps, by phase, against the machine's limit: `python -m benchmarks.train_step --model d16`.

Models are in the official layout with weights made by a formula, so nothing is downloaded. A step is that of
`trainer.loop`, on one device: 64 images are the share of one GPU among the eight of the paper (arXiv 2505.23331, 512
images a step). "Minibatch 32" may be read over all GPUs, 4 images an update here and 16 updates, or on each, 32 and 2:
both are measured. Not in it: the all-reduce between GPUs, the network, evaluations and states; and scoring, which is
brightness in this process (`free`) unless ViT-L/14 is asked for, which then runs on the same device.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.flops import decode_flop, forward_flop, step_flop
from benchmarks.formula import fill
from benchmarks.vit_l_14 import VIT_L_14, write_vit_l_14
from services.rewards.brightness import Brightness
from services.rewards.clip import Clip
from services.rewards.options import Runtime
from services.rewards.sources import parse_source
from trainer import machine
from trainer.build import choose_device, make_autocast
from trainer.config import Config
from trainer.distributed import Group
from trainer.loop import Learner, train_step
from trainer.miniature import prior, tokenizer
from trainer.models.var import VAR, VARConfig
from trainer.models.vqvae import VQVAE, VQVAEConfig
from trainer.policy import Rollout
from trainer.rollout import Submit
from trainer.scoring import Scored, combine
from trainer.settings import Ranks
from trainer.var_policy import VarPolicy

PAPER = {"d16": 44.4, "d30": 17.8}
"""Images a second on each of 8 H100, from the hours that the paper gives for 40,000 steps of 512 images."""
GROUP_SIZE = 16
MOST_IMAGES = 65_536
PHASES = ("sample", "decode", "reference", "score", "optimise", "update")


class Clock:
    """Seconds of named pieces of work: on a GPU between events in its stream, so that nothing waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time of the block."""
        began = self._mark()
        yield
        self._spans.append((name, began, self._mark()))

    def _mark(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> dict[str, float]:
        """The sums so far, and begin anew; waits for the GPU."""
        if self._is_cuda:
            torch.cuda.synchronize()
        sums: dict[str, float] = {}
        for name, began, ended in self._spans:
            seconds = began.elapsed_time(ended) / 1000 if self._is_cuda else ended - began
            sums[name] = sums.get(name, 0.0) + seconds
        self._spans.clear()
        return sums


class TimedPolicy(VarPolicy):
    """A policy whose decoder is timed."""

    clock: Clock

    def decode(self, rollout: Rollout) -> Tensor:
        """The images of a rollout."""
        with self.clock("decode"):
            return super().decode(rollout)


class TimedAdamW(torch.optim.AdamW):
    """An optimizer whose updates are timed."""

    clock: Clock

    def step(self, closure: Any = None) -> Any:
        """One update."""
        with self.clock("update"):
            return super().step(closure)


def model_configs(name: str) -> tuple[VARConfig, VQVAEConfig]:
    """Shapes of a transformer and its tokenizer: `mini`, or a published depth such as `d16`."""
    return (prior.CONFIG, tokenizer.CONFIG) if name == "mini" else (VARConfig.for_depth(int(name[1:])), VQVAEConfig())


def make_config(options: argparse.Namespace, minibatch: int) -> Config:
    """The settings of one measurement."""
    return Config.model_validate(
        {
            "model": {"classifier": "none", "recompute": options.recompute, "compile": options.compile},
            "rollout": {"labels": options.images // GROUP_SIZE, "group_size": GROUP_SIZE, "chunk": options.chunk},
            "grpo": {"beta": 0.2},
            "optim": {"lr": 1e-4, "minibatch": minibatch, "micro_batch": min(minibatch, options.micro_batch)},
            "rewards": [{"name": "brightness"}],
            "run": {"dtype": options.dtype, "decode_dtype": options.dtype},
        }
    )


def make_models(name: str, device: torch.device) -> tuple[VAR, VQVAE]:
    """Transformer and tokenizer of a name of `model_configs`, without the encoder, which a step never uses."""
    var_config, vqvae_config = model_configs(name)
    with device:
        var, vqvae = VAR(var_config).eval(), VQVAE(vqvae_config).eval().requires_grad_(False)
    del vqvae.encoder
    return var, vqvae


def make_learner(
    var: VAR, vqvae: VQVAE, options: argparse.Namespace, config: Config, device: torch.device, clock: Clock
) -> Learner:
    """Policy, reference and optimizer of these models."""
    classes, autocast = tuple(range(var.config.num_classes)), make_autocast(device, config.run.dtype)
    policy = TimedPolicy(var, vqvae, classes, autocast, decode_dtype=getattr(torch, config.run.decode_dtype))
    TimedPolicy.clock = TimedAdamW.clock = clock
    reference = replace(policy, var=deepcopy(var).requires_grad_(False))
    var.checkpoint_activations = options.recompute
    if options.compile:
        var.compile_blocks()
        reference.var.compile_blocks()
    optimizer = TimedAdamW(policy.parameters(), lr=config.optim.lr, weight_decay=0.0, fused=True)
    return Learner(policy, reference, optimizer, None, Group(Ranks(), device, timeout_s=60))


@contextmanager
def reward_of(name: str, config: Config, device: torch.device) -> Iterator[Submit]:
    """Starts the scoring of a chunk in a thread of this process."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:
        score = _brightness if name == "free" else _vit_l_14(Path(folder), device)

        def submit(images_BHW3: NDArray[np.uint8]) -> Future[Scored]:
            def scored() -> Scored:
                return combine({"brightness": score(images_BHW3)}, config.rewards, len(images_BHW3))

            return pool.submit(scored)

        yield submit


def _brightness(images_BHW3: NDArray[np.uint8]) -> NDArray[np.float64]:
    return Brightness().score(images_BHW3, None)


def _vit_l_14(folder: Path, device: torch.device) -> Callable[[NDArray[np.uint8]], NDArray[np.float64]]:
    """CLIP at its full size with random weights."""
    precision = "bfloat16" if device.type == "cuda" else "float32"
    source = parse_source(str(write_vit_l_14(folder)))
    clip = Clip(VIT_L_14, source, "a painting", Runtime(device=str(device), precision=precision))
    clip.warmup()
    return lambda images_BHW3: clip.score(images_BHW3, None)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of a few large products of square matrices, the limit that everything is compared with."""
    side = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    clock, best_s = Clock(device), float("inf")
    for _ in range(10):
        with clock("product"):
            left @ right
        best_s = min(best_s, clock.take()["product"])
    return 2 * side**3 / best_s


def peak_memory(device: torch.device) -> float:
    """Bytes at the most since the last reset: of the GPU, or of this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(options: argparse.Namespace, minibatch: int, device: torch.device) -> dict[str, Any]:
    """Medians over the steps of one reading of "minibatch 32"."""
    clock, config = Clock(device), make_config(options, minibatch)
    models = make_models(options.model, device)
    for model in models:
        fill(model)
    learner = make_learner(*models, options, config, device, clock)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    taken: list[dict[str, float]] = []
    with reward_of(options.reward, config, device) as submit:
        for step in range(options.warm_up + options.steps):
            clock.take()
            began_s = time.perf_counter()
            metrics = train_step(learner, submit, config, step)
            pieces = clock.take()
            seconds = {name.removeprefix("seconds/"): value for name, value in metrics.items() if value is not None}
            seconds["sample"] -= pieces["decode"]
            seconds["optimise"] -= pieces["update"]
            taken.append({**seconds, **pieces, "step": time.perf_counter() - began_s})
    measured = taken[options.warm_up :]
    medians = {name: statistics.median(each[name] for each in measured) for name in (*PHASES, "step")}
    updates = options.images // minibatch
    return {
        "minibatch": minibatch,
        "updates": updates,
        "seconds": medians,
        "images_per_second": options.images / medians["step"],
        "peak_bytes": peak_memory(device),
    }


def report(options: argparse.Namespace, rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    """What a person reads."""
    console = Console(highlight=False, width=120)
    console.print("   ".join(f"{name}: {value}" for name, value in about.items() if not isinstance(value, float)))
    table = Table(
        title=f"{options.model}: {options.images} images a step, reward {options.reward}", title_justify="left"
    )
    table.add_column("")
    for row in rows:
        table.add_column(f"{row['updates']} updates of {row['minibatch']}", justify="right")
    for phase in (*PHASES, "step"):
        table.add_row(f"{phase}, s", *(f"{row['seconds'][phase]:.4f}" for row in rows))
    table.add_row("images/s", *(f"{row['images_per_second']:.2f}" for row in rows))
    paper = PAPER.get(options.model)
    if paper is not None:
        table.add_row(f"÷ the paper's {paper} (H100)", *(f"{row['images_per_second'] / paper:.2f}" for row in rows))
    table.add_row("TFLOP/s", *(f"{row['images_per_second'] * about['step_flop'] / 1e12:.3f}" for row in rows))
    peak = about["matmul_flops"]
    shares = (row["images_per_second"] * about["step_flop"] / peak for row in rows)
    table.add_row(f"… of the matmul peak, {peak / 1e12:.2f} TFLOP/s", *(f"{share:.1%}" for share in shares))
    table.add_row("peak memory, GB", *(f"{row['peak_bytes'] / 1e9:.2f}" for row in rows))
    console.print(table)
    console.print(
        f"TFLOP an image: {about['forward_flop'] / 1e12:.4f} a forward, {about['decode_flop'] / 1e12:.4f} a decode, "
        f"{about['step_flop'] / 1e12:.4f} a step (sample, decode, reference, 3 of optimise; nothing twice).\n"
        "Not in it: all-reduce, network, evaluations, states"
        + ("; scoring by a reward model." if options.reward == "free" else "; ViT-L/14 shares the device.")
    )


def size_options() -> argparse.ArgumentParser:
    """What a step is of: a parent for other parsers; `check_sizes` checks it."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", choices=("mini", "d16", "d20", "d24", "d30"), default="mini")
    parser.add_argument("--images", type=int, default=64, help="images a step, groups of 16")
    parser.add_argument("--minibatch", type=int, nargs="+", default=[4, 32], help="images an update, each by itself")
    parser.add_argument("--micro-batch", type=int, default=32, help="images a forward")
    parser.add_argument("--chunk", type=int, default=64, help="images sampled at once")
    parser.add_argument("--recompute", action="store_true", help="keep no activations of a block")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def check_sizes(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with an error where the images of a step are no whole groups and minibatches, or FILE has no place.

    A chunk of more images than a step has becomes one of as many.
    """
    named = {"images": [options.images], "minibatch": options.minibatch, "chunk": [options.chunk]}
    for name, values in (named | {"micro-batch": [options.micro_batch]}).items():
        if not 1 <= min(values) <= max(values) <= MOST_IMAGES:
            parser.error(f"--{name} is {', '.join(map(str, values))}; it must be from 1 to {MOST_IMAGES:,}")
    if options.images % GROUP_SIZE or any(options.images % each for each in options.minibatch):
        parser.error(f"--images is {options.images}; it must be a multiple of {GROUP_SIZE} and of each --minibatch")
    if options.chunk % GROUP_SIZE:
        parser.error(f"--chunk is {options.chunk}; it must be a multiple of {GROUP_SIZE}, the images of a group")
    if any(each % min(each, options.micro_batch) for each in options.minibatch):
        parser.error(f"--micro-batch is {options.micro_batch}; it must divide each larger --minibatch")
    if options.json is not None and (options.json.is_dir() or not options.json.parent.is_dir()):
        parser.error(f"--json is {options.json}; it must be a file in a folder that is there")
    options.chunk = min(options.chunk, options.images)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step", description=__doc__, parents=[size_options()]
    )
    parser.add_argument("--reward", choices=("free", "vit-l-14"), default="free")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=1)
    options = parser.parse_args(arguments)
    check_sizes(parser, options)
    if options.steps < 1 or options.warm_up < 0:
        parser.error(f"--steps is {options.steps}, --warm-up {options.warm_up}: at least 1 and 0")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write the numbers where they are asked for."""
    options = parse(arguments)
    device = choose_device(options.device)
    options.dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    configs = model_configs(options.model)
    about = {
        "date": machine.today(),
        "commit": machine.commit(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{machine.processor()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "dtype": options.dtype,
        "compile": options.compile,
        "forward_flop": forward_flop(configs[0]),
        "decode_flop": decode_flop(configs[1]),
        "step_flop": step_flop(*configs, reference=True),
        "matmul_flops": matmul_peak(device, getattr(torch, options.dtype)),
    }
    rows = [measure(options, minibatch, device) for minibatch in options.minibatch]
    report(options, rows, about)
    if options.json is not None:
        options.json.write_text(json.dumps(about | {"options": vars(options) | {"json": None}, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
