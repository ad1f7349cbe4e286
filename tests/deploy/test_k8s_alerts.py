"""The alerts: of metrics that exist, each with a row in the handbook, raised by what they are for and nothing else."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from services.batching.survey import Events, Survey
from services.http.metrics import Metrics
from tests.deploy.k8s_manifests import K8S, handbook, read
from tests.deploy.test_k8s_probes import free_port
from trainer.prometheus import Prometheus

ALERTS = K8S / "overlays" / "monitoring" / "alerts.yaml"
SCALERS = K8S / "overlays" / "keda" / "scaled-objects.yaml"
OF_OTHERS = {"up", "kube_job_status_active"}
"""Prometheus's own, and one of kube-state-metrics."""


def spec() -> dict[str, Any]:
    """What the PrometheusRule holds: the content of a file of rules."""
    (rule,) = read(ALERTS.read_text("utf-8"))
    found: dict[str, Any] = rule["spec"]
    return found


def rules() -> list[dict[str, Any]]:
    """All alerts."""
    return [rule for group in spec()["groups"] for rule in group["rules"]]


def queries() -> dict[str, str]:
    """What is asked of Prometheus, by who asks."""
    scalers = {thing["metadata"]["name"]: thing["spec"]["triggers"] for thing in read(SCALERS.read_text("utf-8"))}
    return {rule["alert"]: rule["expr"] for rule in rules()} | {
        f"{name} {number}": trigger["metadata"]["query"]
        for name, triggers in scalers.items()
        for number, trigger in enumerate(triggers)
        if trigger["type"] == "prometheus"
    }


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The metrics that an API tells of, with a queue, and those of a run."""
    port = free_port()
    monkeypatch.setenv("TRAINER_METRICS_HOST", "127.0.0.1")
    monkeypatch.setenv("TRAINER_METRICS_PORT", str(port))
    run = Prometheus(tmp_path, {"run": {"steps": 1}}, 0)
    try:
        run.log(1, {"reward": 0.5, "seconds/step": 1.0})
        of_run = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
    finally:
        run.close()
    metrics = Metrics("brightness", "1")
    metrics.count_request(200)
    of_api = metrics.text(Survey(1, 1, 1, 1.0, 1, Events())).decode()
    return {
        sample.name
        for text in (of_api, of_run)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def asked(query: str) -> set[str]:
    """The metrics of a query."""
    return set(re.findall(r"\b(?:(?:reward|trainer|kube)_[a-z_]+|up(?=\{))", query))


@pytest.mark.parametrize("who", queries())
def test_a_query_asks_for_metrics_that_there_are(who: str, told: set[str]) -> None:
    """One that asks for none would never say anything."""
    names = asked(queries()[who])
    assert names
    assert names <= told | OF_OTHERS


def test_every_alert_has_a_row_in_the_handbook() -> None:
    """What it means and what to do; and no row is of an alert that is gone."""
    rows = set(re.findall(r"^\| `([A-Z][a-z]\w+)` \|", handbook(), flags=re.MULTILINE))
    assert rows == {rule["alert"] for rule in rules()}


def test_every_alert_says_how_urgent_it_is() -> None:
    """And in one line what has happened."""
    for rule in rules():
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["annotations"]["summary"]
        assert "for" in rule or "increase" in rule["expr"]


API = 'namespace="var-grpo",pod="brightness-api-{}",container="api",reward="brightness",version="1"'
SERIES = {
    "RewardQueueOld": {f"reward_queue_oldest_seconds{{{API.format(1)}}}": ("0+30x40", "50x40")},
    "RewardDeadLetters": {
        f"reward_dead_letters_total{{{API.format(1)}}}": ("0x20 1x20", "3x40"),
        f"reward_dead_letters_total{{{API.format(2)}}}": ("0x20 1x20", "3x40"),
    },
    "RewardErrorRate": {
        f'reward_requests_total{{{API.format(1)},status="200"}}': ("0+90x40", "0+96x40"),
        f'reward_requests_total{{{API.format(1)},status="503"}}': ("0+10x40", "0+4x40"),
    },
    "RewardQueueUnseen": {
        f"up{{{API.format(1)}}}": ("1x40", "1x40"),
        f'reward_queue_images{{{API.format(1)},state="waiting"}}': ("0x20 stale", "0x40"),
    },
    "RewardApiDown": {
        f"up{{{API.format(1)}}}": ("1x20 0x20", "1x20 0x1 1x20"),
        f'reward_queue_images{{{API.format(1)},state="waiting"}}': ("0x20 stale", "0x40"),
    },
    "TrainerStalled": {
        'trainer_last_step_timestamp_seconds{namespace="var-grpo",run="mini-bright"}': ("0+60x5 300x35", "0+60x40")
    },
    "TrainerNotStarted": {
        'kube_job_status_active{namespace="var-grpo",job_name="trainer"}': ("1x40", "1x40"),
        'trainer_step{namespace="var-grpo",run="mini-bright"}': ("_x40", "_x15 0x25"),
    },
}
"""For each alert, series by the minute that raise it within 40 minutes, and others beside that do not."""


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not on the PATH")
@pytest.mark.parametrize("raises", [True, False], ids=["raised", "silent"])
@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_is_raised_by_what_it_is_for(rule: dict[str, Any], raises: bool, tmp_path: Path) -> None:
    """As Prometheus's own tool computes it; the other alerts are silent in either case."""
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(spec()))
    series = [{"series": name, "values": values[0 if raises else 1]} for name, values in SERIES[rule["alert"]].items()]
    minute = {True: "31m", False: "39m"}[raises]
    checks = [
        {
            "expr": f'count(ALERTS{{alertstate="firing",alertname="{each["alert"]}"}}) or vector(0)',
            "eval_time": minute,
            "exp_samples": [{"labels": "{}", "value": int(raises and each["alert"] == rule["alert"])}],
        }
        for each in rules()
    ]
    test = {"interval": "1m", "input_series": series, "promql_expr_test": checks}
    content = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": [test]}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(content))
    command = ["promtool", "test", "rules", "test.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
