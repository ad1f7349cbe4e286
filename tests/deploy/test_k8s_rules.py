"""What neither a schema nor a linter sees of the manifests: that they fit together; each rule finds its fault."""

import copy
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest

from tests.deploy import k8s_links, k8s_pods, k8s_run
from tests.deploy.k8s_manifests import ROOT, SETS, Object, find, kustomize, objects_of

Rule = Callable[[Sequence[Object]], Any]
RULES: tuple[Rule, ...] = (
    *(k8s_links.names, k8s_links.selectors, k8s_links.ports, k8s_links.policy_ports, k8s_links.targets),
    *(k8s_links.references, k8s_links.network),
    *(k8s_pods.resources, k8s_pods.environment, k8s_pods.images, k8s_pods.security, k8s_pods.times),
    k8s_pods.queue_memory,
    *(k8s_run.commands, k8s_run.run, k8s_run.failures, k8s_run.modules),
)
needs_kustomize = pytest.mark.skipif(not kustomize(), reason="neither kubectl nor kustomize is on the PATH")
every_set = pytest.mark.parametrize(
    "name", [each if each == "base" else pytest.param(each, marks=needs_kustomize) for each in SETS]
)
objects = functools.cache(objects_of)


@every_set
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_manifests_keep_the_rule(rule: Rule, name: str) -> None:
    """Each rule, in whatever was applied."""
    assert list(rule(objects(name))) == []


class Fault(NamedTuple):
    """A change of one place that a rule must find.

    Attributes:
        rule: that finds it.
        says: words of what it says.
        kind, name: of the object.
        path: keys and positions down to the place.
        value: what is there then; `GONE` for nothing.
    """

    rule: Rule
    says: str
    kind: str
    name: str
    path: str
    value: object


GONE = object()
API, WORKER, REDIS, JOB = "brightness-api", "brightness-worker", "redis", "trainer"
POD = "spec.template.spec"
CONTAINER = f"{POD}.containers.0"
FAULTS = [
    Fault(k8s_links.names, "DNS-1123", "Deployment", API, "metadata.name", "Brightness_API"),
    Fault(k8s_links.names, "begins with a letter", "Service", "redis", "metadata.name", "7redis"),
    Fault(k8s_links.names, "stands twice", "Deployment", API, "metadata.name", "clip-api"),
    Fault(k8s_links.names, "namespace", "ConfigMap", "reward-settings", "metadata.namespace", "default"),
    Fault(k8s_links.names, "15 characters", "Deployment", API, f"{CONTAINER}.ports.0.name", "the-port-of-http"),
    Fault(k8s_links.names, "'API' is no DNS-1123", "Deployment", API, f"{CONTAINER}.name", "API"),
    Fault(k8s_links.selectors, "matches no pod", "Service", "brightness", "spec.selector", {"app": "brightness"}),
    Fault(k8s_links.selectors, "own pods", "Deployment", API, "spec.selector.matchLabels", {"app": "brightness"}),
    Fault(
        *(k8s_links.selectors, "pods of others", "Deployment", API, "spec.selector.matchLabels"),
        {"app.kubernetes.io/component": "api"},
    ),
    Fault(k8s_links.selectors, "matches no pod", "PodDisruptionBudget", API, "spec.selector.matchLabels", {"a": "b"}),
    Fault(
        *(k8s_links.selectors, "spread", "Deployment", API, f"{POD}.topologySpreadConstraints.0.labelSelector"),
        {"matchLabels": {"a": "b"}},
    ),
    Fault(k8s_links.ports, "target port", "Service", "brightness", "spec.ports.0.targetPort", 8080),
    Fault(k8s_links.ports, "target port", "Service", "brightness", "spec.ports.0.targetPort", "http"),
    Fault(k8s_links.ports, "readinessProbe", "Deployment", API, f"{CONTAINER}.readinessProbe.httpGet.port", 80),
    Fault(k8s_links.ports, "names no port", "PodMonitor", "trainer", "spec.podMetricsEndpoints.0.port", "web"),
    Fault(
        *(k8s_links.policy_ports, "no pod opens", "NetworkPolicy", "trainer-to-apis"),
        *("spec.egress.0.ports.0.port", 80),
    ),
    Fault(
        *(k8s_links.policy_ports, "no pod opens", "NetworkPolicy", "metrics-from-prometheus"),
        *("spec.ingress.0.ports.0.port", 80),
    ),
    Fault(k8s_links.targets, "there is no", "HorizontalPodAutoscaler", API, "spec.scaleTargetRef.name", "brightness"),
    Fault(k8s_links.targets, "scales workers", "HorizontalPodAutoscaler", API, "spec.scaleTargetRef.name", WORKER),
    Fault(k8s_links.targets, "exceeds", "HorizontalPodAutoscaler", API, "spec.minReplicas", 7),
    Fault(k8s_links.targets, "exceeds", "ScaledObject", WORKER, "spec.maxReplicaCount", -1),
    Fault(k8s_links.targets, "undo", "Deployment", API, "spec.replicas", 2),
    Fault(k8s_links.targets, "scaled by another", "ScaledObject", WORKER, "spec.scaleTargetRef.name", "clip-worker"),
    Fault(k8s_links.targets, "drained", "PodDisruptionBudget", API, "spec.maxUnavailable", 0),
    Fault(k8s_links.references, "no account", "Deployment", API, f"{POD}.serviceAccountName", "api"),
    Fault(
        *(k8s_links.references, "no ConfigMap", "Deployment", API),
        *(f"{CONTAINER}.envFrom.0.configMapRef.name", "settings"),
    ),
    Fault(
        *(k8s_links.references, "no Secret", "Deployment", API),
        *(f"{CONTAINER}.env.0.valueFrom.secretKeyRef.name", "redis"),
    ),
    Fault(
        *(k8s_links.references, "has no", "Deployment", API),
        *(f"{CONTAINER}.env.0.valueFrom.secretKeyRef.key", "password"),
    ),
    Fault(k8s_links.references, "no volume", "Deployment", API, f"{CONTAINER}.volumeMounts.0.name", "temporary"),
    Fault(k8s_links.references, "mounted nowhere", "Deployment", API, f"{CONTAINER}.volumeMounts", []),
    Fault(k8s_links.references, "no claim", "PersistentVolumeClaim", "runs", "metadata.name", "results"),
    Fault(
        k8s_links.network, "no NetworkPolicy denies", "NetworkPolicy", "default-deny", "spec.policyTypes", ["Ingress"]
    ),
    Fault(
        *(k8s_links.network, "takes no pod", "NetworkPolicy", "trainer-to-apis", "spec.podSelector"),
        {"matchLabels": {"app": "trainer"}},
    ),
    Fault(
        *(
            k8s_links.network,
            "no pod is the peer",
            "NetworkPolicy",
            "trainer-to-apis",
            "spec.egress.0.to.0.podSelector",
        ),
        {"matchLabels": {"app": "api"}},
    ),
    Fault(
        *(k8s_links.network, "no pod is the peer", "NetworkPolicy", "dns", "spec.egress.0.to.0.namespaceSelector"),
        {},
    ),
    Fault(k8s_links.network, "open to everybody", "NetworkPolicy", "trainer-to-apis", "spec.egress.0.to", []),
    Fault(k8s_links.network, "policyTypes", "NetworkPolicy", "trainer-to-apis", "spec.policyTypes", ["Ingress"]),
    Fault(k8s_pods.resources, "asks for", "Deployment", API, f"{CONTAINER}.resources.requests.memory", "1Gi"),
    Fault(k8s_pods.resources, "no limit", "Deployment", API, f"{CONTAINER}.resources.limits.cpu", GONE),
    Fault(k8s_pods.resources, "GPUs", "Job", JOB, f"{CONTAINER}.resources.requests", {"nvidia.com/gpu": 4}),
    Fault(k8s_pods.resources, "sizeLimit", "Deployment", API, f"{POD}.volumes.0.emptyDir", {}),
    Fault(k8s_pods.resources, "fill its memory", "Job", JOB, f"{CONTAINER}.resources.limits.memory", "1Gi"),
    Fault(
        *(k8s_pods.environment, "REWARD_MAX_BACH", "ConfigMap", "reward-settings"),
        *("data.REWARD_MAX_BACH", "64"),
    ),
    Fault(k8s_pods.environment, "REDIS_URL is not set", "ConfigMap", "reward-settings", "data.REDIS_URL", GONE),
    Fault(k8s_pods.environment, "nobody reads", "Job", JOB, f"{CONTAINER}.env.0.name", "TOKEN"),
    Fault(k8s_pods.environment, "set twice", "Deployment", API, f"{CONTAINER}.env.1.name", "REDIS_URL"),
    Fault(k8s_pods.images, "not built here", "Deployment", API, f"{CONTAINER}.image", "var-grpo/brightness:0.1.0"),
    Fault(k8s_pods.images, "not built here", "StatefulSet", REDIS, f"{CONTAINER}.image", "redis:latest"),
    Fault(k8s_pods.images, "several tags", "Deployment", API, f"{CONTAINER}.image", "var-grpo/services:0.2.0"),
    Fault(
        k8s_pods.images, "no torch", "Deployment", "clip-worker", f"{CONTAINER}.image", "var-grpo/services-slim:0.1.0"
    ),
    Fault(k8s_pods.images, "no tag", "Deployment", API, f"{CONTAINER}.image", "var-grpo/services:latest"),
    Fault(k8s_pods.images, "registry", "Deployment", API, f"{CONTAINER}.imagePullPolicy", "Always"),
    Fault(
        *(k8s_pods.security, "restricted", "Namespace", "var-grpo", "metadata.labels"),
        {"pod-security.kubernetes.io/enforce": "baseline"},
    ),
    Fault(k8s_pods.security, "hands out a token", "ServiceAccount", "trainer", "automountServiceAccountToken", True),
    Fault(k8s_pods.security, "as root", "Job", JOB, f"{POD}.securityContext.runAsNonRoot", GONE),
    Fault(k8s_pods.security, "seccomp", "Job", JOB, f"{POD}.securityContext.seccompProfile", GONE),
    Fault(k8s_pods.security, "variables of services", "Job", JOB, f"{POD}.enableServiceLinks", GONE),
    Fault(k8s_pods.security, "its node", "Job", JOB, f"{POD}.hostIPC", True),
    Fault(k8s_pods.security, "readOnly", "Job", JOB, f"{CONTAINER}.securityContext.readOnlyRootFilesystem", False),
    Fault(k8s_pods.times, "grace", "Deployment", API, f"{POD}.terminationGracePeriodSeconds", 35),
    Fault(k8s_pods.times, "grace", "Deployment", WORKER, f"{POD}.terminationGracePeriodSeconds", GONE),
    Fault(k8s_pods.times, "grace", "ConfigMap", "reward-settings", "data.REWARD_SCORE_TIMEOUT_S", "120"),
    Fault(k8s_pods.times, "grace", "Job", JOB, f"{POD}.terminationGracePeriodSeconds", 60),
    Fault(k8s_pods.times, "asks the queue", "Deployment", API, f"{CONTAINER}.livenessProbe.httpGet.path", "/readyz"),
    Fault(k8s_pods.times, "to start in", "Deployment", WORKER, f"{CONTAINER}.startupProbe.failureThreshold", 3),
    Fault(k8s_pods.times, "no livenessProbe", "Deployment", WORKER, f"{CONTAINER}.livenessProbe", GONE),
    Fault(k8s_pods.times, "no longer listens", "Deployment", API, f"{CONTAINER}.lifecycle", GONE),
    Fault(k8s_pods.queue_memory, "do not fit", "ConfigMap", "reward-settings", "data.REWARD_QUEUE_BYTES", "536870912"),
    Fault(k8s_pods.queue_memory, "container", "StatefulSet", REDIS, f"{CONTAINER}.args.1", "1gb"),
    Fault(
        *(k8s_pods.queue_memory, "on its disk", "StatefulSet", REDIS),
        *("spec.volumeClaimTemplates.0.spec.resources.requests.storage", "512Mi"),
    ),
    Fault(k8s_run.commands, "the command is", "Deployment", API, f"{CONTAINER}.command", ["python", "services"]),
    Fault(k8s_run.commands, "the command is", "Deployment", WORKER, f"{CONTAINER}.command.2", "exec true > /tmp/ready"),
    Fault(k8s_run.commands, "does not take", "Deployment", API, f"{CONTAINER}.args.2", "--hots"),
    Fault(k8s_run.commands, "looked for", "Deployment", API, f"{CONTAINER}.args.5", "8080"),
    Fault(k8s_run.commands, "no reward is named", "Deployment", API, f"{CONTAINER}.args.1", "brigthness"),
    Fault(k8s_run.commands, "different rewards", "Deployment", WORKER, f"{CONTAINER}.args.0", "clip"),
    Fault(k8s_run.commands, "announces", "Deployment", WORKER, f"{CONTAINER}.readinessProbe.exec.command.2", "/ready"),
    Fault(k8s_run.run, "the command is", "Job", JOB, f"{CONTAINER}.command", ["torchrun"]),
    Fault(k8s_run.run, "nobody sets RUNS", "Job", JOB, f"{CONTAINER}.args.10", "--run.dir=$(RUNS)"),
    Fault(k8s_run.run, "run.dri", "Job", JOB, f"{CONTAINER}.args.10", "--run.dri=/runs"),
    Fault(k8s_run.run, "/dev/shm is missing", "Job", JOB, f"{CONTAINER}.volumeMounts.1.mountPath", "/shm"),
    Fault(k8s_run.run, "one number", "Job", JOB, "spec.completions", 2),
    Fault(k8s_run.run, "which machine", "Job", JOB, "spec.completionMode", "NonIndexed"),
    Fault(k8s_run.run, "first pod's name", "Job", JOB, f"{POD}.subdomain", "trainers"),
    Fault(k8s_run.run, "not ready yet", "Service", "trainer", "spec.publishNotReadyAddresses", False),
    Fault(k8s_run.run, "another", "Job", JOB, f"{CONTAINER}.args.4", "--master-port=29501"),
    Fault(k8s_run.run, "pods, and the states", "PersistentVolumeClaim", "runs", "spec.accessModes", ["ReadWriteMany"]),
    Fault(k8s_run.run, "in memory", "Job", JOB, f"{POD}.volumes.1", {"name": "shm", "emptyDir": {"sizeLimit": "1Gi"}}),
    Fault(k8s_run.run, "cannot share", "Job", JOB, f"{CONTAINER}.args.2", "--nproc-per-node=3"),
    Fault(k8s_run.run, "is no service", "Service", "brightness", "metadata.name", "bright"),
    Fault(k8s_run.run, "waits for", "Job", JOB, f"{POD}.initContainers.0.args.0", "http://clip:8000"),
    Fault(k8s_run.run, "started in the pod", "Job", JOB, f"{CONTAINER}.args.9", "--rewards.0.weight=1"),
    Fault(k8s_run.run, "would not go on", "Job", JOB, f"{CONTAINER}.args.11", "--run.resume=never"),
    Fault(k8s_run.run, "its metrics", "Job", JOB, f"{CONTAINER}.env.1.value", "127.0.0.1"),
    Fault(k8s_run.run, "its metrics", "Job", JOB, f"{CONTAINER}.args.12", "--run.loggers=[tensorboard]"),
    Fault(k8s_run.failures, "drained", "Job", JOB, "spec.podFailurePolicy.rules.0.action", "Count"),
    Fault(k8s_run.failures, "75", "Job", JOB, "spec.podFailurePolicy.rules.1.onExitCodes.values.0", 76),
    Fault(k8s_run.failures, "exit code 2", "Job", JOB, "spec.podFailurePolicy.rules.2.onExitCodes.values", [1]),
    Fault(k8s_run.failures, "restartPolicy", "Job", JOB, f"{POD}.restartPolicy", "OnFailure"),
    Fault(k8s_run.failures, "few times", "Job", JOB, "spec.backoffLimit", 0),
    Fault(k8s_run.modules, "no module", "Job", JOB, f"{CONTAINER}.command.2", "trainer.launcher"),
]


def plant(clean: Sequence[Object], fault: Fault) -> list[Object]:
    """The objects with that one change."""
    changed = copy.deepcopy(list(clean))
    *parents, last = [int(part) if part.isdecimal() else part for part in _parts(fault.path)]
    node: Any = find(changed, fault.kind, fault.name)
    for part in parents:
        node = node[part]
    if fault.value is GONE:
        del node[last]
    else:
        node[last] = fault.value
    return changed


def _parts(path: str) -> list[str]:
    return path.split(".")


def _needs_overlays(fault: Fault) -> bool:
    return fault.kind in {"ScaledObject", "PodMonitor"}


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(
            fault,
            id=f"{fault.rule.__name__}-{fault.says.replace(' ', '_')}-{number}",
            marks=needs_kustomize if _needs_overlays(fault) else (),
        )
        for number, fault in enumerate(FAULTS)
    ],
)
def test_a_planted_fault_is_found(fault: Fault) -> None:
    """By the rule that is for it, and in words that name it."""
    clean = [*objects("base")]
    if _needs_overlays(fault):
        clean = [*clean, *objects("keda")[len(clean) :], *objects("monitoring")[len(clean) :]]
    before = set(fault.rule(clean))
    found = set(fault.rule(plant(clean, fault))) - before
    assert any(fault.says in line for line in found), found


def test_where_changes_are_judged_the_overlays_are_rendered() -> None:
    """Elsewhere a machine without kubectl skips them."""
    assert kustomize() or os.environ.get("CI") != "true", "put kubectl or kustomize on the PATH"


def test_every_rule_has_a_fault_to_find() -> None:
    """No rule is there that could not fail."""
    assert {fault.rule for fault in FAULTS} == set(RULES)


@needs_kustomize
def test_h100_starts_nothing_without_a_password() -> None:
    """And the base, which any cluster shall take, does not need one."""
    assert k8s_links.secret_is_required(objects("h100"), "redis-auth")
    assert not k8s_links.secret_is_required(objects("base"), "redis-auth")


def test_images_are_built_from_files_that_are_here() -> None:
    """Each name of an image has its Dockerfile."""
    for path in k8s_pods.BUILT.values():
        assert (ROOT / path).is_file(), path
