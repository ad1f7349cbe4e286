"""A service that is fuzzed, and what it must not lose by it: its processes, its memory, its scores."""

import contextlib
import http.client
import statistics
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from services import protocol
from services.protocol import Info, Limits
from tests.fuzz.corpus import LIMITS
from tests.fuzz.wire import Line
from tests.services.conftest import Process, descendants, wait_until

ROLES = ("api", "worker")
STALL_S = 2
SETTINGS = {**LIMITS, "REWARD_UPLOAD_STALL_S": str(STALL_S), "REWARD_MAX_BODY_BYTES": str(8 * 2**20)}
SAMPLE_S = 0.02
LEAST_SAMPLES = 80
MOST_GROWTH_MIB = 20.0


class Served:
    """A `python -m services serve REWARD` of its own Redis; use as `with`.

    Args:
        reward: that is served.
        token: that it asks for, if any.
    """

    def __init__(self, reward: str = "brightness", *, token: str | None = None) -> None:
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - closed with the service
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}
        settings = {**SETTINGS, **({"REWARD_TOKEN": token} if token else {})}
        self._process = Process(["serve", reward, "--port", "0", "--announce"], settings, self._log)

    def __enter__(self) -> Self:
        try:
            self.url = self._process.url()
            host, _, port = self.url.removeprefix("http://").partition(":")
            self.host, self.port = host, int(port)
            self.limits: Limits = Info.model_validate_json(self.get(protocol.INFO_PATH)).limits
            self.pids = {_role(pid): pid for pid in descendants(self._process.pid)}
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._process.close()
        self._log.close()

    def line(self) -> Line:
        """A connection to it."""
        return Line(self.host, self.port)

    def get(self, path: str) -> str:
        """What it answers there; it must be 200."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=30)
        try:
            connection.request("GET", path, headers=self.headers)
            answer = connection.getresponse()
            text = answer.read().decode()
            assert answer.status == 200, text
            return text
        finally:
            connection.close()

    def check_unharmed(self) -> None:
        """The same processes run as at the start, none has reported a bug, and nothing is left in the queue."""
        log = self._process.errors()
        assert {_role(pid): pid for pid in descendants(self._process.pid)} == self.pids, log[-5000:]
        assert "Traceback (" not in log, log[:20_000]
        wait_until(lambda: self._queued() == [0.0, 0.0, 0.0, 0.0])

    def _queued(self) -> list[float]:
        """Images waiting, images leased, bytes in the queue, dead letters held."""
        names = ("reward_queue_images{", "reward_queue_bytes{", "reward_dead_letters_held{")
        lines = self.get(protocol.METRICS_PATH).splitlines()
        return [float(line.rpartition(" ")[2]) for line in lines if line.startswith(names)]


class Memory:
    """The resident memory of API and worker while the block runs; what came before is warm-up.

    Args:
        served: whose.
    """

    def __init__(self, served: Served) -> None:
        self._pids = {role: served.pids[role] for role in ROLES}
        self._mib: dict[str, list[float]] = {role: [] for role in ROLES}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(SAMPLE_S):
            for role, pid in self._pids.items():
                with contextlib.suppress(OSError):  # a process that is gone is seen by `check_unharmed`
                    self._mib[role].append(resident_mib(pid))

    def quarters(self) -> dict[str, tuple[float, float]]:
        """The mean of the first and of the last quarter, in MiB, by role."""
        return {role: quarters(mib) for role, mib in self._mib.items()}

    def check(self) -> None:
        """Neither has grown."""
        for role, mib in self._mib.items():
            check_growth(role, mib)


def quarters(mib: list[float]) -> tuple[float, float]:
    """The mean of the first and of the last quarter of a series."""
    quarter = max(1, len(mib) // 4)
    return statistics.fmean(mib[:quarter]), statistics.fmean(mib[-quarter:])


def check_growth(role: str, mib: list[float]) -> None:
    """The last quarter of a series exceeds the first by no more than `MOST_GROWTH_MIB` on average."""
    assert len(mib) >= LEAST_SAMPLES, f"{role}: {len(mib)} samples tell nothing"
    first, last = quarters(mib)
    assert last <= first + MOST_GROWTH_MIB, f"{role}: {first:.1f} MiB in the first quarter, {last:.1f} in the last"


def resident_mib(pid: int) -> float:
    """The resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise ProcessLookupError(f"process {pid} has ended")


def _role(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    return next((role for role in ROLES if role in words), "redis" if "redis" in words[0] else words[0])
