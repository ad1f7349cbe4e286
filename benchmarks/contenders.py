"""How each contender is started and spoken to: a tree of processes behind a port."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from services.protocol import MEDIA_PICTURES, MEDIA_SAFETENSORS, SCORE_PATH
from trainer.machine import ROOT

BINARY = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class Contender:
    """A way of serving.

    Attributes:
        name: for the table.
        command: makes a command of workload and port.
        folder: where its environment lies, or None for this one.
        environment: what it is told besides.
        settings: likewise, of one workload.
    """

    name: str
    command: Callable[[str, int], list[str]]
    folder: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    settings: dict[str, dict[str, str]] = field(default_factory=dict)


REWARD_OF = {"w1": "brightness", "w2": "brightness", "w3": "benchmarks.peers.encoder:Encoder"}


def _peer(name: str, program: str, *arguments: str) -> Callable[[str, int], list[str]]:
    def command(workload: str, port: int) -> list[str]:
        given = [part.format(workload=workload, upper=workload.upper(), port=port) for part in arguments]
        return [f"{{peers}}/{name}/bin/{program}", *given]

    return command


def _ours(workload: str, port: int) -> list[str]:
    return [sys.executable, "-m", "services", "serve", REWARD_OF[workload], "--port", str(port), "--announce"]


def _bare(*options: str) -> Callable[[str, int], list[str]]:
    return lambda workload, port: [sys.executable, "-m", "benchmarks.bare", workload, str(port), *options]


BARE = Contender("bare handler", _bare())
BARE_FAST = Contender("… with uvloop, httptools", _bare("fast"))
OURS = Contender(
    "ours",
    _ours,
    # Two processes for HTTP, as the peers have there; a forward pass of one request's images, as with all others.
    settings={
        "w1": {"REWARD_API_PROCESSES": "2"},
        "w2": {"REWARD_API_PROCESSES": "2"},
        "w3": {"REWARD_MAX_BATCH": "16"},
    },
)
OURS_PLAIN = Contender("… by default", _ours)
PEERS = (
    Contender(
        "LitServe",
        _peer("litserve", "python", "benchmarks/peers/litserve/server.py", "{workload}", "{port}"),
        "litserve",
    ),
    Contender(
        "BentoML",
        _peer(
            "bentoml",
            "bentoml",
            "serve",
            "benchmarks.peers.bentoml.service:{upper}",
            "--host",
            "127.0.0.1",
            "--port",
            "{port}",
        ),
        "bentoml",
        environment={"BENTOML_DO_NOT_TRACK": "True"},
    ),
    Contender(
        "Ray Serve",
        _peer("rayserve", "python", "benchmarks/peers/rayserve/server.py", "{workload}", "{port}"),
        "rayserve",
        environment={
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
        },
    ),
)


def command_of(contender: Contender, workload: str, port: int, peers: Path) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment of a contender's processes."""
    command = [part.replace("{peers}", str(peers)) for part in contender.command(workload, port)]
    threads = {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return command, {**os.environ, **threads, **contender.environment, **contender.settings.get(workload, {})}


def request_of(contender: Contender, workload: str, body: bytes, port: int) -> bytes:
    """A whole HTTP request with this body."""
    media = MEDIA_PICTURES[0] if workload == "w2" else MEDIA_SAFETENSORS
    if contender.name == "LitServe":
        media = BINARY
    head = (
        f"POST {SCORE_PATH} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: {media}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
