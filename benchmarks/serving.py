"""Our service against the limit, a bare handler and other frameworks: `python -m benchmarks.serving [--json FILE]`.

- W1: brightness of 64 images of 256×256 (12.6 MB), 4 clients.
- W2: brightness of one 256×256 PNG, 64 clients, batching on.
- W3: an encoder of ViT-B/32's shape, 16 images of 224×224 a request, 4 clients.

Contenders take turns, round by round, on the same machine with the same data; the clients use it as well. A figure is
the median of the rounds, and a ratio the median of the rounds' ratios. Each answer is held to the right scores.
Peers run in environments of their own (`make bench-peers`); those that are missing are left out, and it is said.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.contenders import BARE, BARE_FAST, OURS, OURS_PLAIN, PEERS, Contender, command_of, request_of
from benchmarks.load import Measured, load, wait_until_ready
from benchmarks.peers.work import scorer
from services.images import encode_batch, encode_png
from services.processes import bind
from trainer import machine

START_S, STOP_S = 90.0, 15.0
IN_PROCESS = "in process"


class Workload(NamedTuple):
    """What is asked of every contender."""

    name: str
    images: int
    clients: int
    body: bytes


def workload_of(name: str) -> Workload:
    """The data of a workload, always alike: smooth colours with a little noise, as pictures have."""
    count, side, clients = {"w1": (64, 256, 4), "w2": (1, 256, 64), "w3": (16, 224, 4)}[name]
    random = np.random.default_rng(0)
    ramp_HW = np.add.outer(np.arange(side), np.arange(side)) / (2 * side)
    tints_BC = random.uniform(40, 200, (count, 3))
    images_BHWC = tints_BC[:, None, None, :] * (0.5 + 0.5 * ramp_HW[None, :, :, None])
    images_BHWC = images_BHWC + random.normal(0, 4, (count, side, side, 3))
    pixels_BHWC = images_BHWC.clip(0, 255).astype(np.uint8)
    body = encode_png(pixels_BHWC[0]) if name == "w2" else encode_batch(pixels_BHWC)
    return Workload(name, count, clients, body)


def in_process(work: Workload, seconds: float) -> Measured:
    """The limit: the same work on the bytes in memory, with as many threads as the work itself leaves cores."""
    score = scorer(work.name)
    threads = 1 if work.name == "w3" else min(2, os.cpu_count() or 1)
    batch = 16 if work.name == "w2" else 1
    times: list[float] = []
    began_s, began_cpu_s = time.perf_counter(), time.process_time()

    def go() -> None:
        while time.perf_counter() - began_s < seconds:
            asked_s = time.perf_counter()
            score([work.body] * batch)
            times.append(1000 * (time.perf_counter() - asked_s))

    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(go) for _ in range(threads)]:
            future.result()
    took_s, images = time.perf_counter() - began_s, len(times) * batch * work.images
    p50_ms, p99_ms = np.percentile(times, (50, 99))
    return Measured(
        images / took_s, p50_ms, p99_ms, 1000 * (time.process_time() - began_cpu_s) / images, 0.0, len(times)
    )


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a server and all that came of it: what is left after a while is killed, and only that."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # of the session that it was started in
    process.wait()


@contextlib.contextmanager
def started(contender: Contender, work: Workload, peers: Path) -> Iterator[Callable[[float, list[float]], Measured]]:
    """Start a contender and end it after the block, which is given what loads it for some seconds.

    Raises:
        RuntimeError: it does not start, or does not answer with the right scores.
    """
    with bind("127.0.0.1", 0) as listener:
        port = int(listener.getsockname()[1])
    command, environment = command_of(contender, work.name, port, peers)
    request = request_of(contender, work.name, work.body, port)
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        environment["HOME"] = home  # some write there
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        process = subprocess.Popen(command, cwd=machine.ROOT, env=environment, start_new_session=True, **streams)
        asking = {"clients": work.clients, "images": work.images, "pid": process.pid}
        try:
            wait_until_ready(port, request, timeout_s=START_S, is_alive=lambda: process.poll() is None)
            yield lambda seconds, expected: load(port, request, seconds=seconds, expected=expected, **asking)
        except RuntimeError as error:
            log.seek(0)
            raise RuntimeError(f"{error}; its log ends: {log.read()[-1500:].decode(errors='replace')}") from error
        finally:
            stop(process)


def run(
    names: Sequence[str], contenders: Sequence[Contender], *, rounds: int, seconds: float, peers: Path
) -> dict[str, dict[str, list[Measured]]]:
    """Measure everything in turn: by workload, then contender, a list of the rounds."""
    results: dict[str, dict[str, list[Measured]]] = {}
    for name in names:
        work = workload_of(name)
        (expected,) = scorer(name)([work.body])
        rows = results[name] = {}
        for number in range(rounds):
            rows.setdefault(IN_PROCESS, []).append(in_process(work, seconds))
            for contender in [*contenders[number % 2 :], *contenders[: number % 2]]:
                try:
                    with started(contender, work, peers) as loaded:
                        rows.setdefault(contender.name, []).append(loaded(seconds, expected))
                except RuntimeError as error:
                    print(f"{name}, {contender.name}: {error}", file=sys.stderr)
    return results


def ratio(rows: dict[str, list[Measured]], name: str, other: str, field: str = "images_s") -> float:
    """The median of the rounds' ratios of a figure; NaN where one of them has none."""
    pairs = list(zip(rows.get(name, ()), rows.get(other, ()), strict=False))
    return statistics.median(getattr(a, field) / getattr(b, field) for a, b in pairs) if pairs else float("nan")


def show(results: dict[str, dict[str, list[Measured]]]) -> None:
    """Print a table a workload."""
    for name, rows in results.items():
        table = Table(
            "", "images/s", "of bare", "p50 ms", "p99 ms", "p99 of bare's", "CPU ms/image", "PSS MB", title=name
        )
        for contender, measured in rows.items():
            middle = Measured(*(statistics.median(column) for column in zip(*measured, strict=True)))
            of_bare, tail = ratio(rows, contender, BARE.name), ratio(rows, contender, BARE.name, "p99_ms")
            figures = (of_bare, middle.p50_ms, middle.p99_ms, tail, middle.cpu_ms)
            memory = f"{middle.memory_mb:.0f}" if middle.memory_mb else "–"
            table.add_row(contender, f"{middle.images_s:.0f}", *(f"{figure:.2f}" for figure in figures), memory)
        Console(width=120).print(table)


def main() -> int:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--workloads", default="w1,w2,w3", help="some of w1,w2,w3")
    parser.add_argument(
        "--contenders",
        default="",
        help="some of bare,bare-fast,ours,ours-plain,litserve,bentoml,rayserve; all by default",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--peers", type=Path, default=machine.ROOT / ".cache" / "peers", help="their environments")
    parser.add_argument("--json", type=Path, help="a file to keep every figure in")
    options = parser.parse_args()
    own = {"bare": BARE, "bare-fast": BARE_FAST, "ours": OURS, "ours-plain": OURS_PLAIN}
    by_name = {**own, **{peer.folder or "": peer for peer in PEERS}}
    asked = [name for name in options.contenders.split(",") if name] or list(by_name)
    contenders = []
    for name in asked:
        folder = by_name[name].folder
        if folder is not None and not (options.peers / folder / "bin").is_dir():
            print(f"{name} is left out: no environment at {options.peers / folder}; `make bench-peers` makes it")
        else:
            contenders.append(by_name[name])
    about = {
        "date": machine.today(),
        "commit": machine.commit(),
        "processor": machine.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("uvicorn", "redis", "numpy")},
        "rounds": options.rounds,
        "seconds": options.seconds,
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    results = run(
        options.workloads.split(","),
        contenders,
        rounds=options.rounds,
        seconds=options.seconds,
        peers=options.peers.resolve(),
    )
    show(results)
    if options.json:
        kept = {
            work: {name: [row._asdict() for row in rows] for name, rows in by.items()} for work, by in results.items()
        }
        options.json.write_text(json.dumps({"about": about, "results": kept}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
