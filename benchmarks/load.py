"""A load of requests from threads with a connection each, and what a tree of processes spends meanwhile."""

import contextlib
import json
import os
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from operator import sub
from pathlib import Path
from typing import Any, NamedTuple

TICKS = os.sysconf("SC_CLK_TCK")
SAMPLE_S = 0.25
TIMEOUT_S = 60.0
RECONNECTS = 5
"""A proxy that takes up a new configuration closes connections; a client then opens another, as any does."""
TOLERANCE = 1e-3
"""Of a score: the encoder sums in another order in another batch."""


class Measured(NamedTuple):
    """What a load saw.

    Attributes:
        images_s: images a second.
        p50_ms, p99_ms: of a request.
        cpu_ms: CPU milliseconds of the server's processes for an image.
        memory_mb: the most that its processes held together (PSS, so that shared pages count once), in MB.
        requests: how many were answered.
    """

    images_s: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    memory_mb: float
    requests: int


def ask(connection: socket.socket, request: bytes) -> list[float]:
    """Send a whole request and read the scores of its answer.

    Raises:
        OSError: the connection is gone.
        ValueError: the answer is no 200 with scores.
    """
    connection.sendall(request)
    answer = bytearray()
    while (end := answer.find(b"\r\n\r\n")) < 0:
        if not (more := connection.recv(65536)):
            raise ConnectionError("the connection was closed")
        answer += more
    head = bytes(answer[:end]).lower()
    if not head.startswith(b"http/1.1 200"):
        raise ValueError(bytes(answer[:400]).decode(errors="replace"))
    chunked = b"transfer-encoding: chunked" in head
    length = -1 if chunked else int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
    while not answer.endswith(b"0\r\n\r\n") if chunked else len(answer) < end + 4 + length:
        if not (more := connection.recv(65536)):
            raise ConnectionError("the connection was closed")
        answer += more
    text = bytes(answer[end + 4 :])
    said = json.loads(text[text.index(b"{") : text.rindex(b"}") + 1])
    scores: list[float] = said["scores"]
    return scores


def tree(pid: int) -> list[int]:
    """A process and all that came of it."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            children.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def cpu_s(pids: list[int]) -> float:
    """CPU seconds that these processes have spent."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS


def memory_mb(pids: list[int]) -> float:
    """Proportional set size of these processes together, in MB of 10^6 bytes."""
    kib = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            kib += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return kib * 1024 / 1e6


@contextlib.contextmanager
def watching(pid: int, seen: dict[str, float]) -> Iterator[None]:
    """Note into `seen` the CPU seconds and the peak memory of a tree of processes during the block."""
    over = threading.Event()
    pids, peak = tree(pid), 0.0

    def watch() -> None:
        nonlocal peak
        while not over.wait(SAMPLE_S):
            peak = max(peak, memory_mb(pids))

    before_s, thread = cpu_s(pids), threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        seen.update(cpu_s=cpu_s(pids) - before_s, memory_mb=peak)


def load(
    port: int,
    request: bytes,
    *,
    clients: int,
    seconds: float,
    images: int,
    pid: int,
    expected: list[float],
    tolerance: float = TOLERANCE,
) -> Measured:
    """Ask from several clients at once, each as soon as it is answered, for some seconds.

    Args:
        port: of the loopback.
        request: whole.
        clients: how many.
        seconds: after a third of which the counting begins.
        images: in one request.
        pid: root of the server's processes.
        expected: the right scores, to which each answer is held.
        tolerance: by which a score may differ from its own.

    Raises:
        RuntimeError: a client failed, or a score was wrong.
    """
    begin = threading.Event()
    times: list[tuple[float, float]] = []
    errors: list[Exception] = []
    warm_s = seconds / 3
    stop_s = time.perf_counter() + warm_s + seconds

    def client() -> None:
        try:
            for _ in range(1 + RECONNECTS):
                with contextlib.suppress(ConnectionError):
                    ask_until_over()
                    return
            raise ConnectionError(f"the connection was closed {1 + RECONNECTS} times")
        except Exception as error:  # noqa: BLE001 - whatever it is, the run is void
            errors.append(error)

    def ask_until_over() -> None:
        with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while (asked_s := time.perf_counter()) < stop_s:
                scores = ask(connection, request)
                if len(scores) != len(expected) or max(map(abs, map(sub, scores, expected))) > tolerance:
                    raise ValueError(f"scores {scores[:3]}…, expected {expected[:3]}…")
                if begin.is_set():
                    times.append((asked_s, time.perf_counter()))

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(warm_s)
    seen: dict[str, float] = {}
    with watching(pid, seen):
        began_s = time.perf_counter()
        begin.set()
        for thread in threads:
            thread.join()
        took_s = time.perf_counter() - began_s
    if errors:
        raise RuntimeError(f"{len(errors)} of {clients} clients failed, the first with: {errors[0]}") from errors[0]
    latencies_ms = sorted(1000 * (end - start) for start, end in times)
    count = len(times)
    cuts = statistics.quantiles(latencies_ms, n=100, method="inclusive")
    return Measured(
        count * images / took_s, cuts[49], cuts[98], 1000 * seen["cpu_s"] / (count * images), seen["memory_mb"], count
    )


def wait_until_ready(port: int, request: bytes, *, timeout_s: float, is_alive: Any) -> list[float]:
    """Ask until there is an answer with scores; return it.

    Raises:
        RuntimeError: there was none in time, or the server ended.
    """
    gives_up_s, last = time.monotonic() + timeout_s, "no answer"
    while time.monotonic() < gives_up_s:
        if not is_alive():
            raise RuntimeError(f"the server ended ({last})")
        try:
            with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as connection:
                return ask(connection, request)
        except (OSError, ValueError) as error:
            last = str(error)[:300]
        time.sleep(0.1)
    raise RuntimeError(f"not ready within {timeout_s:g} s: {last}")
