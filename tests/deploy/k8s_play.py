"""Runs pods of the manifests with `podman kube play`: the queue, one reward and the trainer, and stops the run once.

    python -m tests.deploy.k8s_play [--steps N]

There is no Kubernetes in it: no Services, Jobs, policies or volumes of a cluster. What runs is each pod as the manifest
has it: image, command, settings, user, read-only root file system, no capabilities, mounts, first container. A pod has
the name by which the others look for its Service. `docker save IMAGE… | podman load` brings a Docker engine's images.
"""

import argparse
import copy
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from tests.deploy.k8s_manifests import Object, containers_of, find, flat, of_kind, pod_of
from trainer.failures import EXIT_SUSPENDED

PODMAN = shutil.which("podman") or ""
NETWORK = "var-grpo-play"
PODS = {  # workload: the pod's name
    ("StatefulSet", "redis"): "redis",
    ("Deployment", "brightness-api"): "brightness",
    ("Deployment", "brightness-worker"): "brightness-worker",
}
RUN = "trainer-0"
START_S, RUN_S = 120.0, 900.0


def podman(*arguments: str, text: str | None = None, check: bool = True) -> str:
    """What a command of podman's prints."""
    done = subprocess.run([PODMAN, *arguments], input=text, capture_output=True, text=True, timeout=600, check=False)
    if check and done.returncode:
        raise RuntimeError(f"podman {' '.join(arguments)}: {done.stderr.strip()[-2000:]}")
    return done.stdout.strip()


def pod(kind: str, name: str, called: str, place: Path, *, mounted: Sequence[str] = ()) -> Object:
    """A workload's pod by itself.

    Args:
        kind, name: of the workload.
        called: what the others call the pod.
        place: where this machine has folders in place of what a cluster mounts: `mounted`, and the ConfigMaps.
        mounted: names of volumes, and of the folders.
    """
    spec = copy.deepcopy(pod_of(find(flat(), kind, name))["spec"])
    for unused in ("serviceAccountName", "topologySpreadConstraints", "subdomain"):
        spec.pop(unused, None)
    folders = {volume: place / volume for volume in mounted}
    for volume in spec["volumes"]:
        if "configMap" in volume:
            folders[volume["name"]] = written(volume["configMap"]["name"], place)
    spec["volumes"] = [each for each in spec["volumes"] if each["name"] not in {*folders, "auth", "shm"}]
    spec["volumes"] += [{"name": volume, "hostPath": {"path": str(path)}} for volume, path in folders.items()]
    own = {each["name"]: f"{called}-{each['name']}" for each in spec["volumes"] if "emptyDir" in each}
    for each in spec["volumes"]:  # podman gives all pods one volume of a name
        each["name"] = own.get(each["name"], each["name"])
    kept = {volume["name"] for volume in spec["volumes"]}
    for container in (*spec.get("initContainers", []), *spec["containers"]):
        mounts = [each | {"name": own.get(each["name"], each["name"])} for each in container.get("volumeMounts", [])]
        container["volumeMounts"] = [mount for mount in mounts if mount["name"] in kept]
        for unused in ("ports", "startupProbe", "readinessProbe", "livenessProbe"):  # opened to nobody; asked by hand
            container.pop(unused, None)
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": called, "labels": {"app": called}}, "spec": spec}


def written(config_map: str, place: Path) -> Path:
    """A folder with the files of a ConfigMap, as a cluster mounts it."""
    folder = place / config_map
    folder.mkdir(exist_ok=True)
    for name, text in find(flat(), "ConfigMap", config_map)["data"].items():
        (folder / name).write_text(text, "utf-8")
    return folder


def play(*objects: Object) -> None:
    """Create them."""
    podman(
        "kube", "play", "--network", NETWORK, "-", text=yaml.safe_dump_all([*of_kind(flat(), "ConfigMap"), *objects])
    )


def wait(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Wait until a condition holds."""
    ends_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > ends_s:
            raise RuntimeError(f"not within {timeout_s:g} s: {what}")
        time.sleep(1)


def asks(kind: str, name: str, probe: str) -> bool:
    """Whether a probe of a running pod passes; one by HTTP is sent from within."""
    (container,) = containers_of(find(flat(), kind, name))
    target = container[probe]
    command = target.get("exec", {}).get("command")
    if command is None:
        url = f"http://127.0.0.1:{target['httpGet']['port']}{target['httpGet']['path']}"
        command = ["python", "-c", f"import urllib.request; urllib.request.urlopen({url!r}, timeout=5)"]
    place = f"{PODS[kind, name]}-{container['name']}"
    return (
        subprocess.run([PODMAN, "exec", place, *command], capture_output=True, timeout=60, check=False).returncode == 0
    )


def trainer(place: Path, steps: int) -> Object:
    """The Job's first pod, for so many steps."""
    found = pod("Job", "trainer", RUN, place, mounted=["runs"])
    (container,) = found["spec"]["containers"]
    places = {"$(JOB_COMPLETION_INDEX)": "0", "trainer-0.trainer": RUN}  # a Job's controller and a headless Service
    for inside, here in places.items():
        container["args"] = [text.replace(inside, here) for text in container["args"]]
    container["args"].append(f"--run.steps={steps}")
    return found


def end_of_run() -> int:
    """Wait for the trainer's end; its exit code. Its last words are printed."""
    code = int(podman("wait", f"{RUN}-trainer"))
    subprocess.run(
        [PODMAN, "logs", "--tail", "14", f"{RUN}-trainer"], stderr=subprocess.STDOUT, timeout=60, check=False
    )
    podman("pod", "rm", "-f", RUN)
    return code


def trial(place: Path, steps: int) -> None:
    """Start everything, stop the run after a few steps, let it go on to its end."""
    folder = place / "runs" / "mini-bright"
    lines = folder / "metrics.jsonl"
    began_s = time.monotonic()

    def say(words: str) -> None:
        print(f"{time.monotonic() - began_s:6.1f} s  {words}", flush=True)

    for (kind, name), called in PODS.items():
        play(pod(kind, name, called, place, mounted=["data"] if kind == "StatefulSet" else []))
    for kind, name in PODS:
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if "exec" in (given := containers_of(find(flat(), kind, name))[0].get(probe, {})) or "httpGet" in given:
                wait(lambda: asks(kind, name, probe), START_S, f"{probe} of {name}")  # noqa: B023 - called at once
                say(f"{name}: {probe} passes")
    play(trainer(place, steps))
    wait(lambda: lines.is_file() and len(lines.read_text().splitlines()) >= 3, RUN_S, "three steps")
    say("three steps are done; the run is told to stop")
    podman("stop", "--time", "150", f"{RUN}-trainer")
    code = end_of_run()
    say(f"exit code {code}")
    assert code == EXIT_SUSPENDED, code
    play(trainer(place, steps))
    code = end_of_run()
    say(f"exit code {code}")
    assert code == 0, code
    assert [json.loads(line)["step"] for line in lines.read_text().splitlines()] == list(range(1, steps + 1))
    say(f"success after: {json.loads((folder / 'summary.json').read_text())['after']['success_rate']:.1%}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trial; leave nothing."""
    parser = argparse.ArgumentParser(prog="python -m tests.deploy.k8s_play", description="Run pods of the manifests.")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args(arguments)
    if not PODMAN:
        print("podman is not on the PATH", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is below is cleaned up
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        place.chmod(0o755)
        for volume in ("runs", "data"):
            (place / volume).mkdir()
            shutil.chown(place / volume, 10001, 10001)  # what fsGroup does
        podman("network", "create", NETWORK)
        try:
            trial(place, options.steps)
        finally:
            for called in (RUN, *PODS.values()):
                podman("pod", "rm", "-f", called, check=False)
            podman("network", "rm", "-f", NETWORK, check=False)
            podman("volume", "rm", "-f", *(f"{called}-tmp" for called in (RUN, *PODS.values())), check=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
