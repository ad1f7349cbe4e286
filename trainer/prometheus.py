"""A run's numbers for Prometheus: the first rank answers at /metrics while it trains.

A metric of docs/metrics.md is called `trainer_<name>` here; one of several parts, such as `seconds/sample`, is one
metric with the part as a label. Every series has the run's folder as its label `run`.
"""

import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, start_http_server

from trainer.config import ConfigError
from trainer.settings import Settings, load_settings

PARTS = {
    "seconds": ("phase_seconds", "phase"),
    "raw_score": ("raw_score", "reward"),
    "raw_std": ("raw_std", "reward"),
    "raw_min": ("raw_min", "reward"),
    "raw_max": ("raw_max", "reward"),
    "shaped": ("shaped", "reward"),
}
"""What is before the slash of a metric of several parts: its name here, and the label for what is after the slash."""


class Prometheus:
    """Gauges of the last step, served over HTTP from the start of training until the run ends."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], done: int) -> None:
        self._run = folder.name
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._set("step", float(done), "Steps that are done")
        self._set("steps_planned", float(settings["run"]["steps"]), "Steps of the whole run")
        self._set("last_step_timestamp_seconds", time.time(), "When the last step ended, or training began: Unix time")
        where = load_settings()
        try:
            self._server, self._thread = start_http_server(
                where.trainer_metrics_port, addr=where.trainer_metrics_host, registry=self._registry
            )
        except OSError as error:
            raise _refused(where, error) from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the numbers of a step."""
        for name, value in metrics.items():
            before, slash, after = name.partition("/")
            family, label = PARTS[before] if slash and before in PARTS else (name.replace("/", "_"), "")
            text = f"docs/metrics.md: {before}/…" if label else f"docs/metrics.md: {name}"
            self._set(family, value, text, **({label: after} if label else {}))
        self._set("last_step_timestamp_seconds", time.time(), "")
        self._set("step", float(step), "")

    def close(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _set(self, name: str, value: float, text: str, **labels: str) -> None:
        if name not in self._gauges:
            self._gauges[name] = Gauge(f"trainer_{name}", text, ["run", *labels], registry=self._registry)
        self._gauges[name].labels(run=self._run, **labels).set(value)


def check_address() -> None:
    """Find before any work that the address cannot be listened on.

    Raises:
        ConfigError: it is taken, or not this machine's.
    """
    where = load_settings()
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            where.trainer_metrics_host, where.trainer_metrics_port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        raise _refused(where, error) from error


def _refused(where: Settings, error: OSError) -> ConfigError:
    return ConfigError(
        f"run.loggers has prometheus, and TRAINER_METRICS_HOST {where.trainer_metrics_host}, TRAINER_METRICS_PORT "
        f"{where.trainer_metrics_port} cannot be listened on: {error.strerror}: choose another"
    )
