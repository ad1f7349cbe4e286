"""docker-compose.yml run for real, by `make test-compose`, where there is an engine: about 15 minutes of two cores.

The images are built from the checkout. What runs is a copy of the compose files in a folder of its own, so that
neither a run of the checkout's nor a project of the same name is touched.
"""

import json
import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.services.conftest import wait_until

ROOT = Path(__file__).resolve().parents[2]
DOCKER = shutil.which("docker")
PROJECT = "var-grpo-test"
PORTS = {"BRIGHTNESS": "18101", "CLIP": "18102", "AESTHETIC": "18103"}
SLIM, FULL, TRAINER = (f"var-grpo/{name}:test" for name in ("services-slim", "services", "trainer"))
REWARDS = ("brightness", "clip", "aesthetic")
SERVING = [f"{name}-{role}" for name in REWARDS for role in ("api", "worker")]
TELLING = {"trainer": 9400, **{f"{name}-api": 8000 for name in REWARDS}}
"""Who answers at /metrics, and on which port of its container."""
TIMINGS = ("seconds/", "images_per_second")
LEAST_BRIGHT = 0.95
STEPS = 60


def docker(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the client, and keep what it says."""
    assert DOCKER is not None
    return subprocess.run([DOCKER, *arguments], capture_output=True, text=True, timeout=600, check=False, **options)


def has_engine() -> bool:
    """Whether there is an engine, and a Compose that it understands."""
    return (
        bool(shutil.which("docker")) and not docker("info").returncode and not docker("compose", "version").returncode
    )


pytestmark = [
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not has_engine(), reason="no Docker engine with Compose"),
]


class Stack:
    """One project in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        shutil.copy(ROOT / "docker-compose.yml", folder)
        shutil.copytree(ROOT / "services" / "compose", folder / "services" / "compose")
        ports = {f"VAR_GRPO_{name}_PORT": port for name, port in PORTS.items()}
        self.token = secrets.token_hex(32)
        self.environment = {**os.environ, "VAR_GRPO_TAG": "test", "REWARD_TOKEN": self.token, **ports}

    def compose(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run one command of Compose."""
        return docker("compose", "-p", PROJECT, *arguments, cwd=self.folder, env=self.environment)

    def up(self) -> subprocess.Popen[bytes]:
        """What a person types."""
        assert DOCKER is not None
        command = [DOCKER, "compose", "-p", PROJECT, "up", "--exit-code-from", "trainer"]
        with (self.folder / "up.log").open("wb") as log:
            return subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=log, stderr=log)

    def containers(self) -> dict[str, dict[str, Any]]:
        """What the engine knows of each container, by service."""
        names = self.compose("ps", "-aq").stdout.split()
        found = json.loads(docker("inspect", *names).stdout) if names else []
        return {each["Config"]["Labels"]["com.docker.compose.service"]: each for each in found}

    def health(self) -> dict[str, str]:
        """Of each container that runs, by service."""
        running = {name: each["State"] for name, each in self.containers().items() if each["State"]["Running"]}
        return {name: state.get("Health", {}).get("Status", "unknown") for name, state in running.items()}

    def inside(self, service: str, command: str) -> str:
        """What a shell says in a container."""
        done = self.compose("exec", "-T", service, "sh", "-c", command)
        return done.stdout + done.stderr

    def metrics(self, name: str = "mini-bright") -> list[dict[str, Any]]:
        """The run's metrics so far, without timings."""
        path = self.folder / "runs" / name / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        read = [json.loads(line) for line in lines]
        return [{key: value for key, value in line.items() if not key.startswith(TIMINGS)} for line in read]

    def told(self) -> dict[str, str]:
        """What APIs and trainer tell at /metrics, by service; of those that answer."""
        code = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:{}/metrics').read().decode())"
        said = {name: self.inside(name, f'python -c "{code.format(port)}"') for name, port in TELLING.items()}
        return {name: text for name, text in said.items() if text.startswith("# HELP")}

    def logs(self) -> str:
        """Everything that any container has said."""
        return self.compose("logs", "--no-color").stdout


def dead_letters(told: dict[str, str]) -> dict[str, float]:
    """How many jobs of each reward were given up, by what its API told."""
    found = {}
    for name in REWARDS:
        text = told.get(f"{name}-api", "")
        values = re.findall(r"^reward_dead_letters(?:_total|_held)\{.*\} (\S+)$", text, flags=re.MULTILINE)
        assert len(values) == 2, f"{name}-api: {text}"
        found[name] = max(map(float, values))
    return found


class Ended(NamedTuple):
    """What was seen of a run."""

    code: int
    health: dict[str, str]
    dead: dict[str, float]
    restarts: dict[str, int]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]
    logs: str
    told: dict[str, str]
    password: str


@pytest.fixture(scope="module", autouse=True)
def images() -> None:
    """Build all of them, as `make images` does."""
    done = docker("buildx", "bake", "-f", "docker-compose.yml", cwd=ROOT, env={**os.environ, "VAR_GRPO_TAG": "test"})
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """A project that is taken down whatever happens."""
    stack = Stack(tmp_path / "checkout")
    yield stack
    stack.compose("down", "-v", "--timeout", "5")


def run(stack: Stack, disturb: Callable[[int], None] = lambda step: None) -> Ended:
    """Type `docker compose up --exit-code-from trainer`, look at it as long as it goes, and say how it ended."""
    process = stack.up()
    health: dict[str, str] = {}
    told: dict[str, str] = {}
    password = ""
    while process.poll() is None:
        step = len(stack.metrics())
        disturb(step)
        if (
            step == STEPS and not (stack.folder / "runs" / "mini-bright" / "summary.json").exists()
        ):  # the last evaluation
            password = (
                password or stack.inside("brightness-api", "cat /run/queue/url").rpartition("@")[0].rpartition(":")[2]
            )
            seen = stack.health()
            if set(SERVING) <= seen.keys():
                health, told = seen, told | stack.told()
        time.sleep(0.5)
    folder = stack.folder / "runs" / "mini-bright"
    summary = folder / "summary.json"
    restarts = {name: each["RestartCount"] for name, each in stack.containers().items()}
    said = (stack.folder / "up.log").read_text() + stack.logs()
    assert summary.exists(), said[-5000:]
    return Ended(
        code=process.returncode,
        health=health,
        dead=dead_letters(told),
        restarts=restarts,
        metrics=stack.metrics(),
        summary=json.loads(summary.read_text()),
        logs=said,
        told=told,
        password=password,
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, Ended]]:
    """One run that nothing happens to."""
    stack = Stack(tmp_path_factory.mktemp("undisturbed") / "checkout")
    try:
        yield stack, run(stack)
    finally:
        stack.compose("down", "-v", "--timeout", "5")


def test_the_command_as_it_is_typed_trains(undisturbed: tuple[Stack, Ended]) -> None:
    """It ends with 0, the samples are bright, no container was started again, and all others were healthy."""
    _, ended = undisturbed
    assert ended.code == 0
    assert ended.summary["after"]["success_rate"] >= LEAST_BRIGHT
    assert {f"raw_score/{name}" for name in ("brightness", "mini-clip", "mini-aesthetic")} <= ended.summary[
        "after"
    ].keys()
    assert set(ended.restarts.values()) == {0}
    assert {name: ended.health[name] for name in (*SERVING, "redis")} == dict.fromkeys((*SERVING, "redis"), "healthy")
    assert set(ended.dead.values()) == {0}


def test_nobody_is_root_and_nothing_is_written_outside(undisturbed: tuple[Stack, Ended]) -> None:
    """Root file systems are read-only, capabilities are dropped, images name a user, and the run is its owner's."""
    stack, _ = undisturbed
    for name, each in stack.containers().items():
        assert each["HostConfig"]["ReadonlyRootfs"], name
        assert each["HostConfig"]["CapDrop"] == ["ALL"], name
        assert any(option.startswith("no-new-privileges") for option in each["HostConfig"]["SecurityOpt"]), name
        for bindings in (each["HostConfig"]["PortBindings"] or {}).values():
            assert {binding["HostIp"] for binding in bindings} == {"127.0.0.1"}, name
    for image in (SLIM, FULL, TRAINER):
        (found,) = json.loads(docker("image", "inspect", image).stdout)
        assert found["Config"]["User"] == "10001:10001"
        assert found["Config"]["Healthcheck"]["Test"]
        labels = found["Config"]["Labels"]
        assert labels["org.opencontainers.image.title"]
        assert not [label for label in labels if "compose" in label]  # a container of it would count as the project's
    runs = stack.folder / "runs"
    caller = (stack.folder / "docker-compose.yml").stat().st_uid
    assert runs.stat().st_uid == caller
    owners = {path.stat().st_uid for path in runs.rglob("*")}
    assert owners == {caller or 10001}


def test_the_password_is_nowhere_but_in_its_volume(undisturbed: tuple[Stack, Ended]) -> None:
    """Neither in a log, nor in what the engine tells of containers and images, nor in the run."""
    stack, ended = undisturbed
    assert re.fullmatch(r"[0-9a-f]{64}", ended.password)
    assert ended.password not in ended.logs
    assert ended.password not in json.dumps(stack.containers())
    for image in (SLIM, FULL, TRAINER):
        assert ended.password not in docker("image", "inspect", image).stdout
        assert ended.password not in docker("history", "--no-trunc", image).stdout
    for path in (stack.folder / "runs").rglob("*"):
        assert not path.is_file() or ended.password.encode() not in path.read_bytes(), path


def test_the_token_is_in_nothing_that_is_told_or_kept(undisturbed: tuple[Stack, Ended]) -> None:
    """The rewards ask for it and the trainer sends it; no log, no metric and no file of the run has it."""
    stack, ended = undisturbed
    containers = stack.containers()
    for name in TELLING:
        assert f"REWARD_TOKEN={stack.token}" in containers[name]["Config"]["Env"], name
    assert stack.token not in ended.logs
    assert ended.told.keys() == TELLING.keys()
    assert re.search(r'^reward_requests_total\{.*status="200".*\} [1-9]', ended.told["brightness-api"], re.MULTILINE)
    assert stack.token not in "".join(ended.told.values())
    for path in (stack.folder / "runs").rglob("*"):
        assert not path.is_file() or stack.token.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("image", [SLIM, FULL, TRAINER])
def test_no_image_holds_a_tool_or_a_cache(image: str) -> None:
    """No compiler, no installer of ours, no build cache, no index, nothing else of the checkout."""
    code = (
        "ls -a /app /root /tmp; for tool in gcc cc g++ make uv; do command -v $tool; done; "
        "ls -d /build /root/.cache /app/.git /app/services/compose /etc/pip.conf 2>/dev/null; env"
    )
    said = docker("run", "--rm", "--network", "none", "--entrypoint", "sh", image, "-c", code).stdout
    assert not re.search(r"bin/(gcc|cc|g\+\+|make|uv)$", said, flags=re.MULTILINE), said
    for word in ("/build", ".cache", ".git", "services/compose", "pip.conf", "INDEX", "PASSWORD", ".env"):
        assert word not in said, (word, said)


def test_a_kill_of_any_service_changes_no_number(stack: Stack, undisturbed: tuple[Stack, Ended]) -> None:
    """Each process is killed once, by SIGKILL from inside its container, in the course of one run."""
    victims = [*SERVING, "redis"]
    killed: list[str] = []

    def disturb(step: int) -> None:
        if killed != victims and step >= 4 + 7 * len(killed):
            victim = victims[len(killed)]
            stack.inside(victim, "kill -9 -1")
            killed.append(victim)

    ended = run(stack, disturb)
    assert killed == victims
    assert ended.code == 0
    assert ended.metrics == undisturbed[1].metrics
    assert {key: value for key, value in ended.summary.items() if key != "seconds"} == {
        key: value for key, value in undisturbed[1].summary.items() if key != "seconds"
    }
    assert {name: count for name, count in ended.restarts.items() if count} == dict.fromkeys(victims, 1)
    assert {name: ended.health[name] for name in victims} == dict.fromkeys(victims, "healthy")
    assert set(ended.dead.values()) == {0}


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize(("caller", "becomes"), [(0, 10001), (1234, 1234)])
def test_the_trainer_becomes_who_owns_the_checkout(stack: Stack, caller: int, becomes: int) -> None:
    """And has no capability then; of root's checkout nobody trains as root, in a folder that stays root's."""
    for path in (stack.folder, *stack.folder.rglob("*")):
        os.chown(path, caller, caller)
    assert stack.compose("up", "-d", "setup").returncode == 0
    wait_until(lambda: stack.containers()["setup"]["State"]["Status"] == "exited")
    command = "id -u; grep CapEff /proc/self/status; touch /runs/mine"
    said = stack.compose("run", "--rm", "-T", "--no-deps", "trainer", "sh", "-c", command).stdout
    assert said.split() == [str(becomes), "CapEff:", "0" * 16]
    assert (stack.folder / "runs").stat().st_uid == caller
    assert (stack.folder / "runs" / "mine").stat().st_uid == becomes


def test_down_leaves_nothing_but_the_run(stack: Stack) -> None:
    """No container, volume or network of the project's; the folder of runs is still there."""
    assert stack.compose("up", "-d", "redis").returncode == 0
    assert stack.compose("down", "-v").returncode == 0
    for kind in ("container", "volume", "network"):
        arguments = [
            "ls",
            "-q",
            *(["-a"] if kind == "container" else []),
            "--filter",
            f"label=com.docker.compose.project={PROJECT}",
        ]
        assert docker(kind, *arguments).stdout == "", kind
    assert (stack.folder / "runs").is_dir()


class Bad(NamedTuple):
    """An environment that cannot work: what is started with it, and what the one line must hold."""

    image: str
    command: list[str]
    environment: dict[str, str]
    names: str
    remedy: str


NOWHERE = {"REDIS_URL": "redis://nowhere.invalid:6379"}
BRIGHT = {role: [role, "brightness"] for role in ("api", "worker")}
RECIPE = ["mini-bright", "--run.dir=/runs"]
BAD = [
    Bad(SLIM, BRIGHT["api"], {"REDIS_URL": "http://redis:6379"}, "REDIS_URL", "redis://"),
    Bad(SLIM, BRIGHT["worker"], {"REDIS_URL": "redis"}, "REDIS_URL", "redis://"),
    Bad(SLIM, BRIGHT["api"], {}, "REDIS_URL is not set", "set it"),
    Bad(SLIM, BRIGHT["api"], {**NOWHERE, "REWARD_REDIS_PATIENCE_S": "1"}, "REDIS_URL", "check that"),
    Bad(SLIM, BRIGHT["worker"], {**NOWHERE, "REWARD_REDIS_PATIENCE_S": "1"}, "REDIS_URL", "check that"),
    Bad(SLIM, BRIGHT["worker"], {**NOWHERE, "REWARD_MAX_BACH": "8"}, "REWARD_MAX_BACH", "REWARD_MAX_BATCH"),
    Bad(SLIM, BRIGHT["worker"], {**NOWHERE, "REWARD_MAX_BATCH": "0"}, "REWARD_MAX_BATCH", "greater"),
    Bad(
        *(FULL, ["worker", "clip"], {**NOWHERE, "REWARD_CLIP_WEIGHTS": "/weights/none.pt"}),
        *("REWARD_CLIP_WEIGHTS", "give the path"),
    ),
    Bad(
        *(FULL, ["worker", "aesthetic"], {**NOWHERE, "REWARD_AESTHETIC_HEAD": "/weights/none.pth"}),
        *("REWARD_AESTHETIC_HEAD", "give the path"),
    ),
    Bad(TRAINER, [*RECIPE, "--rewards.0.url=redis:8000"], {}, "rewards.0.url", "give http://HOST:PORT"),
    Bad(
        *(TRAINER, [*RECIPE, "--rewards.0.url=http://nowhere.invalid:8000", "--run.score_timeout_s=2"], {}),
        *("http://nowhere.invalid:8000", "correct the URL"),
    ),
    Bad(TRAINER, RECIPE, {"TRAINER_METRICS_PROT": "1"}, "TRAINER_METRICS_PROT", "TRAINER_METRICS_PORT"),
    Bad(TRAINER, [*RECIPE, "--model.var=/weights/none.pth"], {}, "/weights/none.pth", "the nearest is"),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: f"{bad.command[0]}-{bad.names.partition('/')[0] or 'weights'}")
def test_a_bad_environment_is_one_line(bad: Bad) -> None:
    """The container ends with an error; the last line names the variable or option, and what to do."""
    given = [part for name, value in bad.environment.items() for part in ("-e", f"{name}={value}")]
    bounds = ("--rm", "--read-only", "--tmpfs", "/tmp", "--mount", "type=volume,dst=/runs", "--cap-drop", "ALL")
    done = docker("run", *bounds, *given, bad.image, *bad.command)
    said = done.stderr.splitlines()
    assert done.returncode in {1, 2}, done.stderr
    assert [line for line in said if line.startswith("error:")] == said[-1:], done.stderr
    assert "Traceback" not in done.stderr
    assert bad.names in said[-1]
    assert bad.remedy in said[-1]


@pytest.mark.parametrize("service", ["brightness-api", "brightness-worker"])
def test_a_bad_password_is_one_line(stack: Stack, service: str) -> None:
    """Redis as it is deployed lets neither role in, and neither waits for that to pass."""
    assert stack.compose("up", "-d", "--wait", "redis").returncode in {0, 1}
    wait_until(lambda: stack.health().get("redis") == "healthy", timeout_s=60)
    url = "redis://reward:sesame@redis:6379"
    command = ["worker", "brightness"] if service.endswith("worker") else ["api", "brightness"]
    done = stack.compose("run", "--rm", "-T", "--no-deps", "-e", f"REDIS_URL={url}", service, *command)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error:")]
    assert done.returncode == 1
    assert len(lines) == 1
    assert lines[0].startswith("error: REDIS_URL: Redis at redis:6379 refuses the user or the password")
    assert "sesame" not in done.stdout + done.stderr
