"""The manifests: what lies in k8s/, what kustomize makes of it, and what other checks want to know of an object."""

import functools
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]
Labels = Mapping[str, str]

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
ON_TOP = ("keda", "monitoring", "own-reward")
"""Overlays that hold nothing of the base, but go on top of it or of `h100`."""
SETS = ("base", "h100", *ON_TOP, "all")
"""What somebody may have applied; `all` is h100 with everything on top."""


def flat() -> list[Object]:
    """What `kubectl apply -f k8s/` reads, in its order."""
    return [found for path in sorted(K8S.glob("*.yaml")) for found in read(path.read_text("utf-8"))]


def read(text: str) -> list[Object]:
    """The objects of a stream of YAML documents."""
    return [document for document in yaml.safe_load_all(text) if document]


def kustomize() -> list[str]:
    """The command that renders a folder, or nothing where there is none on the path."""
    for name, *arguments in (("kubectl", "kustomize"), ("kustomize", "build")):
        if found := shutil.which(name):
            return [found, *arguments]
    return []


@functools.cache
def render(folder: str) -> str:
    """What `apply -k` would apply, as text.

    Args:
        folder: of k8s/, such as `overlays/h100`, or `.`.
    """
    command = [*kustomize(), str(K8S / folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


def objects_of(name: str) -> list[Object]:
    """The objects of one of `SETS`."""
    if name == "base":
        return flat()
    if name == "h100":
        return read(render("overlays/h100"))
    if name == "all":
        return [found for each in ("h100", *ON_TOP) for found in read(render(f"overlays/{each}"))]
    return [*flat(), *read(render(f"overlays/{name}"))]


def named(thing: Object) -> str:
    """Kind and name, for messages."""
    return f"{thing['kind']} {thing['metadata']['name']}"


def of_kind(objects: Sequence[Object], *kinds: str) -> list[Object]:
    """Those of some kinds."""
    return [thing for thing in objects if thing["kind"] in kinds]


def find(objects: Sequence[Object], kind: str, name: str) -> Object:
    """The one of that kind and name."""
    (found,) = (thing for thing in of_kind(objects, kind) if thing["metadata"]["name"] == name)
    return found


def workloads(objects: Sequence[Object]) -> list[Object]:
    """Whatever makes pods."""
    return of_kind(objects, "Deployment", "StatefulSet", "Job", "Pod")


def pod_of(workload: Object) -> Object:
    """The pod, with metadata and spec, that a workload makes."""
    return workload if workload["kind"] == "Pod" else workload["spec"]["template"]


def labels_of(workload: Object) -> Labels:
    """The labels of the workload's pods."""
    labels: Labels = pod_of(workload)["metadata"].get("labels", {})
    return labels


def containers_of(workload: Object, *, also_first: bool = True) -> list[Object]:
    """Containers, and those that run before them."""
    spec = pod_of(workload)["spec"]
    return [*(spec.get("initContainers", []) if also_first else []), *spec["containers"]]


def every_container(objects: Sequence[Object]) -> Iterator[tuple[str, Object, Object]]:
    """Where it is, its workload, and the container."""
    for workload in workloads(objects):
        for container in containers_of(workload):
            yield f"{named(workload)}, container {container['name']}", workload, container


def matches(selector: Mapping[str, Any], labels: Labels) -> bool:
    """Whether a LabelSelector takes pods with these labels; an empty one takes all."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for rule in selector.get("matchExpressions", []):
        value, operator = labels.get(rule["key"]), rule["operator"]
        fits = {
            "In": value in rule.get("values", []),
            "NotIn": value not in rule.get("values", []),
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }[operator]
        if not fits:
            return False
    return True


def selected(objects: Sequence[Object], selector: Mapping[str, Any]) -> list[Object]:
    """The workloads whose pods a LabelSelector takes."""
    return [workload for workload in workloads(objects) if matches(selector, labels_of(workload))]


def component_of(workload: Object) -> str:
    """api, worker, queue or trainer."""
    return labels_of(workload).get("app.kubernetes.io/component", "")


def amount(quantity: object) -> float:
    """A Kubernetes quantity as a number: cores, bytes or pieces."""
    text = str(quantity)
    units = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "m": 1e-3}
    unit = next((unit for unit in units if text.endswith(unit)), "")
    return float(text.removesuffix(unit)) * units.get(unit, 1)


def handbook() -> str:
    """The page of deployment."""
    return "\n".join(path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("deploy*.md")))
