"""The provisioned dashboard, and the names that our processes tell Prometheus."""

import json
import re
import socket
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from services.batching.survey import Events, Survey
from services.http.metrics import Metrics
from tests.deploy.compose_files import ROOT
from trainer.config import Config
from trainer.prometheus import Prometheus

FOLDER = ROOT / "services" / "compose" / "grafana"
FILE = FOLDER / "dashboards" / "var-grpo.json"
COLUMNS, ROWS = 24, 25
"""Of Grafana's grid; so many rows are 950 pixels, what a browser shows at once on a screen of 1080."""
NUMBERS = ("reward", "success_rate", "label_accuracy", "kl", "clip_fraction", "images_per_second")
NUMBERS += ("raw_score/brightness", "seconds/sample", "seconds/score", "seconds/step")
"""Of those that docs/metrics.md defines, the ones that a dashboard may ask for, in a recipe that has them all."""


class Query(NamedTuple):
    """What a panel asks for."""

    panel: str
    expression: str
    legend: str


def read() -> dict[str, Any]:
    """The dashboard."""
    content: dict[str, Any] = json.loads(FILE.read_text("utf-8"))
    return content


def queries(dashboard: Mapping[str, Any]) -> Iterator[Query]:
    """What all panels ask for."""
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield Query(panel["title"], target["expr"], target["legendFormat"])


def resolved(expression: str, interval: str = "1m") -> str:
    """An expression with what Grafana fills in: everything for its variables."""
    return expression.replace("$__rate_interval", interval).replace("$run", ".*").replace("$reward", ".*")


def samples_of(text: str) -> dict[str, set[str]]:
    """The labels of each sample's name in a page of metrics."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def told(port: int) -> dict[str, set[str]]:
    """Every sample that an API and a trainer tell, with its labels.

    Args:
        port: that the trainer's part is told to listen on.
    """
    metrics = Metrics("brightness", "1")
    metrics.count_request(200)
    of_api = samples_of(metrics.text(Survey(1, 1, 1, 1.0, 0, Events())).decode())
    with closing(Prometheus(Path("runs/mine"), run_settings(), 0)) as logger:
        logger.log(1, dict.fromkeys(NUMBERS, 0.5))
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            return of_api | samples_of(answer.read().decode())


def run_settings() -> dict[str, Any]:
    """The settings of some run."""
    return Config.model_validate({"rewards": [{"name": "brightness"}]}).to_dict()


def asked(expression: str) -> Iterator[tuple[str, set[str]]]:
    """The samples that an expression names, each with the labels that it selects by."""
    for found in re.finditer(r"\b((?:trainer|reward)_\w+)\{([^}]*)\}", expression):
        yield found[1], set(re.findall(r"(\w+)\s*(?:=~|!=|=)", found[2]))


def free_port() -> int:
    """One that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port
