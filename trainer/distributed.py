"""The ranks of a run: who samples what, how gradients and numbers are shared, and how a failure is agreed by all.

Every rank calls the methods of its group in the same order. A run of one process is a group of one, for which all of
them do nothing. Shape legend: B images of a step over all ranks · b those of one rank.

    RankError      another rank failed, or is gone
    └── RankLost   a rank has died, or does not answer
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from trainer.failures import EXIT_SUSPENDED, passes
from trainer.settings import Ranks

BEAT_S = 1.0
DEAD_AFTER_S = 8.0
"""Silence after which a rank counts as dead; the others are gone within 30 s of its death."""
JOIN_S = 60
LEFT = b"left"
"""The last beat of a rank that ends by itself, however long the others take."""
MESSAGE_BYTES = 1024

T = TypeVar("T")


class RankError(RuntimeError):
    """Another rank failed, or is gone; the message names it.

    Attributes:
        passes: whether its failure is of the kind that passes, as that of a reward service.
    """

    def __init__(self, message: str, *, passes: bool = False) -> None:
        super().__init__(message)
        self.passes = passes


class RankLost(RankError):
    """A rank has died, or does not answer; those that are left can start again from the last checkpoint."""

    def __init__(self, message: str) -> None:
        super().__init__(message, passes=True)


class Group:
    """The ranks of a run, seen by one of them.

    Attributes:
        launch: names one start of torchrun, over all its restarts; empty for one process without it.
    """

    def __init__(self, ranks: Ranks, device: torch.device, *, timeout_s: float) -> None:
        """Join the others.

        Args:
            ranks: as torchrun gives them to each process.
            device: of this rank; NCCL joins GPUs, gloo CPUs.
            timeout_s: the longest that a rank may keep the others waiting.

        Raises:
            RankLost: the others cannot be reached.
        """
        self.rank, self.size, self._device = ranks.rank, ranks.world_size, device
        self._stop, self._lost = threading.Event(), threading.Event()
        self._lost_ranks: list[int] = []
        self._lock = threading.Lock()
        self._reporter: int | None = None
        self.when_lost: Callable[[], str] = str  # saves what can be saved, and says so; called from any thread
        self.launch = ""
        if self.size == 1 and not ranks.torchelastic_run_id:
            return
        attempt = ranks.torchelastic_restart_count  # torchrun keeps the store, and in it the addresses of the dead
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=JOIN_S)))
            # Not torchrun's own name for it, which is "none" for every start by an address.
            self.launch = store.compare_set("launch", "", uuid4().hex).decode()
            if self.size == 1:
                return
            dist.init_process_group(
                backend,
                store=PrefixStore(f"group/{attempt}", store),
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=timeout_s),
                device_id=device if backend == "nccl" else None,
            )
            self._beats = PrefixStore(f"beats/{attempt}", store)
            self._beats.set(str(self.rank), "0")
            dist.barrier()
        except (RuntimeError, ValueError) as error:
            raise RankLost(f"rank {self.rank} cannot reach the others: {_one_line(error)}") from error
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """The part of `count` things, such as a step's labels, that is this rank's; `count` divides evenly."""
        own = count // self.size
        return range(self.rank * own, (self.rank + 1) * own)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let all ranks leave the block, or all of them raise: the failed one its own error, the others `RankError`."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # noqa: BLE001 - it is raised again, once the others know
            failure = error
        self._agree(failure)

    def _agree(self, failure: Exception | None) -> None:
        if self.size == 1:
            if failure is not None:
                raise failure
            return
        # 0: well; 1: failed; 2: failed by something that passes.
        state = 0 if failure is None else 1 + passes(failure)
        states = self._collect(lambda: self._all_gather(torch.tensor([state], device=self._device)))
        failed = [rank for rank, value in enumerate(states.tolist()) if value]
        if not failed:
            return
        text = b"" if failure is None else _one_line(failure).encode()[:MESSAGE_BYTES]
        padded = torch.tensor(list(text.ljust(MESSAGE_BYTES, b"\0")), dtype=torch.uint8, device=self._device)
        texts = self._collect(lambda: self._all_gather(padded[None]))
        if failure is not None:
            raise failure
        first = failed[0]
        passing = all(int(states[rank]) == 2 for rank in failed)
        message = bytes(texts[first].tolist()).rstrip(b"\0").decode(errors="replace")
        raise RankError(f"rank {first} failed: {message}", passes=passing)

    def gather(self, mine_b: Tensor) -> Tensor:
        """The rows (b, …) of all ranks in the order of the ranks, (B, …); every rank has equally many."""
        if self.size == 1:
            return mine_b
        if not mine_b.numel():  # rows of nothing
            return mine_b.new_empty(len(mine_b) * self.size, *mine_b.shape[1:])
        return self._collect(lambda: self._all_gather(mine_b))

    def average(self, mine: Tensor) -> Tensor:
        """The mean over the ranks, in place."""
        if self.size > 1:
            self._collect(lambda: dist.all_reduce(mine))
            mine.div_(self.size)
        return mine

    def mean(self, mine: float) -> float:
        """The mean of a number over the ranks."""
        return float(self.average(torch.tensor([mine], dtype=torch.float64, device=self._device))[0])

    def greatest(self, mine: Tensor) -> Tensor:
        """The maximum over the ranks, in place."""
        if self.size > 1:
            self._collect(lambda: dist.all_reduce(mine, op=dist.ReduceOp.MAX))
        return mine

    def any(self, mine: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(self.greatest(torch.tensor([float(mine)], device=self._device))[0])

    def tell(self, text: str) -> str:
        """What the first rank says."""
        if self.size == 1:
            return text
        length = torch.tensor([len(text.encode())], device=self._device)
        self._collect(lambda: dist.broadcast(length, 0))
        data = torch.zeros(int(length), dtype=torch.uint8, device=self._device)
        if self.leads:
            data.copy_(torch.tensor(list(text.encode()), dtype=torch.uint8))
        self._collect(lambda: dist.broadcast(data, 0))
        return bytes(data.tolist()).decode()

    def close(self) -> None:
        """Leave the group; the others may go on with what concerns them alone."""
        self._stop.set()
        if self.size > 1 and dist.is_initialized():
            with suppress(RuntimeError):
                self._beats.set(str(self.rank), LEFT.decode())
                dist.destroy_process_group()

    def _all_gather(self, mine_b: Tensor) -> Tensor:
        parts = [torch.empty_like(mine_b) for _ in range(self.size)]
        dist.all_gather(parts, mine_b.contiguous())
        return torch.cat(parts)

    def _collect(self, collective: Callable[[], T]) -> T:
        """Run a collective; where it fails because a rank is gone, find out which.

        Raises:
            RankLost: with the ranks that are gone.
        """
        try:
            return collective()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            while not self._reports():
                time.sleep(BEAT_S)  # the watching thread is about to end the process
            self._lost.wait(2 * DEAD_AFTER_S)
            named = f"rank {', '.join(map(str, self._lost_ranks))}" if self._lost_ranks else "another rank"
            raise RankLost(f"{named} is gone; rank {self.rank} cannot go on without it") from error

    def _reports(self) -> bool:
        """Whether this thread is the one that reports a lost rank: the first to ask is."""
        with self._lock:
            if self._reporter is None:
                self._reporter = threading.get_ident()
            return self._reporter == threading.get_ident()

    def _watch(self) -> None:
        """Say that this rank lives, and end it when another does not: a collective may wait for the dead in vain."""
        seen = dict.fromkeys(range(self.size), (b"", time.monotonic()))
        beat = 0
        while not self._stop.wait(BEAT_S):
            beat += 1
            try:
                self._beats.set(str(self.rank), str(beat))
                for rank in range(self.size):
                    value = self._beats.get(str(rank))
                    if value != seen[rank][0]:
                        seen[rank] = (value, time.monotonic())
            except RuntimeError:  # of the store, which is gone with the process that held it
                seen = {rank: (value, since_s if rank else -DEAD_AFTER_S) for rank, (value, since_s) in seen.items()}
            now_s = time.monotonic()
            silent = [
                rank for rank, (value, since_s) in seen.items() if value != LEFT and now_s - since_s > DEAD_AFTER_S
            ]
            self._lost_ranks = [rank for rank in silent if rank != self.rank]
            if self._lost_ranks:
                self._lost.set()
                time.sleep(2 * BEAT_S)  # the main thread may see it, too, and can close what is open
                if not self._stop.is_set() and self._reports():
                    named = ", ".join(map(str, self._lost_ranks))
                    message = f"rank {named} is gone; rank {self.rank} ends{self.when_lost()}"
                    Console(stderr=True, highlight=False).print(
                        f"[bold red]error:[/] {escape(message)}", soft_wrap=True
                    )
                    os._exit(EXIT_SUSPENDED)
                return


class Gradients:
    """All gradients in one buffer, so that they are averaged by one collective and cleared by one write."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], group: Group) -> None:
        """Give the parameters their gradients.

        Args:
            parameters: those that are trained, of one dtype and device.
            group: over which they are averaged.
        """
        self._group = group
        sizes = [parameter.numel() for parameter in parameters]
        self._flat = torch.zeros(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
        for parameter, part in zip(parameters, self._flat.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)

    def average(self) -> None:
        """Make them the mean over the ranks."""
        self._group.average(self._flat)

    def clear(self) -> None:
        """Make them zero, in place."""
        self._flat.zero_()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
