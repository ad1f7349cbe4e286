"""What a training step takes of a GPU that is not at hand: `python -m benchmarks.step_forecast --model d30`.

The step's own code runs on tensors that have a shape and no numbers (torch's FakeTensorMode) and are said to be on a
CPU, so that nothing is computed, and some minutes of any machine will do. By phase it tells

- the peak of the bytes that tensors hold, each rounded up to 512 as torch's allocator on a GPU does: to be compared
  with `torch.cuda.max_memory_allocated`. Not in it: the CUDA context and workspaces of libraries, below 1 GB together,
  what kernels of a GPU use for themselves, and what the allocator cannot use because it lies in pieces;
- operators, each at least one kernel where nothing is compiled; gradients' norms are taken one by one on a CPU, an
  operator a parameter that a GPU does in a few;
- the bytes that they read and write, and their floating-point operations;
- the least seconds: of each operator the longer of its bytes at the memory's bandwidth and its operations at the
  matmul peak (the roofline of Williams, Waterman and Patterson, 2009), those of an H200 unless told otherwise; as if
  nothing were found in a cache.

That is a step without `torch.compile`, which joins operators and so moves fewer bytes. Sampling, decoding, the
reference and the updates must ask no tensor for a number, which would make a GPU wait: here it raises
`DataDependentOutputException`. Copies to the CPU are not noticed, and the end of a step, which does wait, is left out.
"""

import argparse
import json
import math
import sys
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.train_step import (
    PAPER,
    Clock,
    check_sizes,
    make_config,
    make_learner,
    make_models,
    size_options,
)
from trainer import machine
from trainer.config import Config
from trainer.loop import Learner, reference_log_probs
from trainer.update import Batch, Updates, minibatches

PAGE_BYTES = 512  # what torch's allocator rounds to
H200_TFLOPS, H200_TERABYTES = 989.0, 4.8  # dense bfloat16 and HBM3e a second, of NVIDIA's data sheet
WITHOUT_WORK = ("_unsafe_view", "detach", "device", "empty", "empty_like", "empty_strided", "new_empty")
"""Operators besides views that read and write nothing."""
ONLY_WRITE = ("copy_", "fill_", "zero_", "full_like", "ones_like", "zeros_like", "new_full", "new_ones", "new_zeros")
"""Operators that do not read their first argument."""
WRITTEN_IF = {"grads": "grad_scale"}
"""Arguments that are written only where another is given: a fused optimizer leaves gradients as it scaled them."""


@dataclass
class Taken:
    """What a phase takes.

    Attributes:
        began_bytes: held when it first began, weights and all.
        peak_bytes: held at once at the most.
        operators: that do work.
        moved_bytes: read and written by them.
        flop: of matrix products, attention and convolutions.
        least_s: seconds that they take at the least.
    """

    began_bytes: int = 0
    peak_bytes: int = 0
    operators: int = 0
    moved_bytes: int = 0
    flop: int = 0
    least_s: float = 0.0


class Ledger(TorchDispatchMode):
    """Counts what operators take, phase by phase.

    Args:
        flops: of the device, a second.
        bandwidth: of its memory, bytes a second.
    """

    def __init__(self, flops: float, bandwidth: float) -> None:
        super().__init__()
        self._flops, self._bandwidth = flops, bandwidth
        self._held: dict[int, int] = {}  # bytes of each storage
        self._bytes = 0
        self._phase = Taken()
        self.phases: dict[str, Taken] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block for a phase; it may come again."""
        before, self._phase = self._phase, self.phases.setdefault(name, Taken(began_bytes=self._bytes))
        self._phase.peak_bytes = max(self._phase.peak_bytes, self._bytes)
        try:
            yield
        finally:
            self._phase = before

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and write down what it took."""
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        made = [tensor for tensor in _tensors(result) if tensor.device.type != "meta"]
        for tensor in made:
            self._hold(tensor)
        if not function.is_view and function.overloadpacket.__name__ not in WITHOUT_WORK:
            moved = sum(
                map(_bytes_of, (*_read(function, args, kwargs), *made, *_changed(function, args, kwargs, made)))
            )
            count = flop_registry.get(function.overloadpacket)
            flop = count(*args, **kwargs, out_val=result) if count else 0
            phase = self._phase
            phase.operators += 1
            phase.moved_bytes += moved
            phase.flop += flop
            phase.least_s += max(moved / self._bandwidth, flop / self._flops)
        return result

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // PAGE_BYTES) * PAGE_BYTES
        if key in self._held:
            return
        self._held[key] = size
        self._bytes += size
        self._phase.peak_bytes = max(self._phase.peak_bytes, self._bytes)
        weakref.finalize(storage, self._let_go, key).atexit = False

    def _let_go(self, key: int) -> None:
        self._bytes -= self._held.pop(key)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _read(function: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operator reads."""
    is_unread = function.overloadpacket.__name__ in ONLY_WRITE
    named = {name: value for name, value in kwargs.items() if name != "out"}
    return _tensors((args[1:] if is_unread else args, named))


def _changed(function: Any, args: Any, kwargs: Any, made: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that an operator changes and does not return, as those on lists of tensors do."""
    arguments = function._schema.arguments
    named = [*zip(arguments, args, strict=False), *((each, kwargs.get(each.name)) for each in arguments[len(args) :])]
    changed = [
        value
        for each, value in named
        if each.alias_info and each.alias_info.is_write
        if each.name not in WRITTEN_IF or kwargs.get(WRITTEN_IF[each.name]) is not None
    ]
    returned = {tensor.untyped_storage()._cdata for tensor in made}
    return [tensor for tensor in _tensors(changed) if tensor.untyped_storage()._cdata not in returned]


def _bytes_of(tensor: Tensor) -> int:
    """Bytes that are read or written of a tensor, one that is expanded counted once."""
    return int(min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()))


def forecast(options: argparse.Namespace, minibatch: int) -> dict[str, Taken]:
    """What the phases of a step take once the optimizer has its moments.

    Args:
        options: of `parse`.
        minibatch: images an update.

    Raises:
        DataDependentOutputException: the step asked a tensor for its numbers.
    """
    device, config = torch.device("cpu"), make_config(options, minibatch)
    ledger = Ledger(options.tflops * 1e12, options.terabytes * 1e12)
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True), ledger:
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor", UserWarning)  # by deepcopy
        models = make_models(options.model, device)
        learner = make_learner(*models, options, config, device, Clock(device))
        _take_step(learner, ledger, options, config, updates=1)  # which makes the moments
        ledger.phases.clear()
        _take_step(learner, ledger, options, config, updates=options.images // minibatch)
    return ledger.phases


def _take_step(learner: Learner, ledger: Ledger, options: argparse.Namespace, config: Config, updates: int) -> None:
    """A step as `trainer.loop.train_step` takes it, but for what happens on the CPU, up to some of its updates."""
    policy, temperature = learner.policy, config.rollout.temperature
    parts = []
    # "meta", for they come from elsewhere, and where they are here their range would be looked at.
    for conditions_B in torch.zeros(options.images, dtype=torch.long, device="meta").split(options.chunk):
        with ledger.phase("sample"):
            uniforms_BL = torch.empty(len(conditions_B), policy.length, device="meta")
            rollout = policy.sample(conditions_B, temperature=temperature, uniforms_BL=uniforms_BL)
        with ledger.phase("decode"):
            policy.decode(rollout)
        parts.append((conditions_B.to(policy.device), rollout.tokens_BL, rollout.log_probs_BL))
    del rollout
    experience = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    with ledger.phase("reference"), torch.no_grad():
        reference_BL = reference_log_probs(learner, *experience[:2], config)
    batch = Batch(*experience, reference_BL, torch.zeros(options.images))
    made = Updates(policy, learner.optimizer, learner.group, config)
    with ledger.phase("optimise"):
        for rows_B in minibatches(options.images, config.optim.minibatch, config.run.seed, step=0)[:updates]:
            made.make(batch, rows_B, step=0)
        learner.optimizer.zero_grad(set_to_none=True)


def report(options: argparse.Namespace, minibatch: int, phases: dict[str, Taken]) -> None:
    """What a person reads."""
    updates, images = options.images // minibatch, options.images
    way = f"{updates} update{'s' * (updates > 1)} of {minibatch}"
    table = Table(
        title=f"{options.model}: {images} images a step, {way}, {options.dtype}",
        title_justify="left",
    )
    for column in ("", "peak GB", "operators", "GB moved", "TFLOP", "least s"):
        table.add_column(column, justify="right" if column else "left")
    whole = Taken(
        next(iter(phases.values())).began_bytes,
        max(each.peak_bytes for each in phases.values()),
        *(sum(getattr(each, name) for each in phases.values()) for name in ("operators", "moved_bytes", "flop")),
        sum(each.least_s for each in phases.values()),
    )
    for name, each in (*phases.items(), ("step", whole)):
        table.add_row(
            name,
            f"{each.peak_bytes / 1e9:.{1 if each.peak_bytes > 1e10 else 3}f}",
            f"{each.operators:,}",
            f"{each.moved_bytes / 1e9:,.{0 if each.moved_bytes > 1e11 else 2}f}",
            f"{each.flop / 1e12:.{1 if each.flop > 1e13 else 3}f}",
            f"{each.least_s:.{3 if each.least_s > 0.01 else 5}f}",
        )
    console = Console(highlight=False, width=100)
    console.print(table)
    rate, paper = images / whole.least_s, PAPER.get(options.model)
    beside = f"; the paper's on an H100: {paper}" if paper else ""
    console.print(f"At most {rate:,.0f} images/s, with nothing compiled and nothing in a cache{beside}.")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_forecast",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[size_options()],
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--tflops", type=float, default=H200_TFLOPS, help="matmul peak of the GPU, TFLOP/s")
    parser.add_argument("--terabytes", type=float, default=H200_TERABYTES, help="bandwidth of its memory, TB/s")
    options = parser.parse_args(arguments)
    check_sizes(parser, options)
    if not (0 < options.tflops < math.inf and 0 < options.terabytes < math.inf):
        parser.error(
            f"--tflops is {options.tflops}, --terabytes {options.terabytes}; both must be above 0, and numbers"
        )
    options.compile = False
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table for each reading of the minibatch, and write the numbers where they are asked for."""
    options = parse(arguments)
    found = {}
    for minibatch in options.minibatch:
        found[minibatch] = forecast(options, minibatch)
        report(options, minibatch, found[minibatch])
    if options.json is not None:
        rows = {minibatch: {name: asdict(each) for name, each in phases.items()} for minibatch, phases in found.items()}
        about = {"date": machine.today(), "commit": machine.commit(), "torch": torch.__version__}
        options.json.write_text(json.dumps(about | {"options": vars(options) | {"json": None}, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
