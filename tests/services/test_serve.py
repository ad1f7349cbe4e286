"""The commands, as processes: through the whole path, and gone without a trace."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from redis import Redis

from services import supervisor
from services.batching.keys import Keys
from services.batching.streams import GROUP
from services.client import RewardClient, RewardRefused, ScoreResult
from services.folders import LOCK_NAME
from services.images import encode_batch
from services.protocol import MEDIA_SAFETENSORS
from services.redis_server import DIRECTORY_PREFIX, RedisMissing, RedisServer, find_redis
from services.rewards.brightness import Brightness
from services.supervisor import ServeOptions, serve
from tests.services.conftest import ROOT, Process, descendants, is_alive, random_images, wait_until

pytestmark = pytest.mark.redis

Start = Callable[..., Process]
DUMMY = "tests.services.dummies:"
SERVE = ("serve", "--port", "0", "--announce", "--until-stdin-closes")


def score(url: str, images_BHWC: np.ndarray, *, deadline_s: float = 60.0) -> ScoreResult:
    """Score through the client, in a loop of its own."""

    async def run() -> ScoreResult:
        async with RewardClient(url) as client:
            return await client.score(images_BHWC, deadline_s=deadline_s)

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A temporary folder of the test's own, its path short enough for a socket, so that no neighbour is counted."""
    tmp_path_factory.getbasetemp()  # first: it would otherwise be made inside, and go with it
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield


def redis_folders() -> set[Path]:
    """The directories of embedded Redis servers."""
    return set(Path(tempfile.gettempdir()).glob(f"{DIRECTORY_PREFIX}*"))


def assert_gone(pids: list[int], folders: set[Path]) -> None:
    """No process is left, nor any directory that was not there before."""
    wait_until(lambda: not any(is_alive(pid) for pid in pids))
    assert redis_folders() <= folders


def test_serve_scores_through_the_whole_path_and_leaves_nothing(start: Start) -> None:
    """One line on stdout when ready; the very scores of the reward, in order; the end of stdin ends everything."""
    folders = redis_folders()
    process = start(*SERVE, "brightness", f"{DUMMY}Nan", REWARD_MAX_BODY_BYTES="1000000")
    announced = process.announced()
    url, nan_url = announced["rewards"]["brightness"], announced["rewards"][f"{DUMMY}Nan"]
    pids = descendants(process.pid)
    assert len(pids) == 5
    images_BHWC = random_images(50, 8, 8, 3)
    result = score(url, images_BHWC)
    assert np.array_equal(result.scores, Brightness().score(images_BHWC, None))
    assert (result.reward, result.version) == ("brightness", "1")
    images_BHWC[17, 0, 0, 0] = 255
    with pytest.raises(RewardRefused, match="nan"):
        score(nan_url, images_BHWC)
    answer = httpx.post(f"{url}/score", content=b"x", headers={"Content-Type": MEDIA_SAFETENSORS}, trust_env=False)
    assert answer.status_code == 400
    answer = httpx.post(
        f"{url}/score", content=bytes(5_000_000), headers={"Content-Type": MEDIA_SAFETENSORS}, trust_env=False
    )
    assert answer.status_code == 413
    process.close_stdin()
    assert process.wait() == 0
    assert process.rest_of_stdout() == b""
    assert process.errors() == ""
    assert_gone(pids, folders)


def test_ctrl_c_stops_everything(start: Start) -> None:
    """Exit code 130, no message, nothing left."""
    folders = redis_folders()
    process = start("serve", "brightness", "--port", "0", "--announce")
    process.announced()
    pids = descendants(process.pid)
    process.send(signal.SIGINT)
    assert process.wait() == 130
    assert process.errors() == ""
    assert_gone(pids, folders)


def test_an_order_to_stop_is_obeyed_while_starting(start: Start) -> None:
    """SIGTERM before anything is ready: exit code 0, no announcement, nothing left."""
    folders = redis_folders()
    process = start(*SERVE, "brightness")
    wait_until(lambda: len(descendants(process.pid)) == 3)
    pids = descendants(process.pid)
    process.send(signal.SIGTERM)
    assert process.wait() == 0
    assert process.rest_of_stdout() == b""
    assert_gone(pids, folders)


def test_a_killed_supervisor_leaves_no_process(start: Start) -> None:
    """SIGKILL cannot be handled, so the kernel ends the children; the next start removes the directory."""
    folders = redis_folders()
    process = start(*SERVE, "brightness")
    process.announced()
    (left,) = redis_folders() - folders
    pids = descendants(process.pid)
    assert len(pids) == 3
    process.send(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(is_alive(pid) for pid in pids))
    os.utime(left / LOCK_NAME, (0, 0))
    with RedisServer():
        assert not left.exists()


def child(process: Process, part: bytes) -> int:
    """The process below another that has a part in its command line."""
    (pid,) = (pid for pid in descendants(process.pid) if part in Path(f"/proc/{pid}/cmdline").read_bytes())
    return pid


@pytest.mark.parametrize("part", [b"\0worker\0", b"\0api\0", b"redis.sock"])
def test_a_child_that_dies_is_started_again(start: Start, part: bytes) -> None:
    """Whichever it is, the service goes on at the same address, and a request sent meanwhile gets its scores."""
    folders = redis_folders()
    process = start(*SERVE, "brightness", REWARD_LEASE_MS="1000")
    url = process.url()
    images_BHWC = random_images(40, 8, 8, 3)
    for _ in range(2):
        os.kill(child(process, part), signal.SIGKILL)
        assert np.array_equal(score(url, images_BHWC).scores, Brightness().score(images_BHWC, None))
    wait_until(lambda: len(descendants(process.pid)) == 3)
    pids = descendants(process.pid)
    process.close_stdin()
    assert process.wait() == 0
    assert "is started again" in process.errors()
    assert_gone(pids, folders)


@pytest.mark.slow
def test_a_child_that_dies_too_often_stops_the_rest(start: Start) -> None:
    """One line, and a code that is not 0."""
    folders = redis_folders()
    process = start(*SERVE, f"{DUMMY}DiesWhenReady")
    process.announced()
    pids = descendants(process.pid)
    assert process.wait() == 1
    last = process.errors().splitlines()[-1]
    assert last.startswith(f"error: worker {DUMMY}DiesWhenReady: died with exit code 9, 11 times within 300 s")
    assert_gone(pids, folders)


def test_a_child_that_never_becomes_ready_stops_the_rest(start: Start) -> None:
    """There is no use in trying again: one line."""
    folders = redis_folders()
    process = start(*SERVE, f"{DUMMY}DiesLoading")
    assert process.wait() == 1
    assert process.errors() == f"error: worker {DUMMY}DiesLoading: died with exit code 9: see the log\n"
    assert_gone([], folders)


def test_a_port_in_use_is_one_line(start: Start) -> None:
    """Value and remedy; nothing was started."""
    folders = redis_folders()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start("serve", "brightness", "--port", str(port), "--announce")
        assert process.wait() == 1
    expected = f"error: port {port} on 127.0.0.1 is in use: choose another --port, or 0 for a free one\n"
    assert process.errors() == expected
    assert process.rest_of_stdout() == b""
    assert redis_folders() <= folders


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (("serve", "brigthness"), {}, "unknown reward 'brigthness'; known: aesthetic, brightness"),
        (("serve", "no.module:Class"), {}, "reward 'no.module:Class' cannot be imported"),
        (("serve", "brightness"), {"REWARD_MAX_BATCH": "0"}, "REWARD_MAX_BATCH"),
        (("serve", "brightness", "--port", "70000"), {}, "port 70000 does not exist"),
        (("serve", "brightness", "--redis-url", "http://localhost"), {}, "REDIS_URL"),
        (("serve", f"{DUMMY}NoWeights", "--port", "0"), {}, "cannot be loaded: FileNotFoundError: /weights/none"),
        (("serve", f"{DUMMY}Nameless", "--port", "0"), {}, "no method score(images, prompts)"),
        (("api", "brightness", "--fd", "99"), {"REDIS_URL": "unix:///no.sock"}, "descriptor 99 is no socket"),
        (("api", "brightness"), {"REDIS_URL": ""}, "REDIS_URL is not set"),
        (("worker", "brightness"), {"REDIS_URL": "unix:///no.sock", "REWARD_REDIS_PATIENCE_S": "0.1"}, "Redis is away"),
    ],
)
def test_what_cannot_run_says_so_in_one_line(
    start: Start, arguments: tuple[str, ...], environment: dict[str, str], words: str
) -> None:
    """The exit code is not 0 and there is no traceback."""
    process = start(*arguments, "--announce", **environment)
    assert process.wait() == 1
    lines = [line for line in process.errors().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert words in lines[0]
    assert "Traceback" not in process.errors()


def test_a_reward_may_print(start: Start) -> None:
    """What it prints is no announcement, and fills no pipe that nobody reads."""
    process = start(*SERVE, f"{DUMMY}Chatty")
    url = process.url()
    ready = httpx.get(f"{url}/readyz", trust_env=False)
    assert ready.status_code == 200
    images_BHWC = random_images(3, 8, 8, 3)
    for _ in range(3):
        assert np.array_equal(score(url, images_BHWC).scores, Brightness().score(images_BHWC, None))
    process.close_stdin()
    assert process.wait() == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_an_order_to_stop_is_obeyed_while_a_model_loads(start: Start, number: signal.Signals, code: int) -> None:
    """Within seconds, although the thread that loads cannot be stopped; nothing is left."""
    folders = redis_folders()
    process = start("serve", f"{DUMMY}SlowWarm", "--port", "0", "--announce")
    wait_until(lambda: len(descendants(process.pid)) == 3)
    pids = descendants(process.pid)
    process.send(number)
    assert process.wait(20) == code
    assert_gone(pids, folders)


def test_serve_uses_the_redis_that_its_option_names(start: Start, redis_url: str) -> None:
    """Not one of its own, nor that of the environment."""
    process = start(*SERVE, "brightness", "--redis-url", redis_url, REDIS_URL="redis://127.0.0.1:1")
    url = process.url()
    assert len(descendants(process.pid)) == 2
    images_BHWC = random_images(3, 8, 8, 3)
    assert np.array_equal(score(url, images_BHWC).scores, Brightness().score(images_BHWC, None))
    with Redis.from_url(redis_url) as client:
        assert client.exists(Keys("brightness", "1").jobs)
    process.close_stdin()
    assert process.wait() == 0


def test_serve_starts_with_its_standard_input_closed() -> None:
    """As some supervisors start their services: no socket takes the number of a standard stream."""
    command = f"exec {sys.executable} -m services serve brightness --port 0 --announce <&-"
    process = subprocess.Popen(["/bin/sh", "-c", command], cwd=ROOT, stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        (url,) = json.loads(process.stdout.readline())["rewards"].values()
        assert httpx.get(f"{url}/readyz", trust_env=False).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_two_hundred_callers_at_once_are_all_answered(start: Start) -> None:
    """More than Redis connections: the rest wait for one."""
    url = start(*SERVE, "brightness").url()
    images_BHWC = random_images(1, 8, 8, 3)

    async def burst() -> list[int]:
        body, headers = encode_batch(images_BHWC), {"Content-Type": MEDIA_SAFETENSORS}
        limits = httpx.Limits(max_connections=250)
        async with httpx.AsyncClient(timeout=60, limits=limits, trust_env=False) as client:
            answers = await asyncio.gather(
                *(client.post(f"{url}/score", content=body, headers=headers) for _ in range(250))
            )
        return [answer.status_code for answer in answers]

    assert set(asyncio.run(burst())) == {200}


def test_a_deadline_that_passes_is_never_called_a_pause(start: Start) -> None:
    """The event loop's timers may be a millisecond early, so that the clock says that a deadline is still to come."""
    process = start(*SERVE, "brightness")
    url, body = process.url(), encode_batch(random_images(12, 64, 64, 3))
    headers = {"Content-Type": MEDIA_SAFETENSORS, "X-Deadline-Ms": "1"}
    with httpx.Client(timeout=30) as client:
        statuses = {client.post(f"{url}/score", content=body, headers=headers).status_code for _ in range(300)}
    assert statuses <= {200, 504}


def test_anothers_lock_does_not_hold_up_the_start(tmp_path: Path) -> None:
    """A pipe in the place of a lock is not waited for."""
    folder = Path(tempfile.gettempdir()) / f"{DIRECTORY_PREFIX}odd"
    folder.mkdir()
    os.mkfifo(folder / LOCK_NAME)
    os.utime(folder / LOCK_NAME, (0, 0))
    with RedisServer() as server:
        assert server.process is not None


def test_the_folder_of_a_living_owner_is_left_alone() -> None:
    """However old its lock is."""
    with RedisServer() as first:
        folder = Path(first.url.removeprefix("unix://")).parent
        os.utime(folder / LOCK_NAME, (0, 0))
        with RedisServer():
            assert folder.exists()


def test_a_killed_worker_is_replaced_and_every_image_answered_once(
    start: Start, redis_url: str, tmp_path: Path
) -> None:
    """SIGKILL in the middle of a batch: another worker takes over; meanwhile a full queue answers 429."""
    name = f"{DUMMY}HangsOnce"
    environment = {
        "REDIS_URL": redis_url,
        "REWARD_LEASE_MS": "1000",
        "REWARD_QUEUE_IMAGES": "40",
        "REWARD_MAX_IMAGES": "40",
        "DUMMY_FOLDER": str(tmp_path),
    }
    api = start("api", name, "--port", "0", "--announce", **environment)
    first = start("worker", name, "--announce", **environment)
    url = api.url()
    first.announced()
    images_BHWC = random_images(40, 8, 8, 3)
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(score, url, images_BHWC)
        wait_until((tmp_path / "pid").exists)
        body, headers = encode_batch(images_BHWC[:1]), {"Content-Type": MEDIA_SAFETENSORS}
        refused = httpx.post(f"{url}/score", content=body, headers=headers, trust_env=False)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        first.send(signal.SIGKILL)
        second = start("worker", name, "--announce", **environment)
        assert np.array_equal(request.result(60).scores, Brightness().score(images_BHWC, None))
    keys = Keys("hangs-once", "1")
    with Redis.from_url(redis_url) as client:
        assert client.xlen(keys.jobs) == 0
        assert client.xlen(keys.dead) == 0
        pending: dict[str, int] = client.xpending(keys.jobs, GROUP)  # type: ignore[assignment]
        assert pending["pending"] == 0
    for process in (second, api):
        process.send(signal.SIGTERM)
    assert [second.wait(), api.wait()] == [0, 0]


@pytest.mark.parametrize("rewards", [1, 3])
def test_the_embedded_redis_holds_the_queues_of_all_rewards(rewards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue is full at its own bound, with 429, and not because those of others are."""
    made: list[int] = []

    class Sized(RedisServer):
        """One whose size is noted, and which does not start."""

        def __init__(self, *, max_memory_bytes: int) -> None:
            made.append(max_memory_bytes)
            raise RedisMissing("of a test")

    monkeypatch.setattr(supervisor, "RedisServer", Sized)
    options = ServeOptions(
        names=["brightness"] * rewards,
        host="127.0.0.1",
        port=0,
        announces=False,
        until_stdin_closes=False,
        log_file=None,
        verbose=False,
        redis_url=None,
        queue_bytes=2**30,
        api_processes=1,
    )
    with pytest.raises(RedisMissing, match="of a test"):
        serve(options)
    assert made[0] > rewards * options.queue_bytes


def test_the_embedded_redis_is_private_and_goes_with_its_owner() -> None:
    """A unix socket in a directory of its own, no port, nothing on disk, no eviction."""
    with RedisServer(max_memory_bytes=2**24) as server:
        path = Path(server.url.removeprefix("unix://"))
        assert path.parent.stat().st_mode & 0o777 == 0o700
        with Redis.from_url(server.url) as client:
            settings: dict[str, str] = client.config_get("*")  # type: ignore[assignment]
            assert (settings["port"], settings["save"], settings["appendonly"]) == ("0", "", "no")
            assert (settings["maxmemory-policy"], settings["maxmemory"]) == ("noeviction", str(2**24))
        process = server.process
    assert process is not None
    assert process.poll() is not None
    assert not path.parent.exists()


def test_a_machine_without_redis_is_told_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a program on PATH nor the wheel."""
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(RedisMissing, match="set REDIS_URL, or install redis-server or valkey-server"):
        find_redis()
