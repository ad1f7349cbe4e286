"""Rules of what is run: the commands are ones that our programs take, and the run finds its rewards and itself."""

import importlib.util
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from torch.distributed.run import parse_args

from services.__main__ import parse_arguments
from services.rewards import known_rewards
from tests.deploy.k8s_links import Faults, service_port
from tests.deploy.k8s_manifests import (
    Object,
    component_of,
    containers_of,
    find,
    named,
    of_kind,
    pod_of,
    workloads,
)
from tests.deploy.k8s_pods import variables_of
from trainer.config import Config, ConfigError
from trainer.failures import EXIT_SUSPENDED
from trainer.options import load_config, parse_overrides
from trainer.settings import Settings as TrainerSettings

INDEX = "$(JOB_COMPLETION_INDEX)"
"""Set in each pod of an Indexed Job by its controller."""
WORKER = 'exec python -m services worker "$0" --announce --verbose > /tmp/ready'


def commands(objects: Sequence[Object]) -> Faults:
    """APIs listen where they are looked for, workers tell the probes that they are ready; both serve a known reward."""
    known = {reward.name for reward in known_rewards()}
    served: dict[str, set[str]] = {}
    for workload in workloads(objects):
        component = component_of(workload)
        if component not in {"api", "worker"}:
            continue
        (container,) = containers_of(workload)
        if component == "api":
            if container["command"] != ["python", "-m", "services"]:
                yield f"{named(workload)}: the command is {container['command']}"
                continue
            options = _parsed(container["args"])
            if options is None or options.role != "api":
                yield f"{named(workload)}: `python -m services` does not take {container['args']}"
                continue
            if options.host != "0.0.0.0" or options.port != container["ports"][0]["containerPort"]:
                yield f"{named(workload)}: it does not listen where it is looked for"
            name = options.name
        else:
            if container["command"] != ["sh", "-c", WORKER]:
                yield f"{named(workload)}: the command is {container['command']}"
            (name,) = container["args"]
            if container["readinessProbe"]["exec"]["command"] != ["test", "-s", "/tmp/ready"]:
                yield f"{named(workload)}: the probe does not look for what the worker announces"
        if name not in known and ":" not in name:
            yield f"{named(workload)}: no reward is named {name!r}"
        served.setdefault(pod_of(workload)["metadata"]["labels"]["app.kubernetes.io/name"], set()).add(name)
    for reward, names in served.items():
        if len(names) > 1:
            yield f"{reward}: API and worker serve different rewards: {', '.join(sorted(names))}"


def _parsed(arguments: Sequence[str]) -> object:
    try:
        return parse_arguments(arguments)
    except SystemExit:
        return None


def run(objects: Sequence[Object]) -> Faults:
    """torchrun has one machine for each pod of the Job, its ranks share the work, and every address is a service's."""
    for job in of_kind(objects, "Job"):
        spec, pod = job["spec"], pod_of(job)["spec"]
        (container,) = pod["containers"]
        if container["command"] != ["python", "-m", "trainer.launch"]:
            yield f"{named(job)}: the command is {container['command']}"
        given = [text.replace(INDEX, "0") for text in container["args"]]
        if INDEX not in " ".join(container["args"]) or spec["completionMode"] != "Indexed":
            yield f"{named(job)}: its pods do not know which machine they are"
        if unknown := re.findall(r"\$\((\w+)\)", " ".join(given)):
            yield f"{named(job)}: nobody sets {', '.join(unknown)}"
        torchrun = parse_args(given)
        nodes, gpus = int(torchrun.nnodes), int(torchrun.nproc_per_node)
        if not nodes == spec["completions"] == spec["parallelism"]:
            yield f"{named(job)}: --nnodes, completions and parallelism are not one number"
        yield from _rendezvous(objects, job, torchrun.master_addr, int(torchrun.master_port))
        limit = container["resources"]["limits"].get("nvidia.com/gpu")
        if limit is not None and int(limit) != gpus:
            yield f"{named(job)}: {limit} GPUs for {gpus} ranks"
        yield from _volumes(objects, job, nodes)
        try:
            recipe, *options = torchrun.training_script_args
            config = load_config(recipe, parse_overrides(options))
            config.check_ranks(nodes * gpus)
        except ConfigError as error:
            yield f"{named(job)}: {error}"
            continue
        yield from _rewards(objects, job, config, pod["initContainers"][0]["args"])
        given = variables_of(objects, container)
        port = int(given.get("TRAINER_METRICS_PORT", TrainerSettings.model_fields["trainer_metrics_port"].default))
        opened = {each["name"]: each["containerPort"] for each in container["ports"]}
        told = "prometheus" in config.run.loggers and given.get("TRAINER_METRICS_HOST") == "0.0.0.0"
        if not told or opened.get("metrics") != port:
            yield f"{named(job)}: nobody can read its metrics at the port that it names for them"


def _rendezvous(objects: Sequence[Object], job: Object, address: str, port: int) -> Faults:
    pod, name = pod_of(job)["spec"], job["metadata"]["name"]
    first, _, subdomain = address.partition(".")
    service = [each for each in of_kind(objects, "Service") if each["metadata"]["name"] == pod.get("subdomain")]
    if first != f"{name}-0" or subdomain != pod.get("subdomain") or not service:
        yield f"{named(job)}: {address} is not its first pod's name"
    elif service[0]["spec"].get("clusterIP") != "None" or not service[0]["spec"].get("publishNotReadyAddresses"):
        yield f"{named(service[0])}: it does not name pods that are not ready yet"
    elif port != service_port(objects, service[0]["metadata"]["name"]):
        yield f"{named(job)}: the machines meet at port {port}, and the service has another"


def _volumes(objects: Sequence[Object], job: Object, nodes: int) -> Faults:
    """One pod needs no volume that many can write; several do."""
    pod = pod_of(job)["spec"]
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    for volume in pod["volumes"]:
        if mounts[volume["name"]] == "/runs":
            modes = find(objects, "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])["spec"]
            if (nodes > 1) is not (modes["accessModes"] == ["ReadWriteMany"]):
                yield f"{named(job)}: {nodes} pods, and the states are on a volume {modes['accessModes']}"
        if mounts[volume["name"]] == "/dev/shm" and volume.get("emptyDir", {}).get("medium") != "Memory":
            yield f"{named(job)}: /dev/shm is not in memory"
    if not {"/runs", "/dev/shm"} <= set(mounts.values()):
        yield f"{named(job)}: /runs or /dev/shm is missing"


def _rewards(objects: Sequence[Object], job: Object, config: Config, awaited: Sequence[str]) -> Faults:
    urls = [reward.url for reward in (*config.rewards, *config.eval.rewards)]
    if None in urls:
        yield f"{named(job)}: a reward without a url would be started in the pod"
    if sorted(map(str, urls)) != sorted(awaited):
        yield f"{named(job)}: it waits for {', '.join(awaited)}, and asks {', '.join(map(str, urls))}"
    services = {each["metadata"]["name"] for each in of_kind(objects, "Service")}
    for url in filter(None, urls):
        parts = urlsplit(url)
        if parts.hostname not in services or parts.port != service_port(objects, str(parts.hostname)):
            yield f"{named(job)}: {url} is no service here"
    if str(config.run.dir) != "/runs" or config.run.resume != "auto":
        yield f"{named(job)}: a new pod would not go on with the run in /runs"


def failures(objects: Sequence[Object]) -> Faults:
    """A drained node and exit code 75 start the run again, at no cost; an error and wrong settings end it."""
    for job in of_kind(objects, "Job"):
        rules = job["spec"].get("podFailurePolicy", {}).get("rules", [])
        if pod_of(job)["spec"].get("restartPolicy") != "Never":
            yield f"{named(job)}: a failure policy needs restartPolicy Never"
        if outcome(rules, code=1, disrupted=True) != "Ignore":
            yield f"{named(job)}: a drained node does not start it again"
        if outcome(rules, code=EXIT_SUSPENDED) != "Ignore":
            yield f"{named(job)}: exit code {EXIT_SUSPENDED} does not start it again"
        for code in (1, 2):
            if outcome(rules, code=code) != "FailJob":
                yield f"{named(job)}: exit code {code} does not end it"
        if outcome(rules, code=137) != "Count" or job["spec"].get("backoffLimit", 6) < 1:
            yield f"{named(job)}: a killed process is not tried again for a few times"


def outcome(rules: Sequence[Object], *, code: int, disrupted: bool = False) -> str:
    """What the Job's controller makes of a pod that failed: the action of the first rule that fits, else it counts.

    Source: Kubernetes documentation, "Pod failure policy".
    """
    for rule in rules:
        if "onPodConditions" in rule:
            fits = disrupted and any(
                each["type"] == "DisruptionTarget" and each.get("status", "True") == "True"
                for each in rule["onPodConditions"]
            )
        else:
            on = rule["onExitCodes"]
            fits = on.get("containerName") == "trainer" and (code in on["values"]) is (on["operator"] == "In")
        if fits:
            return str(rule["action"])
    return "Count"


def modules(objects: Sequence[Object]) -> Faults:
    """Each module that a command runs exists."""
    for workload in workloads(objects):
        for container in containers_of(workload):
            for name in re.findall(
                r"(?:^| )-m ([\w.]+)", " ".join([*container["command"], *container.get("args", [])])
            ):
                if importlib.util.find_spec(name) is None:
                    yield f"{named(workload)}: there is no module {name}"
