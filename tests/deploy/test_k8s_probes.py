"""The probes of the manifests, asked of real processes that the manifests' own commands start, and a real Redis."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import httpx
import pytest

from services.redis_server import RedisServer
from tests.deploy.k8s_manifests import ROOT, Object, find, flat, pod_of
from tests.deploy.k8s_pods import variables_of
from tests.services.conftest import wait_until

PROBE_S = 10.0


def container(kind: str, name: str, *, first: bool = False) -> Object:
    """The container of a workload, or the one that runs before it."""
    found: Object = pod_of(find(flat(), kind, name))["spec"]["initContainers" if first else "containers"][0]
    return found


def free_port() -> int:
    """A port of the loopback that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def running(given: Object, places: Mapping[str, str], redis_url: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The container's process.

    Args:
        given: the container.
        places: what stands here for what the container has: its address, its /tmp, its Python.
        redis_url: what the Secret would bring.
        log: for its stderr.
    """
    command = [replaced(part, places) for part in (*given["command"], *given["args"])]
    variables = {**os.environ, **variables_of(flat(), given), "REDIS_URL": redis_url, "OMP_NUM_THREADS": "1"}
    variables.pop("REWARD_TOKEN", None)
    with log.open("wb") as stderr, subprocess.Popen(command, cwd=ROOT, env=variables, stderr=stderr) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()


def replaced(text: str, places: Mapping[str, str]) -> str:
    """The text with each place put for what it stands for."""
    for inside, here in places.items():
        text = text.replace(inside, here) if len(inside) > 6 or text == inside else text
    return text


def passes(given: Object, probe: str, places: Mapping[str, str]) -> bool:
    """Whether a probe would find the container well."""
    asks = given[probe]
    if "httpGet" in asks:
        port = replaced(str(asks["httpGet"]["port"]), places)
        try:
            answer = httpx.get(f"http://127.0.0.1:{port}{asks['httpGet']['path']}", trust_env=False, timeout=PROBE_S)
        except httpx.TransportError:
            return False
        return 200 <= answer.status_code < 400
    command = [replaced(part, places) for part in asks["exec"]["command"]]
    return subprocess.run(command, capture_output=True, timeout=PROBE_S, check=False).returncode == 0


@pytest.mark.redis
def test_an_api_is_ready_once_it_has_reached_redis_and_until_it_stops(tmp_path: Path) -> None:
    """Not before; with no worker, and while Redis is away again, it is."""
    given, port = container("Deployment", "brightness-api"), str(free_port())
    places = {"8000": port, "127.0.0.1:8000": f"127.0.0.1:{port}", "0.0.0.0": "127.0.0.1", "python": sys.executable}
    with RedisServer() as redis:
        assert redis.process is not None
        redis.process.kill()
        redis.process.wait()
        with running(given, places, redis.url, tmp_path / "log") as process:
            wait_until(lambda: passes(given, "livenessProbe", places))
            assert not passes(given, "startupProbe", places)
            redis.revive()
            assert passes(given, "startupProbe", places)
            assert passes(given, "readinessProbe", places)
            redis.process.kill()
            redis.process.wait()
            assert passes(given, "readinessProbe", places)
            assert passes(given, "livenessProbe", places)
            process.terminate()
            assert process.wait(PROBE_S) == 0
            assert not passes(given, "readinessProbe", places)


@pytest.mark.redis
def test_a_worker_is_ready_once_it_takes_jobs_and_alive_unless_it_is_frozen(tmp_path: Path) -> None:
    """Its model is loaded by then; a process that is stopped is found, and one that waits for Redis is not."""
    given = container("Deployment", "brightness-worker")
    places = {"/tmp/ready": str(tmp_path / "ready"), "exec python": f"exec {shlex.quote(sys.executable)}"}
    with RedisServer() as redis:
        assert redis.process is not None
        redis.process.kill()
        redis.process.wait()
        with running(given, places, redis.url, tmp_path / "log") as process:
            places["/proc/1/status"] = f"/proc/{process.pid}/status"
            wait_until(lambda: b"Redis" in (tmp_path / "log").read_bytes())
            assert not passes(given, "startupProbe", places)
            assert passes(given, "livenessProbe", places)
            redis.revive()
            wait_until(lambda: passes(given, "startupProbe", places))
            assert passes(given, "readinessProbe", places)
            process.send_signal(signal.SIGSTOP)
            wait_until(lambda: not passes(given, "livenessProbe", places))
            process.send_signal(signal.SIGCONT)
            wait_until(lambda: passes(given, "livenessProbe", places))
            process.terminate()
            assert process.wait(PROBE_S) == 0


def test_a_run_waits_for_its_rewards() -> None:
    """Through refused connections and 503s, until every one is ready."""

    class Handler(BaseHTTPRequestHandler):
        statuses: ClassVar[list[int]] = []

        def do_GET(self) -> None:
            status = 503 if not self.statuses else 200
            self.statuses.append(status)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    given, port = container("Job", "trainer", first=True), free_port()
    script = given["command"][2].replace("time.sleep(5)", "time.sleep(0.1)")
    command = [sys.executable, "-c", script, *(["http://127.0.0.1:" + str(port)] * 2)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as waiting:
        assert waiting.stdout is not None
        assert "Connection refused" in waiting.stdout.readline()
        with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            assert "503" in waiting.stdout.read()
            assert waiting.wait(PROBE_S) == 0
            server.shutdown()
    assert Handler.statuses == [503, 200, 200]


def test_a_wait_for_rewards_ends_when_it_is_told_to() -> None:
    """By a handler of its own: a container's process 1 hears no signal without, and a node would drain slowly."""
    given = container("Job", "trainer", first=True)
    command = [sys.executable, "-c", given["command"][2], f"http://127.0.0.1:{free_port()}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as waiting:
        assert waiting.stdout is not None
        assert "Connection refused" in waiting.stdout.readline()
        waiting.terminate()
        assert waiting.wait(PROBE_S) == 128 + signal.SIGTERM
