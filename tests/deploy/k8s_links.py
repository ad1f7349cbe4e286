"""Rules of what belongs together: each function gives the faults it finds, one line each.

`kubernetes-validate` and `checkov` look at one object at a time; a selector that matches nothing is fine for both.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from tests.deploy.k8s_manifests import (
    Object,
    component_of,
    containers_of,
    every_container,
    find,
    labels_of,
    matches,
    named,
    of_kind,
    pod_of,
    selected,
    workloads,
)

NAMESPACE = "var-grpo"
SECRETS = {"redis-auth": {"url", "redis.conf"}, "reward-token": {"token"}}
"""Made by hand, as docs/deploy.md says; a test holds it to that."""
OUTSIDE = (
    ("kube-system", {"k8s-app": "kube-dns"}),
    ("monitoring", {"app.kubernetes.io/name": "prometheus"}),
)
"""Pods of others that a network policy may name: the cluster's DNS, and the Prometheus of its operator."""
DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
Faults = Iterator[str]


def names(objects: Sequence[Object]) -> Faults:
    """Names are DNS-1123 labels, those of services begin with a letter, and each stands once, in our namespace."""
    seen: set[str] = set()
    for thing in objects:
        name = thing["metadata"]["name"]
        if not DNS_LABEL.fullmatch(name):
            yield f"{named(thing)}: the name is no DNS-1123 label"
        if thing["kind"] == "Service" and not name[0].isalpha():
            yield f"{named(thing)}: the name of a service begins with a letter"
        if named(thing) in seen:
            yield f"{named(thing)} stands twice"
        seen.add(named(thing))
        if thing["kind"] != "Namespace" and thing["metadata"].get("namespace") != NAMESPACE:
            yield f"{named(thing)}: not in the namespace {NAMESPACE}"
    for where, _, container in every_container(objects):
        ports = [port["name"] for port in container.get("ports", [])]
        for name in (container["name"], *ports):
            if not DNS_LABEL.fullmatch(name):
                yield f"{where}: {name!r} is no DNS-1123 label"
        if any(len(port) > 15 for port in ports):
            yield f"{where}: the name of a port has more than 15 characters"


def selectors(objects: Sequence[Object]) -> Faults:
    """Whatever selects pods selects some, and a workload and its spread their own."""
    for workload in workloads(objects):
        own = workload["spec"].get("selector")
        if own is not None and not matches(own, labels_of(workload)):
            yield f"{named(workload)}: its selector does not match its own pods"
        if own is not None and [named(each) for each in selected(objects, own)] != [named(workload)]:
            yield f"{named(workload)}: its selector matches the pods of others"
        for spread in pod_of(workload)["spec"].get("topologySpreadConstraints", []):
            if not matches(spread["labelSelector"], labels_of(workload)):
                yield f"{named(workload)}: its spread counts the pods of others"
    for service in of_kind(objects, "Service"):
        if not selected(objects, {"matchLabels": service["spec"]["selector"]}):
            yield f"{named(service)}: its selector matches no pod"
    for thing in of_kind(objects, "PodDisruptionBudget", "PodMonitor"):
        if not selected(objects, thing["spec"]["selector"]):
            yield f"{named(thing)}: its selector matches no pod"


def ports(objects: Sequence[Object]) -> Faults:
    """Ports are numbers that the containers open; a PodMonitor's is one that they name."""
    for service in of_kind(objects, "Service"):
        for workload in selected(objects, {"matchLabels": service["spec"]["selector"]}):
            for port in service["spec"]["ports"]:
                if port["targetPort"] not in _open(workload):
                    yield f"{named(service)}: {named(workload)} does not open the target port {port['targetPort']!r}"
    for where, workload, container in every_container(objects):
        for probe, way in product(
            ("startupProbe", "readinessProbe", "livenessProbe"), ("httpGet", "tcpSocket", "grpc")
        ):
            target = container.get(probe, {}).get(way)
            if target is not None and target["port"] not in _open(workload):
                yield f"{where}: {probe} asks at {target['port']!r}, which it does not open"
    for monitor in of_kind(objects, "PodMonitor"):
        for workload in selected(objects, monitor["spec"]["selector"]):
            open_ = {port["name"] for each in containers_of(workload) for port in each.get("ports", [])}
            for missing in {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} - open_:
                yield f"{named(monitor)}: {named(workload)} names no port {missing!r}"


def policy_ports(objects: Sequence[Object]) -> Faults:
    """A port that a network policy lets pass is one that a pod behind it opens."""
    for policy in of_kind(objects, "NetworkPolicy"):
        for direction, rule, takers in _rules(objects, policy):
            for port in rule.get("ports", []):
                if takers and not any(port["port"] in _open(taker) for taker in takers):
                    yield f"{named(policy)}: no pod opens the port {port['port']!r} of {direction}"


def targets(objects: Sequence[Object]) -> Faults:
    """An autoscaler's target exists, is scaled once, and CPU scales APIs alone; a budget can be kept."""
    scaled: set[str] = set()
    for scaler in of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject"):
        target, spec = scaler["spec"]["scaleTargetRef"], scaler["spec"]
        key = f"{target['kind']} {target['name']}"
        found = [
            each for each in workloads(objects) if named(each) == key and each["apiVersion"] == target["apiVersion"]
        ]
        if not found:
            yield f"{named(scaler)}: there is no {target['apiVersion']} {key}"
        elif (component_of(found[0]) == "api") is not (scaler["kind"] == "HorizontalPodAutoscaler"):
            yield f"{named(scaler)}: CPU scales APIs, the queue scales workers"
        elif "replicas" in found[0]["spec"]:
            yield f"{named(scaler)}: {key} sets replicas, and each apply would undo the scaling"
        if key in scaled:
            yield f"{named(scaler)}: {key} is scaled by another, too"
        scaled.add(key)
        least, most = (
            ("minReplicas", "maxReplicas")
            if scaler["kind"] != "ScaledObject"
            else ("minReplicaCount", "maxReplicaCount")
        )
        if not spec[least] <= spec[most]:
            yield f"{named(scaler)}: {least} {spec[least]} exceeds {most} {spec[most]}"
    for budget in of_kind(objects, "PodDisruptionBudget"):
        if budget["spec"].get("maxUnavailable") in (None, 0):
            yield f"{named(budget)}: with one pod no node could ever be drained; set maxUnavailable to 1 or more"


def references(objects: Sequence[Object]) -> Faults:
    """Accounts, ConfigMaps, Secrets, claims and volumes that a pod names exist, and each volume has a use."""
    claims = {thing["metadata"]["name"] for thing in of_kind(objects, "PersistentVolumeClaim")}
    maps = {thing["metadata"]["name"]: set(thing["data"]) for thing in of_kind(objects, "ConfigMap")}
    accounts = {thing["metadata"]["name"] for thing in of_kind(objects, "ServiceAccount")}
    for workload in workloads(objects):
        spec = pod_of(workload)["spec"]
        if spec.get("serviceAccountName") not in accounts:
            yield f"{named(workload)}: there is no account {spec.get('serviceAccountName')!r}"
        for kind, reference in _sources(workload):
            known, name = (maps if kind == "ConfigMap" else SECRETS), reference.get("name")
            if name not in known:
                yield f"{named(workload)}: there is no {kind} {name!r}"
            elif missing := set(reference["keys"]) - set(known[name]):
                yield f"{named(workload)}: {kind} {name!r} has no {sorted(missing)}"
        templates = {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])}
        volumes = {volume["name"] for volume in spec.get("volumes", [])} | templates
        mounted = {mount["name"] for each in containers_of(workload) for mount in each.get("volumeMounts", [])}
        for name in mounted - volumes:
            yield f"{named(workload)}: there is no volume {name!r}"
        for name in volumes - mounted:
            yield f"{named(workload)}: the volume {name!r} is mounted nowhere"
        for volume in spec.get("volumes", []):
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim is not None and claim not in claims:
                yield f"{named(workload)}: there is no claim {claim!r}"


def network(objects: Sequence[Object]) -> Faults:
    """All is denied at first; every policy takes a pod, and every peer of it is a pod of ours or a known one."""
    deny = [policy for policy in of_kind(objects, "NetworkPolicy") if policy["spec"]["podSelector"] == {}]
    if {"Ingress", "Egress"} not in [
        set(policy["spec"]["policyTypes"]) for policy in deny if not {"ingress", "egress"} & set(policy["spec"])
    ]:
        yield "no NetworkPolicy denies everything to everybody"
    for policy in of_kind(objects, "NetworkPolicy"):
        if not selected(objects, policy["spec"]["podSelector"]):
            yield f"{named(policy)}: it takes no pod"
        for direction, part in (("ingress", "from"), ("egress", "to")):
            if direction in policy["spec"] and direction.capitalize() not in policy["spec"]["policyTypes"]:
                yield f"{named(policy)}: {direction} is not among its policyTypes"
            for rule in policy["spec"].get(direction, []):
                if not rule.get(part):
                    yield f"{named(policy)}: {direction} is open to everybody"
                for peer in rule.get(part, []):
                    if not _known(objects, peer):
                        yield f"{named(policy)}: no pod is the peer {peer}"


def _known(objects: Sequence[Object], peer: Mapping[str, Any]) -> bool:
    if "ipBlock" in peer:
        return True
    if "namespaceSelector" in peer:
        place = peer["namespaceSelector"].get("matchLabels", {}).get("kubernetes.io/metadata.name")
        return (place, peer.get("podSelector", {}).get("matchLabels")) in OUTSIDE
    return bool(selected(objects, peer["podSelector"]))


def _rules(objects: Sequence[Object], policy: Object) -> Iterator[tuple[str, Object, list[Object]]]:
    """Each rule of a policy with those of our pods that receive what it lets pass."""
    for rule in policy["spec"].get("ingress", []):
        yield "ingress", rule, selected(objects, policy["spec"]["podSelector"])
    for rule in policy["spec"].get("egress", []):
        ours = [peer for peer in rule["to"] if "podSelector" in peer and "namespaceSelector" not in peer]
        yield "egress", rule, [pod for peer in ours for pod in selected(objects, peer["podSelector"])]


def _open(workload: Object) -> set[object]:
    return {port["containerPort"] for each in containers_of(workload) for port in each.get("ports", [])}


def _sources(workload: Object) -> Iterator[tuple[str, Object]]:
    """ConfigMaps and Secrets that a pod reads, with the keys it wants of them."""
    for container in containers_of(workload):
        for source in container.get("envFrom", []):
            for field, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
                if field in source:
                    yield kind, {**source[field], "keys": []}
        for variable in container.get("env", []):
            for field, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
                if reference := variable.get("valueFrom", {}).get(field):
                    yield kind, {**reference, "keys": [reference["key"]]}
    for volume in pod_of(workload)["spec"].get("volumes", []):
        for field, kind, key in (("configMap", "ConfigMap", "name"), ("secret", "Secret", "secretName")):
            if field in volume:
                keys = [item["key"] for item in volume[field].get("items", [])]
                yield kind, {"name": volume[field][key], "keys": keys}


def secret_is_required(objects: Sequence[Object], name: str) -> bool:
    """Whether no pod that names a Secret starts without it."""
    every = [
        reference.get("optional", False)
        for workload in workloads(objects)
        for reference in [
            *(
                v["valueFrom"]["secretKeyRef"]
                for c in containers_of(workload)
                for v in c.get("env", [])
                if "valueFrom" in v
            ),
            *(
                {**volume["secret"], "name": volume["secret"]["secretName"]}
                for volume in pod_of(workload)["spec"].get("volumes", [])
                if "secret" in volume
            ),
        ]
        if reference["name"] == name
    ]
    assert every, f"no pod names the Secret {name}"
    return not any(every)


def service_port(objects: Sequence[Object], name: str) -> int:
    """The one port of a service."""
    (port,) = find(objects, "Service", name)["spec"]["ports"]
    return int(port["port"])
