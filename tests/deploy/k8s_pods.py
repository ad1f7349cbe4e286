"""Rules of what a pod is given: each function gives the faults it finds, one line each."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from services.roles.api import API_GRACE_S
from services.roles.worker import STUCK_AFTER_S
from services.settings import Settings, variables
from tests.deploy.k8s_links import Faults
from tests.deploy.k8s_manifests import (
    Object,
    amount,
    component_of,
    containers_of,
    every_container,
    find,
    named,
    of_kind,
    pod_of,
    workloads,
)
from trainer.settings import Settings as TrainerSettings

BUILT = {
    "services": Path("services/Dockerfile"),
    "services-slim": Path("services/Dockerfile"),  # no torch
    "trainer": Path("trainer/Dockerfile"),
}
"""Images of this repository: `var-grpo/…`, each with the file that it is built from."""
SLIM_WORKERS = {"brightness"}
"""Rewards whose workers need no torch; no API does."""
PUBLISHED = {"redis:7-alpine"}
"""The one image that is not built here."""
OF_LIBRARIES = {
    "OMP_NUM_THREADS": "torch: threads of a CPU; it does not see the limit of a container",
    "PYTHONPATH": "Python: where a reward of one's own lies",
}
"""Variables that are read by others than our settings, with who does."""


def resources(objects: Sequence[Object]) -> Faults:
    """Containers ask for CPU and memory and are bounded in both, requests within limits, memory disks within memory."""
    for where, workload, container in every_container(objects):
        given = container.get("resources", {})
        requests, limits = given.get("requests", {}), given.get("limits", {})
        for what in ("cpu", "memory"):
            if what not in requests or what not in limits:
                yield f"{where}: no request or no limit of {what}"
        for what in requests:
            if what in limits and amount(requests[what]) > amount(limits[what]):
                yield f"{where}: asks for {what} {requests[what]}, and its limit is {limits[what]}"
        if requests.get("nvidia.com/gpu") != limits.get("nvidia.com/gpu"):
            yield f"{where}: GPUs are not shared, so request and limit are one"
        mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
        for volume in pod_of(workload)["spec"].get("volumes", []):
            disk = volume.get("emptyDir")
            if disk is not None and "sizeLimit" not in disk:
                yield f"{named(workload)}: the volume {volume['name']!r} has no sizeLimit"
                continue
            in_memory = disk is not None and disk.get("medium") == "Memory" and volume["name"] in mounts
            if in_memory and amount(disk["sizeLimit"]) >= amount(limits["memory"]):
                yield f"{where}: {volume['name']!r} alone may fill its memory limit"


def environment(objects: Sequence[Object]) -> Faults:
    """Each variable is one that our settings or a library reads, and none that a role needs is missing."""
    for where, workload, container in every_container(objects):
        component = component_of(workload)
        given = variables_of(objects, container)
        known = _known(component)
        for name in given:
            if name not in known and name not in OF_LIBRARIES:
                yield f"{where}: nobody reads the variable {name}"
        if component in {"api", "worker"} and not given.get("REDIS_URL") and "REDIS_URL" not in _required(container):
            yield f"{where}: REDIS_URL is not set"
        for name in {variable["name"] for variable in container.get("env", [])}:
            if [variable["name"] for variable in container["env"]].count(name) > 1:
                yield f"{where}: {name} is set twice"


def variables_of(objects: Sequence[Object], container: Object) -> dict[str, str]:
    """A container's variables and their values; where a Secret may bring one, that of the ConfigMap, or nothing."""
    given: dict[str, str] = {}
    for source in container.get("envFrom", []):
        given |= find(objects, "ConfigMap", source["configMapRef"]["name"])["data"]
    for variable in container.get("env", []):
        given.setdefault(variable["name"], "")
        if "value" in variable:
            given[variable["name"]] = variable["value"]
    return given


def _required(container: Object) -> set[str]:
    """The variables of Secrets without which the container does not start."""
    sources = {variable["name"]: variable.get("valueFrom", {}) for variable in container.get("env", [])}
    return {
        name for name, source in sources.items() if not source.get("secretKeyRef", {"optional": True}).get("optional")
    }


def _known(component: str) -> set[str]:
    """The variables that the settings of a role read."""
    if component in {"api", "worker"}:
        return set(variables())
    return {name.upper() for name in TrainerSettings.model_fields} if component == "trainer" else set()


def images(objects: Sequence[Object]) -> Faults:
    """Every image is built here or the one that is not, and those built here have one tag, which is not `latest`."""
    tags: set[str] = set()
    for where, workload, container in every_container(objects):
        image = container["image"]
        if image in PUBLISHED:
            continue
        name, _, tag = image.rpartition(":")
        if not name.endswith(tuple(f"var-grpo/{role}" for role in BUILT)):
            yield f"{where}: {image} is not built here"
        if tag in {"", "latest"}:
            yield f"{where}: {image} has no tag of its own"
        if name.endswith("-slim") and component_of(workload) == "worker" and container["args"][0] not in SLIM_WORKERS:
            yield f"{where}: {image} has no torch"
        tags.add(tag)
        if container.get("imagePullPolicy") != "IfNotPresent":
            yield f"{where}: an image that was loaded by hand would be looked for in a registry"
    if len(tags) > 1:
        yield f"the images built here have several tags: {', '.join(sorted(tags))}"


def security(objects: Sequence[Object]) -> Faults:
    """What the restricted standard asks of a pod, a root file system that is not written, and no token."""
    namespaces = of_kind(objects, "Namespace")
    for namespace in namespaces:
        if namespace["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce") != "restricted":
            yield f"{named(namespace)}: it does not enforce the restricted standard"
    for account in of_kind(objects, "ServiceAccount"):
        if account.get("automountServiceAccountToken") is not False:
            yield f"{named(account)}: it hands out a token"
    for workload in workloads(objects):
        yield from _pod_security(workload)


def _pod_security(workload: Object) -> Faults:
    spec = pod_of(workload)["spec"]
    security_ = spec.get("securityContext", {})
    if security_.get("runAsNonRoot") is not True or not security_.get("runAsUser"):
        yield f"{named(workload)}: it may run as root"
    if security_.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield f"{named(workload)}: no seccomp profile"
    if spec.get("automountServiceAccountToken") is not False or spec.get("enableServiceLinks") is not False:
        yield f"{named(workload)}: it is given a token, or the variables of services"
    if {"hostNetwork", "hostPID", "hostIPC"} & set(spec) or any("hostPath" in v for v in spec.get("volumes", [])):
        yield f"{named(workload)}: it reaches into its node"
    for container in containers_of(workload):
        own = container.get("securityContext", {})
        allowed = {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        for key, value in allowed.items():
            if own.get(key) != value:
                yield f"{named(workload)}, container {container['name']}: {key} is not {value}"


def times(objects: Sequence[Object]) -> Faults:
    """The grace is longer than preStop and drain, models have time to load, and no probe of life asks the queue."""
    for workload in workloads(objects):
        grace_s = pod_of(workload)["spec"].get("terminationGracePeriodSeconds", 30)
        for container in containers_of(workload, also_first=False):
            where = f"{named(workload)}, container {container['name']}"
            needed_s = _pre_stop_s(container) + _drain_s(component_of(workload), objects, container)
            if not grace_s > needed_s:
                yield f"{where}: {grace_s} s of grace, and preStop and drain may take {needed_s:g} s"
            if component_of(workload) in {"api", "worker"}:
                yield from _probes(where, component_of(workload), container)


def _pre_stop_s(container: Object) -> float:
    command = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
    assert command[0] == "sleep", command
    return float(command[1])


def _drain_s(component: str, objects: Sequence[Object], container: Object) -> float:
    """Seconds from SIGTERM to the end of the process, at most."""
    if component == "api":
        return API_GRACE_S
    if component == "worker":
        variables = variables_of(objects, container)
        default = str(Settings.model_fields["score_timeout_s"].default)
        return float(variables.get("REWARD_SCORE_TIMEOUT_S", default)) + STUCK_AFTER_S
    given = [each.partition("=")[2] for each in container.get("args", []) if each.startswith("--shutdown-timeout")]
    return float(given[0]) if given else 10.0


def _probes(where: str, component: str, container: Object) -> Iterator[str]:
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        if name not in container:
            yield f"{where}: no {name}"
    asks = str(container.get("livenessProbe")) + str(container.get("readinessProbe"))
    if "readyz" in asks or "redis" in asks.lower() or "metrics" in asks:
        yield f"{where}: a probe of life, or of readiness after the start, asks the queue"
    start = container.get("startupProbe", {})
    least_s = {"api": 600, "worker": 1800}[component]
    if start.get("periodSeconds", 10) * start.get("failureThreshold", 3) < least_s:
        yield f"{where}: less than {least_s} s to start in"
    if component == "api" and not _pre_stop_s(container):
        yield f"{where}: without a pause before it stops, requests still come when it no longer listens"


def queue_memory(objects: Sequence[Object]) -> Faults:
    """All queues at their bound fit into Redis's maxmemory, that into its container, and what it saves on its disk."""
    workers = [each for each in workloads(objects) if component_of(each) == "worker"]
    bounds = [
        float(variables_of(objects, containers_of(each)[0]).get("REWARD_QUEUE_BYTES", _default("queue_bytes")))
        for each in workers
    ]
    redis = find(objects, "StatefulSet", "redis")
    (container,) = containers_of(redis)
    most = _redis_bytes(container["args"][container["args"].index("--maxmemory") + 1])
    disk = amount(redis["spec"]["volumeClaimTemplates"][0]["spec"]["resources"]["requests"]["storage"])
    limit = amount(container["resources"]["limits"]["memory"])
    if not sum(bounds) * 1.1 < most:
        yield f"queues of {sum(bounds):.0f} bytes do not fit into Redis's maxmemory of {most:.0f}"
    if not most * 1.25 < limit:
        yield f"Redis's maxmemory of {most:.0f} leaves no room in its container's {limit:.0f}"
    if not most * 1.25 < disk:
        yield f"Redis's maxmemory of {most:.0f} leaves no room on its disk of {disk:.0f}"


def _default(field: str) -> float:
    return float(Settings.model_fields[field].default)


def _redis_bytes(text: str) -> float:
    """Redis's own units: 1mb is 1024 × 1024."""
    units: Mapping[str, int] = {"kb": 2**10, "mb": 2**20, "gb": 2**30}
    return float(text[:-2]) * units[text[-2:]]
