"""docker-compose.yml and the Dockerfiles keep their rules, and each rule finds its fault."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from services.app import SURVEY_S
from tests.deploy import compose_rules, image_rules
from tests.deploy.compose_files import COMPOSE, DOCKERFILES, GPU, OWN, ROOT, Object, interpolate, load, merge

GONE = object()


@pytest.mark.parametrize("rule", compose_rules.RULES, ids=lambda rule: rule.__name__)
def test_the_compose_file_keeps_the_rule(rule: Callable[[Object], Any]) -> None:
    """With the values that it has where the environment says nothing."""
    assert list(rule(load(COMPOSE))) == []


@pytest.mark.parametrize("rule", compose_rules.RULES, ids=lambda rule: rule.__name__)
def test_both_files_keep_the_rule(rule: Callable[[Object], Any]) -> None:
    """What is for GPUs, laid over the other."""
    assert list(rule(merge(load(COMPOSE), load(GPU)))) == []


def test_the_gpu_file_reserves_gpus_for_models_and_brings_their_weights() -> None:
    """For the trainer and the workers that have a model, and for nobody else; what they fetch is kept."""
    both = merge(load(COMPOSE), load(GPU))["services"]
    reserved = {
        name
        for name, service in both.items()
        for device in service["deploy"]["resources"].get("reservations", {}).get("devices", [])
        if "gpu" in device["capabilities"]
    }
    assert reserved == {"trainer", "clip-worker", "aesthetic-worker"}
    for name in reserved:
        assert any(volume.endswith(":/weights") for volume in both[name]["volumes"])
    config = compose_rules.trains(both["trainer"])
    assert config.model.var.startswith("FoundationVision/var")
    assert config.run.device != "cpu"


def test_the_template_of_an_own_reward_fits() -> None:
    """It extends services that there are, its commands are understood, and its reward is what the trainer asks for."""
    own, every = load(OWN)["services"], load(COMPOSE)["services"]
    assert list(compose_rules.schema(load(OWN))) == []
    bases = {name: every[service["extends"]["service"]] for name, service in own.items() if "extends" in service}
    document = merge(load(COMPOSE), {"services": {name: merge(bases.get(name, {}), own[name]) for name in own}})
    both = document["services"]
    for name in bases:  # the port is marked as one that replaces the other's
        both[name]["ports"] = own[name].get("ports", [])
    served = {name for name, _ in compose_rules.of_role(document, "api")}
    assert served == {"brightness-api", "clip-api", "aesthetic-api", "own-api"}
    assert (ROOT / own["own-api"]["volumes"][0].split(":")[0] / "jpeg_compressibility.py").is_file()
    for rule in set(compose_rules.RULES) - {compose_rules.mounts}:
        assert list(rule(document)) == [], rule
    (asks,) = compose_rules.trains(both["trainer"]).rewards
    assert (asks.name, asks.url) == ("jpeg-compressibility", "http://own-api:8000")


class Fault(NamedTuple):
    """A change of one place that a rule must find.

    Attributes:
        rule: that finds it.
        says: words of what it says.
        path: keys and positions down to the place.
        value: what is there then; `GONE` for nothing.
    """

    rule: Callable[[Object], Any]
    says: str
    path: str
    value: object


R = compose_rules
API, WORKER, CLIP = "services.brightness-api", "services.brightness-worker", "services.clip-worker"
TRAINER = "services.trainer"
FAULTS = [
    Fault(R.schema, "colour", f"{API}.colour", "red"),
    Fault(R.schema, "read_only", f"{API}.read_only", []),
    Fault(R.schema, "condition", f"{API}.depends_on.redis.condition", "service_fine"),
    Fault(R.names, "no host", "services.Bright_API", {"image": "redis:7"}),
    Fault(R.variables, "nobody reads the variable REWARD_MAX_BACH", f"{API}.environment.REWARD_MAX_BACH", "64"),
    Fault(R.variables, "nobody reads the variable TRAINER_PORT", f"{TRAINER}.environment.TRAINER_PORT", "1"),
    Fault(R.variables, "it is a secret", f"{API}.environment.REWARD_TOKEN", "hunter2"),
    Fault(R.variables, "REDIS_URL is not set", f"{WORKER}.entrypoint", ["python", "-m", "services"]),
    Fault(R.images, "no tag of its own", f"{API}.image", "var-grpo/services-slim:latest"),
    Fault(R.images, "no tag of its own", "services.redis.image", "redis"),
    Fault(R.images, "neither built here nor known", "services.redis.image", "valkey:8"),
    Fault(R.images, "several tags", f"{TRAINER}.image", "var-grpo/trainer:0.0.9"),
    Fault(R.images, "there is no stage 'thin'", "services.setup.build.target", "thin"),
    Fault(R.images, "is neither built here", f"{CLIP}.image", "var-grpo/reward:0.1.0"),
    Fault(R.images, "is built as trainer", f"{TRAINER}.image", "var-grpo/reward:0.1.0"),
    Fault(R.images, "asked of a registry", f"{API}.pull_policy", GONE),
    Fault(R.images, "has no torch", "services.aesthetic-worker.image", "var-grpo/services-slim:0.1.0"),
    Fault(R.security, "root file system can be written", f"{API}.read_only", False),
    Fault(R.security, "keeps capabilities", f"{API}.cap_drop", GONE),
    Fault(R.security, "keeps capabilities", f"{API}.cap_add", ["CHOWN"]),
    Fault(R.security, "may gain privileges", f"{API}.security_opt", []),
    Fault(R.security, "runs as root", f"{WORKER}.user", "0:0"),
    Fault(R.security, "opens the host", f"{WORKER}.privileged", True),
    Fault(R.security, "opens the host", f"{WORKER}.network_mode", "host"),
    Fault(R.security, "open to others", f"{API}.ports.0", "8001:8000"),
    Fault(R.mounts, "there is no ./services/compose/none", "services.setup.volumes.0", "./services/compose/none:/a:ro"),
    Fault(R.mounts, "'queues' is not declared", f"{API}.volumes.0", "queues:/run/queue:ro"),
    Fault(R.mounts, "may write to /run/queue", f"{API}.volumes.0", "queue:/run/queue"),
    Fault(
        R.mounts, "may write to /var/run/docker.sock", f"{API}.volumes.0", "/var/run/docker.sock:/var/run/docker.sock"
    ),
    Fault(R.mounts, "has no size", f"{API}.tmpfs.0", "/tmp"),
    Fault(R.mounts, "nobody uses it", "volumes.spare", {}),
    Fault(R.bounds, "no limit of memory", f"{API}.deploy.resources.limits.memory", GONE),
    Fault(R.bounds, "no limit of pids", "services.redis.deploy.resources.limits.pids", GONE),
    Fault(R.bounds, "its log has no bound", f"{API}.logging", GONE),
    Fault(R.bounds, "may fill its memory", f"{API}.tmpfs.0", "/tmp:size=4g"),
    Fault(R.bounds, "may evict", "services.redis.command", "redis-server --maxmemory 640mb"),
    Fault(R.bounds, "the queues may hold", f"{API}.environment.REWARD_QUEUE_BYTES", "536870912"),
    Fault(R.bounds, "the queues may hold", "services.clip-api.environment.REWARD_QUEUE_BYTES", GONE),
    Fault(R.bounds, "beyond the limit", "services.redis.deploy.resources.limits.memory", "512M"),
    Fault(R.order, "which there is not", f"{API}.depends_on.valkey", {"condition": "service_started"}),
    Fault(R.order, "nothing tells", "services.redis.healthcheck", {"disable": True}),
    Fault(R.order, "never does", f"{API}.depends_on.redis.condition", "service_completed_successfully"),
    Fault(R.order, "restart is no", f"{API}.restart", GONE),
    Fault(R.order, "restart is always", f"{TRAINER}.restart", "always"),
    Fault(R.order, "stop_grace_period", f"{WORKER}.stop_grace_period", "10s"),
    Fault(R.networks, "default network", f"{API}.networks", GONE),
    Fault(R.networks, "'back' is not declared", f"{API}.networks", ["back"]),
    Fault(R.networks, "a way out", "networks.queue", {}),
    Fault(R.commands, "unrecognized arguments: --prot", f"{API}.command", ["api", "brightness", "--prot", "1"]),
    Fault(R.commands, "nobody reaches it", f"{API}.command.3", "127.0.0.1"),
    Fault(R.commands, "no worker scores mini-clip", f"{CLIP}.command.1", "clip"),
    Fault(R.commands, "brightness is not served at", f"{TRAINER}.command.4", "--rewards.0.url=http://clip-api:8000"),
    Fault(R.commands, "is not served at", f"{API}.command.5", "8080"),
    Fault(R.commands, "run.dri", f"{TRAINER}.command.6", "--run.dri=/runs"),
    Fault(R.commands, "shares no network", f"{API}.networks", ["queue"]),
    Fault(R.observed, "asks brightness-api, which there is not", API, GONE),
    Fault(R.observed, "shares no network with brightness-api", f"{API}.networks", ["queue"]),
    Fault(R.observed, "asks trainer on port 9400", f"{TRAINER}.command", ["api", "brightness"]),
    Fault(R.observed, "does not ask dark-api", "services.dark-api", {"command": ["api", "dark"]}),
    Fault(R.observed, "tells Prometheus nothing", f"{TRAINER}.command.7", "--run.loggers=[tensorboard]"),
]


def change(document: Object, path: str, value: object) -> Object:
    """A copy of the file with one place changed."""
    changed: Any = copy.deepcopy(document)
    *way, last = path.split(".")
    place = changed
    for step in way:
        place = place[int(step)] if isinstance(place, list) else place[step]
    if isinstance(place, list):
        place[int(last)] = value
    elif value is GONE:
        del place[last]
    else:
        place[last] = value
    return changed


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.rule.__name__}-{fault.path}-{fault.says}")
def test_each_rule_finds_its_fault(fault: Fault) -> None:
    """And says which."""
    found = list(fault.rule(change(load(COMPOSE), fault.path, fault.value)))
    assert any(fault.says in line for line in found), found


def test_a_grafana_that_asks_elsewhere_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its data source is a file of its own."""
    real = compose_rules.read_yaml

    def planted(name: str) -> Any:
        content = real(name)
        for source in content.get("datasources", []):
            source["url"] = "http://prometheus:9091"
        return content

    monkeypatch.setattr(compose_rules, "read_yaml", planted)
    assert list(R.observed(load(COMPOSE))) == ["grafana asks http://prometheus:9091"]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.parent.name)
@pytest.mark.parametrize("rule", image_rules.RULES, ids=lambda rule: rule.__name__)
def test_the_dockerfiles_keep_the_rule(rule: Callable[[Path], Any], file: Path) -> None:
    """Whatever their last stages are."""
    assert list(rule(file)) == []


@pytest.mark.parametrize(
    ("rule", "says", "old", "new"),
    [
        (
            image_rules.bases,
            "syntax",
            "FROM python:3.11-slim AS uv",
            "# syntax=docker/dockerfile:1\nFROM python:3.11-slim AS uv",
        ),
        (image_rules.bases, "built from alpine", "FROM python:3.11-slim AS uv", "FROM alpine AS uv"),
        (image_rules.final, "runs as root", "USER 10001:10001", ""),
        (image_rules.final, "runs as app", "USER 10001:10001", "USER app"),
        (image_rules.final, "no HEALTHCHECK", "HEALTHCHECK ", "STOPSIGNAL SIGTERM\nRUN true "),
        (image_rules.final, "apt-get in the last stage", "RUN useradd", "RUN apt-get update && useradd"),
        (image_rules.final, "may bring anything", "COPY services services", "COPY . ."),
        (image_rules.final, "there is no service", "COPY services services", "COPY service services"),
        (image_rules.packages, "not held to hashes", "--require-hashes ", ""),
        (
            image_rules.packages,
            "machine's business",
            "--require-hashes",
            "--require-hashes --index-url https://example.org/simple",
        ),
        (image_rules.packages, "a secret", "USER 10001:10001", "ENV REWARD_TOKEN=hunter2\nUSER 10001:10001"),
        (image_rules.named, "packages: jinja2 of pyproject.toml", " jinja2 ", " "),
        (
            *(image_rules.named, "slim-packages: requests is not", "FROM uv AS slim-packages\nRUN for name in "),
            "FROM uv AS slim-packages\nRUN for name in requests ",
        ),
    ],
)
def test_each_rule_of_the_dockerfiles_finds_its_fault(
    tmp_path: Path, rule: Callable[[Path], Any], says: str, old: str, new: str
) -> None:
    """In the services' file, one place changed."""
    text = DOCKERFILES[0].read_text("utf-8")
    assert old in text
    file = tmp_path / "Dockerfile"
    file.write_text(text.replace(old, new))
    assert any(says in line for line in rule(file)), list(rule(file))


def test_both_dockerfiles_install_the_same_packages() -> None:
    """The two large images share the layer, which is most of them."""
    first, second = (
        path.read_text("utf-8").partition("FROM uv AS packages")[2].partition("\nFROM ")[0] for path in DOCKERFILES
    )
    assert first == second
    assert "torch" in first


def test_variables_are_resolved_as_compose_does() -> None:
    """An empty one counts as none after `:-`; two dollars are one."""
    assert interpolate("${A:-b}-${C:-}-$$x", {"A": ""}) == "b--$x"
    assert interpolate("${A:-b}", {"A": "c"}) == "c"


def alerts(file: Any) -> dict[str, Any]:
    """What raises each of a file's alerts, and how urgent it is; a cluster's label apart."""
    return {
        rule["alert"]: (
            " ".join(rule["expr"].replace("namespace, ", "").split())
            if rule["alert"] not in {"RewardQueueUnseen", "RewardApiDown"}  # targets have other labels in a cluster
            else "",
            rule.get("for"),
            rule["labels"],
        )
        for group in file["groups"]
        for rule in group["rules"]
    }


def of_cluster() -> Any:
    """The rules that a cluster's Prometheus is told."""
    return yaml.safe_load((ROOT / "k8s/overlays/monitoring/alerts.yaml").read_text("utf-8"))["spec"]


def test_the_same_alerts_are_in_both_places() -> None:
    """What a cluster's Prometheus is told, and what Compose's is."""
    cluster = alerts(of_cluster())
    del cluster["TrainerNotStarted"]  # by kube-state-metrics
    assert alerts(compose_rules.read_yaml("prometheus/alerts.yml")) == cluster


@pytest.mark.parametrize(
    ("key", "value"), [("expr", "max by (reward) (reward_queue_oldest_seconds) > 90"), ("for", "3m"), ("labels", {})]
)
def test_an_alert_that_differs_is_found(key: str, value: object) -> None:
    """By its expression, its time or its labels."""
    planted = of_cluster()
    planted["groups"][0]["rules"][0][key] = value
    assert alerts(planted) != alerts(of_cluster())


def test_prometheus_waits_for_an_api_whose_redis_hangs() -> None:
    """It tells of itself before it would count as down, with half of the time to spare."""
    timeout = compose_rules.read_yaml("prometheus/prometheus.yml")["global"]["scrape_timeout"]
    assert float(timeout.removesuffix("s")) >= 2 * SURVEY_S


def test_the_guide_has_a_row_for_each_alert() -> None:
    """What to look at, and what to do."""
    guide = (ROOT / "docs" / "deploy.md").read_text("utf-8")
    for alert in alerts(compose_rules.read_yaml("prometheus/alerts.yml")):
        assert re.search(rf"^\|.*`{alert}`", guide, flags=re.MULTILINE), alert


def test_the_build_context_is_what_is_named() -> None:
    """All is left out but what the Dockerfiles copy: no secret, run or cache of the folder gets into an image."""
    lines = [line for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    let_in = {line[1:] for line in lines if line.startswith("!")}
    assert let_in == {"pyproject.toml", "requirements.lock", "LICENSE", "services", "trainer"}
    last = max(position for position, line in enumerate(lines) if line.startswith("!"))
    assert {"**/__pycache__", "**/.env*", "services/compose"} <= set(lines[last + 1 :])
