"""What lies in k8s/: flat for `apply -f`, the same for `apply -k`, overlays that render, values that are taken."""

import importlib.util
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
import yaml

from services.rewards import create_reward
from services.settings import load_settings
from tests.deploy.compose_files import COMPOSE, load
from tests.deploy.compose_rules import builds
from tests.deploy.k8s_links import SECRETS
from tests.deploy.k8s_manifests import (
    K8S,
    ON_TOP,
    Object,
    component_of,
    every_container,
    flat,
    handbook,
    named,
    objects_of,
    read,
    render,
)
from tests.deploy.k8s_pods import PUBLISHED, variables_of
from tests.deploy.test_k8s_rules import every_set, needs_kustomize
from trainer.settings import Settings as TrainerSettings


def test_the_flat_files_are_those_of_the_base() -> None:
    """All, by links, the namespace first; `kubectl apply -f` goes by the extension and reads no folder below."""
    base = sorted(path.name for path in (K8S / "base").glob("[0-9]*.yaml"))
    read_by_kubectl = sorted(path.name for path in K8S.iterdir() if path.suffix in {".yaml", ".yml", ".json"})
    assert read_by_kubectl == base
    assert base[0] == "00-namespace.yaml"
    for name in base:
        assert os.readlink(K8S / name) == f"base/{name}"
    listed = yaml.safe_load((K8S / "base" / "kustomization.yaml").read_text("utf-8"))["resources"]
    assert listed == base


def test_whatever_needs_the_namespace_comes_after_it() -> None:
    """`apply -f` takes the files in the order of their names, and creates as it reads."""
    assert [thing["kind"] for thing in flat()].index("Namespace") == 0


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not on the PATH")
def test_kubectl_reads_the_flat_files_and_nothing_else() -> None:
    """Through the links, by their names; neither the kustomize file nor a folder below. No cluster is asked."""
    command = ["kubectl", "label", "--local", "-f", str(K8S), "read=by-kubectl", "-o", "name"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    read_ = [line.rpartition("/") for line in done.stdout.splitlines()]
    assert [(kind.partition(".")[0], name) for kind, _, name in read_] == [
        (thing["kind"].lower(), thing["metadata"]["name"]) for thing in flat()
    ]


@needs_kustomize
def test_both_ways_to_apply_give_the_same() -> None:
    """`apply -k k8s/` reads k8s/Kustomization."""

    def by_name(objects: list[Object]) -> dict[str, Object]:
        return {named(thing): thing for thing in objects}

    assert by_name(read(render("."))) == by_name(flat())


@needs_kustomize
@pytest.mark.parametrize("overlay", ON_TOP)
def test_an_overlay_that_goes_on_top_changes_nothing_below(overlay: str) -> None:
    """It holds nothing that base or h100 hold, and needs no custom resource of those."""
    below = {named(thing) for name in ("base", "h100") for thing in objects_of(name)}
    assert not below & {named(thing) for thing in read(render(f"overlays/{overlay}"))}


def test_the_base_needs_no_custom_resource_and_no_gpu() -> None:
    """Any cluster takes it."""
    groups = {str(thing["apiVersion"]).partition("/")[0] for thing in flat()}
    assert groups == {"v1", "apps", "batch", "autoscaling", "policy", "networking.k8s.io"}
    assert "gpu" not in yaml.safe_dump_all(flat())


def unbuilt(objects: list[Object]) -> set[str]:
    """The images of our own that docker-compose.yml, and so `make images`, does not build by this name and tag."""
    return (
        {container["image"] for _, _, container in every_container(objects)} - PUBLISHED - builds(load(COMPOSE)).keys()
    )


def other_tags(page: str) -> set[str]:
    """The tags of our images on a page that are not the one that is built."""
    named_ = set(re.findall(r"var-grpo/(?:services|services-slim|trainer):([\w.-]*\w)|newTag: ([\w.-]*\w)", page))
    return {image or tag for image, tag in named_} - {image.rpartition(":")[2] for image in builds(load(COMPOSE))}


@every_set
def test_the_images_are_those_that_compose_builds(name: str) -> None:
    """By name and tag, which stand there once."""
    assert unbuilt(objects_of(name)) == set()


def test_tool_and_handbook_name_the_images_that_compose_builds() -> None:
    """The pod that looks into the runs, and what a reader types."""
    assert unbuilt(read((K8S / "tools" / "runs.yaml").read_text("utf-8"))) == set()
    assert re.search(r"kind load docker-image var-grpo/services:", handbook())
    assert other_tags(handbook()) == set()


def test_an_image_with_another_tag_is_found() -> None:
    """In a manifest and in the handbook."""
    tool = (K8S / "tools" / "runs.yaml").read_text("utf-8").replace("trainer:0.1.0", "trainer:0.2.0")
    assert unbuilt(read(tool)) == {"var-grpo/trainer:0.2.0"}
    assert other_tags(handbook().replace("services-slim:0.1.0", "services-slim:0.2.0")) == {"0.2.0"}
    assert other_tags(handbook().replace("newTag: 0.1.0", "newTag: 0.3.0")) == {"0.3.0"}


@every_set
def test_no_secret_is_in_the_repository(name: str) -> None:
    """Secrets are made by hand."""
    assert "Secret" not in {thing["kind"] for thing in objects_of(name)}


def test_the_handbook_says_how_to_make_each_secret() -> None:
    """Name and keys, in one command that puts none of them on a command line."""
    page = handbook()
    for name, keys in SECRETS.items():
        assert re.search(rf"kind: Secret\nmetadata: {{name: {name}, namespace: var-grpo}}\n", page), name
        for key in keys:
            assert re.search(rf"^\s+{re.escape(key)}: ", page, flags=re.MULTILINE), key


@every_set
def test_the_settings_take_every_value(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of APIs and workers, and of the trainer."""
    for variable in list(os.environ):
        if variable.startswith("REWARD_") or variable == "REDIS_URL":
            monkeypatch.delenv(variable)
    objects = objects_of(name)
    for _, workload, container in every_container(objects):
        with monkeypatch.context() as patch:
            for variable, value in variables_of(objects, container).items():
                patch.setenv(variable, value)
            if component_of(workload) in {"api", "worker"}:
                assert load_settings().redis_url == "redis://redis:6379/0"
            else:
                assert TrainerSettings().token in (None, "")


def test_a_value_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the settings themselves: a bound in bytes is no 128Mi."""
    monkeypatch.setenv("REWARD_QUEUE_BYTES", "128Mi")
    with pytest.raises(ValueError, match="REWARD_QUEUE_BYTES"):
        load_settings()


def test_the_reward_of_the_template_can_be_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name that the template gives it."""
    folder = K8S / "overlays" / "own-reward"
    monkeypatch.syspath_prepend(str(folder))
    assert importlib.util.find_spec("my_reward") is not None
    reward = create_reward("my_reward:MyReward")
    assert reward.name == "my-reward"
    images_BHWC = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    images_BHWC[1, ..., 2] = 255
    assert list(reward.score(images_BHWC, None)) == [0.0, 1.0]
