"""Rules of docker-compose.yml that no schema knows: each function gives the faults it finds, one line each."""

import contextlib
import io
import re
from collections.abc import Iterator
from typing import Any

import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema
from jsonschema.validators import validator_for

from services.__main__ import parse_arguments
from services.roles.api import API_GRACE_S
from services.roles.worker import STUCK_AFTER_S
from services.settings import Settings
from services.settings import variables as variables_of_services
from tests.deploy.compose_files import (
    DOCKERFILES,
    OWN,
    ROOT,
    Object,
    load,
    of_role,
    role_of,
    seconds,
    services,
    size,
    stages,
)
from trainer.config import Config, ConfigError
from trainer.options import load_config, parse_overrides
from trainer.settings import Settings as TrainerSettings

Faults = Iterator[str]

PUBLISHED = {"redis", "prom/prometheus", "grafana/grafana"}
"""Images that are not built here."""
SLIM_WORKERS = {"brightness", "jpeg_compressibility:JpegCompressibility"}
"""Rewards whose workers need no torch; no API does."""
OF_OTHERS = re.compile(r"OMP_[A-Z_]+|PYTHONPATH|GF_[A-Z_]+")
"""Variables that are read by torch, by Python and by Grafana."""
MAY = {"setup": {"CHOWN"}, "trainer": {"SETUID", "SETGID"}}
"""Capabilities beyond none: to own what it makes, and to become who owns the run; these two begin as root."""
WEIGHTS = {"/weights"}
WRITES = {
    "setup": {"/runs", "/run/queue", "/trainer-weights"},
    "trainer": {"/runs", *WEIGHTS},
    "clip-worker": WEIGHTS,
    "aesthetic-worker": WEIGHTS,
    "prometheus": {"/prometheus"},
    "grafana": {"/var/lib/grafana"},
}
"""Where a volume may be written to."""
ONE_SHOTS = {"setup", "trainer"}
MADE_AT_START = {"./runs"}


def schema(document: Object) -> Faults:
    """The Compose Specification, unknown keys refused."""
    specification: Any = get_builtin_schema("vendor.compose-spec")  # a copy that comes with check-jsonschema
    for error in validator_for(specification)(specification).iter_errors(document):
        yield f"{error.json_path}: {error.message}"


def names(document: Object) -> Faults:
    """A service's name is a host's."""
    for name in services(document):
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name):
            yield f"{name}: no host can have this name: use small letters, digits and dashes (RFC 1123)"


def variables(document: Object) -> Faults:
    """Each variable is one that somebody reads; a secret has no value here; APIs and workers find Redis."""
    for name, service in services(document).items():
        role = role_of(service)
        known = known_variables(role)
        for variable, value in service.get("environment", {}).items():
            if variable not in known and not OF_OTHERS.fullmatch(variable):
                yield f"{name}: nobody reads the variable {variable}"
            if re.search(r"_TOKEN$|PASSWORD|SECRET|REDIS_URL", variable) and value:
                yield f"{name}: {variable} has a value in the file; it is a secret"
        if role in {"api", "worker"} and "REDIS_URL" not in " ".join(service.get("entrypoint", [])):
            yield f"{name}: REDIS_URL is not set"


def known_variables(role: str) -> set[str]:
    """The variables that the settings of a role read."""
    if role == "trainer":
        return {name.upper() for name in TrainerSettings.model_fields}
    return set(variables_of_services()) if role else set()


def builds(document: Object) -> dict[str, Object]:
    """How each image is built that is built here."""
    return {each["image"]: each["build"] for each in services(document).values() if "build" in each}


def images(document: Object) -> Faults:
    """Built here with one tag, by a stage that exists and with torch where it is needed; or published, with a tag."""
    built = builds(document)
    if len(tags := {image.rpartition(":")[2] for image in built}) > 1:
        yield f"the images built here have several tags: {', '.join(sorted(tags))}"
    for name, service in services(document).items():
        image, _, tag = service["image"].rpartition(":")
        if tag in {"", "latest"} or not image:
            yield f"{name}: {service['image']} has no tag of its own"
        if service["image"] not in built:
            if image not in PUBLISHED:
                yield f"{name}: {service['image']} is neither built here nor known"
            continue
        build = built[service["image"]]
        target = build.get("target", "")
        if ROOT / build["dockerfile"] not in DOCKERFILES or target not in stages(ROOT / build["dockerfile"]):
            yield f"{name}: there is no stage {target!r} in {build['dockerfile']}"
        expected = "trainer" if "trainer" in build["dockerfile"] else {"slim": "services-slim"}.get(target, "services")
        if image.rpartition("/")[2] != expected:
            yield f"{name}: the image {image} is built as {expected}"
        if service.get("pull_policy") != "never":
            yield f"{name}: an image that is built here would be asked of a registry"
        if role_of(service) == "worker" and target == "slim" and service["command"][1] not in SLIM_WORKERS:
            yield f"{name}: {image} has no torch"


def security(document: Object) -> Faults:
    """A root file system that is not written, no capability, no root, no port but on loopback, nothing of the host."""
    for name, service in services(document).items():
        if service.get("read_only") is not True:
            yield f"{name}: its root file system can be written"
        if service.get("cap_drop") != ["ALL"] or set(service.get("cap_add", [])) - MAY.get(name, set()):
            yield f"{name}: it keeps capabilities"
        if "no-new-privileges:true" not in service.get("security_opt", []):
            yield f"{name}: it may gain privileges"
        if str(service.get("user", "")).startswith("0") and name not in MAY:
            yield f"{name}: it runs as root"
        for key in ("privileged", "devices", "pid", "ipc", "userns_mode", "cgroup_parent"):
            if key in service:
                yield f"{name}: {key} opens the host to it"
        if service.get("network_mode") not in {None, "none"}:
            yield f"{name}: network_mode {service['network_mode']} opens the host to it"
        for port in service.get("ports", []):
            if not re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port):
                yield f"{name}: the port {port} is open to others than this machine"


def mounts(document: Object) -> Faults:
    """Every source is declared or in the repository; only a few places are written; memory disks are bounded."""
    declared = set(document.get("volumes", {}))
    used = set()
    for name, service in services(document).items():
        for volume in service.get("volumes", []):
            source, target, *mode = volume.split(":")
            if source.startswith((".", "/")):
                if source not in MADE_AT_START and not (ROOT / source).exists():
                    yield f"{name}: there is no {source}"
            else:
                used.add(source)
                if source not in declared:
                    yield f"{name}: the volume {source!r} is not declared"
            if mode != ["ro"] and target not in WRITES.get(name, set()):
                yield f"{name}: it may write to {target}"
        for disk in service.get("tmpfs", []):
            if "size=" not in disk:
                yield f"{name}: the memory disk {disk} has no size"
    for source in sorted(declared - used):
        yield f"the volume {source!r} is declared, and nobody uses it"


def bounds(document: Object) -> Faults:
    """Limits of processors, memory, processes and log; the queues fit into Redis, and Redis into its limit."""
    for name, service in services(document).items():
        limits = service.get("deploy", {}).get("resources", {}).get("limits", {})
        for what in ("cpus", "memory", "pids"):
            if what not in limits:
                yield f"{name}: no limit of {what}"
        if "max-size" not in service.get("logging", {}).get("options", {}):
            yield f"{name}: its log has no bound"
        for disk in service.get("tmpfs", []):
            found = re.search(r"size=(\w+)", disk)
            if found and "memory" in limits and size(found[1]) >= size(limits["memory"]):
                yield f"{name}: {disk} alone may fill its memory"
    redis = services(document)["redis"]
    command = redis["command"] if isinstance(redis["command"], str) else " ".join(redis["command"])
    if "--maxmemory-policy noeviction" not in command:
        yield "redis: it may evict images: --maxmemory-policy noeviction"
    memory = size((re.search(r"--maxmemory (\w+)", command) or ["", "0"])[1])
    queues = sum(int(each["environment"].get("REWARD_QUEUE_BYTES", 2**62)) for _, each in of_role(document, "api"))
    if not queues < memory:
        yield f"redis: --maxmemory is {memory} bytes, and the queues may hold {queues}"
    if not memory < size(redis["deploy"]["resources"]["limits"]["memory"]):
        yield "redis: --maxmemory is beyond the limit of its memory"


def order(document: Object) -> Faults:
    """What is waited for exists and can be healthy or end; whoever runs on is started again, and has time to stop."""
    every = services(document)
    for name, service in every.items():
        for other, wait in service.get("depends_on", {}).items():
            if other not in every:
                yield f"{name}: it waits for {other}, which there is not"
            elif wait["condition"] == "service_healthy" and not can_be_healthy(document, other):
                yield f"{name}: it waits for {other} to be healthy, and nothing tells whether it is"
            elif wait["condition"] == "service_completed_successfully" and other not in ONE_SHOTS:
                yield f"{name}: it waits for {other} to end, which it never does"
        policy = service.get("restart", "no")
        if policy != ("no" if name in ONE_SHOTS else "unless-stopped"):
            yield f"{name}: restart is {policy}"
        if role_of(service) in {"api", "worker"}:
            needed_s = max(API_GRACE_S, Settings.model_fields["score_timeout_s"].default + STUCK_AFTER_S)
            if seconds(service.get("stop_grace_period", "10s")) <= needed_s:
                yield f"{name}: stop_grace_period is not above the {needed_s:.0f} s that it may need"


def can_be_healthy(document: Object, name: str) -> bool:
    """Whether something says how a service does: the file, or the image."""
    service = services(document)[name]
    check = service.get("healthcheck", {})
    if check.get("disable") or "test" in check:
        return "test" in check
    build = builds(document).get(service["image"])
    if build is None:
        return False
    return any(line.startswith("HEALTHCHECK") for line in stages(ROOT / build["dockerfile"])[build.get("target", "")])


def networks(document: Object) -> Faults:
    """Those that are named are declared, and Redis has no way out."""
    declared = document.get("networks", {})
    for name, service in services(document).items():
        if service.get("network_mode") is None and not service.get("networks"):
            yield f"{name}: it is in Compose's default network, with everybody"
        for network in service.get("networks", []):
            if network not in declared:
                yield f"{name}: the network {network!r} is not declared"
    if not all((declared.get(network) or {}).get("internal") for network in services(document)["redis"]["networks"]):
        yield "redis: its network has a way out"


def commands(document: Object) -> Faults:
    """Our own commands are understood, and the trainer's rewards are what is served at their addresses."""
    served: dict[str, tuple[str, Object]] = {}
    for name, service in of_role(document, "api", "worker"):
        words = io.StringIO()
        try:
            with contextlib.redirect_stderr(words):
                options = parse_arguments(service["command"])
        except SystemExit:
            yield f"{name}: {' '.join(words.getvalue().split()[-12:])}"
            continue
        if options.role == "api":
            if options.host != "0.0.0.0":  # inside a container
                yield f"{name}: nobody reaches it on {options.host}"
            served[f"http://{name}:{options.port}"] = (options.name, service)
    if missing := {reward for reward, _ in served.values()} - {
        each["command"][1] for _, each in of_role(document, "worker")
    }:
        yield f"no worker scores {', '.join(sorted(missing))}"
    for name, service in of_role(document, "trainer"):
        try:
            config = trains(service)
        except ConfigError as error:
            yield f"{name}: {error}"
            continue
        for reward in (*config.rewards, *config.eval.rewards):
            there, api = served.get(str(reward.url), ("", {}))
            if there != reward.name and ":" not in there:  # module:Class has a name of its own
                yield f"{name}: {reward.name} is not served at {reward.url}"
            elif not set(api["networks"]) & set(service["networks"]):
                yield f"{name}: it shares no network with {reward.url}"


def trains(service: Object) -> Config:
    """What a trainer's command asks for.

    Raises:
        ConfigError: it is not understood.
    """
    command: list[str] = service["command"]
    recipe, *options = command[command.index("trainer.run") + 1 :]
    return load_config(recipe, parse_overrides(options))


def observed(document: Object) -> Faults:
    """Prometheus asks all that answer, on their ports, in a network it shares with them; Grafana asks Prometheus.

    It may ask for the services of the example, too: a name that DNS does not know is no target.
    """
    every, asked = services(document), scraped()
    for name, port in asked.items():
        if name not in every:
            if name not in services(load(OWN)):
                yield f"prometheus asks {name}, which there is not"
        elif not set(every[name].get("networks", [])) & set(every["prometheus"]["networks"]):
            yield f"prometheus shares no network with {name}"
        elif port != (9400 if role_of(every[name]) == "trainer" else 8000):
            yield f"prometheus asks {name} on port {port}"
    for name, service in of_role(document, "api", "trainer"):
        if name not in asked:
            yield f"prometheus does not ask {name}"
        if role_of(service) == "trainer" and "prometheus" not in trains(service).run.loggers:
            yield f"{name}: it tells Prometheus nothing: --run.loggers"
    for source in read_yaml("grafana/provisioning/datasources/prometheus.yml")["datasources"]:
        if source["url"] != "http://prometheus:9090":
            yield f"grafana asks {source['url']}"


def scraped() -> dict[str, int]:
    """Whom Prometheus asks, and on which port."""
    jobs = read_yaml("prometheus/prometheus.yml")["scrape_configs"]
    return {name: look["port"] for job in jobs for look in job["dns_sd_configs"] for name in look["names"]}


def read_yaml(name: str) -> Any:
    """A file of services/compose."""
    return yaml.safe_load((ROOT / "services" / "compose" / name).read_text("utf-8"))


RULES = (schema, names, variables, images, security, mounts, bounds, order, networks, commands, observed)
