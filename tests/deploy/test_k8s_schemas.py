"""Every object is what its schema says, and has no field that the schema does not know."""

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.deploy.k8s_manifests import K8S, ROOT, Object, find, named, objects_of, read
from tests.deploy.test_k8s_rules import needs_kustomize

VERSIONS = ("1.30", "1.37")
"""The oldest Kubernetes that the manifests are meant for, and the newest whose schemas the validator brings."""
CUSTOM = ("keda.sh/", "monitoring.coreos.com/")
FOLDER = Path(os.environ.get("CRD_SCHEMAS", ROOT.parent / "shared" / "data" / "crds"))
"""Where the published CustomResourceDefinitions of KEDA and the Prometheus Operator lie, as YAML."""


def is_custom(thing: Object) -> bool:
    """Whether its schema is not part of Kubernetes."""
    return str(thing["apiVersion"]).startswith(CUSTOM)


def faults(thing: Object, version: str) -> list[str]:
    """What `kubernetes-validate --strict` says against an object; that it has no schema for it is a fault, too."""
    try:
        kubernetes_validate.validate(thing, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{named(thing)}: {'.'.join(map(str, error.path))}: {error.message}"]
    except kubernetes_validate.SchemaNotFoundError as error:
        return [f"{named(thing)}: {error.message}"]
    return []


@pytest.mark.parametrize("name", ["base", pytest.param("all", marks=needs_kustomize)])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid(name: str, version: str) -> None:
    """As they lie there and as all overlays render; custom resources have schemas of their own, below."""
    found = [fault for thing in objects_of(name) if not is_custom(thing) for fault in faults(thing, version)]
    assert found == []


def test_the_tools_are_valid() -> None:
    """What is applied by hand, once in a while."""
    tools = [thing for path in sorted((K8S / "tools").glob("*.yaml")) for thing in read(path.read_text("utf-8"))]
    assert tools
    assert [fault for thing in tools for version in VERSIONS for fault in faults(thing, version)] == []


@pytest.mark.parametrize(
    ("says", "kind", "name", "change"),
    [
        ("replcas", "StatefulSet", "redis", {"spec": {"replcas": 1}}),
        ("'8000'", "Service", "brightness", {"spec": {"type": 8000}}),
        ("Couldn't find schema", "HorizontalPodAutoscaler", "brightness-api", {"apiVersion": "autoscaling/v2beta2"}),
        ("Couldn't find schema", "Job", "trainer", {"kind": "Jobs"}),
    ],
)
def test_a_planted_fault_is_found(says: str, kind: str, name: str, change: Object) -> None:
    """A mistyped field, a wrong type, a version that is gone, a kind that never was."""
    thing = copy.deepcopy(find(objects_of("base"), kind, name))
    spec = change.pop("spec", {})
    thing |= change
    thing["spec"] |= spec
    (found,) = faults(thing, VERSIONS[-1])
    assert says in found or "8000 is not of type 'string'" in found


def closed(schema: Any) -> Any:
    """An OpenAPI schema of a custom resource as a JSON schema that knows no other fields.

    Rules in CEL (`x-kubernetes-validations`) are not among what is checked.
    """
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    result = {key: closed(value) for key, value in schema.items() if key not in {"default", "nullable", "format"}}
    if "properties" in schema:
        result["properties"] = {key: closed(value) for key, value in schema["properties"].items()}
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            result["additionalProperties"] = False
    return result


def published(thing: Object) -> Object:
    """The schema of a custom resource."""
    group, _, version = thing["apiVersion"].partition("/")
    for path in sorted(FOLDER.glob("*.yaml")):
        spec = yaml.safe_load(path.read_text("utf-8"))["spec"]
        if spec["group"] == group and spec["names"]["kind"] == thing["kind"]:
            (found,) = (each for each in spec["versions"] if each["name"] == version)
            schema: Object = closed(found["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object"}
            return schema
    raise LookupError(f"{FOLDER} has no CustomResourceDefinition of {thing['apiVersion']} {thing['kind']}")


def custom_faults(thing: Object) -> Iterator[str]:
    """What the published schema says against a custom resource."""
    for error in jsonschema.Draft202012Validator(published(thing)).iter_errors(thing):
        yield f"{named(thing)}: {'.'.join(map(str, error.path))}: {error.message}"


needs_schemas = pytest.mark.skipif(
    not any(FOLDER.glob("*.yaml")),
    reason="the published CustomResourceDefinitions are not at hand: CRD_SCHEMAS may name their folder",
)


@needs_kustomize
@needs_schemas
@pytest.mark.parametrize("name", ["keda", "monitoring"])
def test_custom_resources_are_what_was_published(name: str) -> None:
    """Of KEDA and of the Prometheus Operator."""
    custom = [thing for thing in objects_of(name) if is_custom(thing)]
    assert custom
    assert [fault for thing in custom for fault in custom_faults(thing)] == []


@needs_kustomize
@needs_schemas
@pytest.mark.parametrize(
    ("overlay", "name", "path", "value", "says"),
    [
        ("keda", "clip-worker", ("spec", "coolDownPeriod"), 60, "coolDownPeriod"),
        ("keda", "clip-worker", ("spec", "triggers", 0, "metricType"), 5, "not of type"),
        ("keda", "clip-worker", ("spec", "fallback"), {"replicas": 1}, "required"),
        ("monitoring", "trainer", ("spec", "podMetricsEndpoints", 0, "pathh"), "/metrics", "pathh"),
        ("monitoring", "var-grpo", ("spec", "groups", 0, "rules", 0, "For"), "2m", "For"),
    ],
)
def test_a_planted_fault_in_a_custom_resource_is_found(
    overlay: str, name: str, path: tuple[str | int, ...], value: object, says: str
) -> None:
    """An unknown field, a wrong type, a missing one."""
    (thing,) = (each for each in objects_of(overlay) if is_custom(each) and each["metadata"]["name"] == name)
    thing = copy.deepcopy(thing)
    node: Any = thing
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    assert any(says in fault for fault in custom_faults(thing))
