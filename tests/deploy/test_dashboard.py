"""The dashboard fits one screen and asks only for what is told; a real Prometheus, where there is one, answers it."""

import asyncio
import itertools
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from services.client import RewardClient
from tests.deploy import dashboard
from tests.deploy.compose_files import ROOT
from trainer.prometheus import Prometheus

NOT_YET = re.compile("redeliver|resubmission|dropped|dead_letters_total|status=~")
"""What a service that fares well has nothing to tell of in its first seconds, or zero."""


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """A free one, which the trainer's part is told to listen on."""
    free = dashboard.free_port()
    monkeypatch.setenv("TRAINER_METRICS_PORT", str(free))
    return free


def test_everything_is_on_one_screen() -> None:
    """Within the columns and rows of a screen, nothing on top of another, each number said once."""
    panels = dashboard.read()["panels"]
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= dashboard.COLUMNS, panel["title"]
        assert place["y"] + place["h"] <= dashboard.ROWS, panel["title"]
        assert panel["description"], panel["title"]
    for one, other in itertools.combinations([panel["gridPos"] for panel in panels], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    for key in ("id", "title"):
        assert len({panel[key] for panel in panels}) == len(panels)


def test_every_query_asks_for_what_is_told(port: int) -> None:
    """Names and labels are those of a real API and a real trainer."""
    told = dashboard.told(port)
    for query in dashboard.queries(dashboard.read()):
        wanted = list(dashboard.asked(query.expression))
        assert wanted, query
        for name, labels in wanted:
            assert name in told, query
            assert labels <= told[name], query
        for label in re.findall(r"\{\{(\w+)\}\}", query.legend):
            assert any(label in told[name] for name, _ in wanted), query


def test_a_query_for_nothing_is_found(port: int) -> None:
    """The check above would see it."""
    told = dashboard.told(port)
    assert "trainer_reward" in told
    assert "run" in told["trainer_reward"]
    ((name, labels),) = dashboard.asked('avg(trainer_rewards{run=~"$run", node="a"})')
    assert name not in told
    assert labels == {"run", "node"}


def test_variables_and_sources_are_those_that_are_provisioned() -> None:
    """Every panel asks the one source; the variables that queries use are there."""
    content = dashboard.read()
    sources = yaml.safe_load((dashboard.FOLDER / "provisioning/datasources/prometheus.yml").read_text("utf-8"))
    (uid,) = (source["uid"] for source in sources["datasources"])
    text = json.dumps(content)
    assert set(re.findall(r'"uid": "([^"]+)"', text)) == {uid, content["uid"]}
    used = {found for query in dashboard.queries(content) for found in re.findall(r"\$([a-z]+)", query.expression)}
    assert used == {variable["name"] for variable in content["templating"]["list"]}
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))["services"]["grafana"]
    providers = yaml.safe_load((dashboard.FOLDER / "provisioning/dashboards/var-grpo.yml").read_text("utf-8"))
    (folder,) = (provider["options"]["path"] for provider in providers["providers"])
    assert f"./services/compose/grafana/dashboards:{folder}:ro" in compose["volumes"]


@pytest.fixture
def reward() -> Iterator[str]:
    """The address of a real brightness service."""
    command = [sys.executable, "-m", "services", "serve", "brightness", "--port", "0", "--announce"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        try:
            yield str(json.loads(process.stdout.readline())["rewards"]["brightness"])
        finally:
            process.terminate()


@pytest.mark.slow
@pytest.mark.redis
@pytest.mark.skipif(not shutil.which("prometheus"), reason="there is no prometheus on the PATH")
def test_a_real_prometheus_answers_every_query(port: int, reward: str, tmp_path: Path) -> None:
    """With numbers, from a reward service that scores and a trainer's part that tells of steps."""
    ui = dashboard.free_port()
    scrape = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
        "scrape_configs": [
            {"job_name": name, "static_configs": [{"targets": [target]}]}
            for name, target in (("rewards", reward.removeprefix("http://")), ("trainer", f"127.0.0.1:{port}"))
        ],
    }
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(scrape))
    command = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    with (
        subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{ui}"], stderr=subprocess.DEVNULL) as process,
        closing(Prometheus(Path("runs/mine"), dashboard.run_settings(), 0)) as logger,
    ):
        try:
            for step in range(1, 11):
                asyncio.run(score(reward))
                logger.log(step, dict.fromkeys(dashboard.NUMBERS, 0.5))
                time.sleep(1)
            for query in dashboard.queries(dashboard.read()):
                result = ask(ui, dashboard.resolved(query.expression, "10s"))
                assert result or NOT_YET.search(query.expression), query
        finally:
            process.terminate()


async def score(url: str) -> None:
    """A batch of sixteen."""
    async with RewardClient(url) as client:
        await client.score(np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), np.uint8))


def ask(port: int, expression: str) -> list[Any]:
    """What a Prometheus on this machine answers to a query."""
    url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=10) as answer:
        content = json.load(answer)
    assert content["status"] == "success"
    assert not content.get("warnings")
    result: list[Any] = content["data"]["result"]
    return result
