"""API and worker as processes of their own, as an orchestrator runs them."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from redis import Redis

from services.batching.keys import Keys
from services.batching.streams import GROUP
from services.images import encode_batch
from services.protocol import HEADER_REQUEST_ID, MEDIA_SAFETENSORS
from services.redis_server import RedisServer
from services.rewards.brightness import Brightness
from services.rewards.clip import miniature_source
from services.rewards.sources import sha256_of
from tests.services.conftest import Process, random_images, wait_until

pytestmark = pytest.mark.redis

Start = Callable[..., Process]
SLOW = "tests.services.dummies:Slow"
SECRETIVE = "tests.services.dummies:Secretive"
KEYS = Keys("slow", "1")


def post(url: str, images_BHWC: np.ndarray, **headers: str) -> httpx.Response:
    """One request, without a client that would try again."""
    headers = {"Content-Type": MEDIA_SAFETENSORS, **headers}
    return httpx.post(f"{url}/score", content=encode_batch(images_BHWC), headers=headers, timeout=60, trust_env=False)


def assert_scored(answer: httpx.Response, images_BHWC: np.ndarray) -> None:
    """It is the very scores of the reward."""
    assert answer.status_code == 200, answer.text
    assert answer.json()["scores"] == Brightness().score(images_BHWC, None).tolist()


def test_an_api_that_is_told_to_stop_finishes_what_it_has(start: Start, redis_url: str) -> None:
    """It takes nothing new, answers what it has, and exits with 0."""
    api = start("api", SLOW, "--port", "0", "--announce", REDIS_URL=redis_url)
    url = api.url()
    images_BHWC = random_images(3, 8, 8, 3)
    with ThreadPoolExecutor(1) as pool, Redis.from_url(redis_url) as redis:
        request = pool.submit(post, url, images_BHWC)
        wait_until(lambda: redis.xlen(KEYS.jobs) == 1)
        api.send(signal.SIGTERM)
        worker = start("worker", SLOW, "--announce", REDIS_URL=redis_url)
        assert_scored(request.result(60), images_BHWC)
    assert api.wait() == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/healthz", trust_env=False)
    worker.send(signal.SIGTERM)
    assert worker.wait() == 0


def test_a_worker_that_is_told_to_stop_hands_back_the_rest(start: Start, redis_url: str) -> None:
    """It finishes its batch; the rest is another's at once, long before the lease is over, and is no redelivery."""
    environment = {"REDIS_URL": redis_url, "REWARD_MAX_BATCH": "16", "REWARD_LEASE_MS": "60000"}
    url = start("api", SLOW, "--port", "0", "--announce", **environment).url()
    first = start("worker", SLOW, "--announce", **environment)
    first.announced()
    images_BHWC = random_images(160, 8, 8, 3)
    started_s = time.monotonic()
    with ThreadPoolExecutor(1) as pool, Redis.from_url(redis_url) as redis:
        request = pool.submit(post, url, images_BHWC)
        wait_until(lambda: 0 < redis.xlen(KEYS.jobs) < 10)
        first.send(signal.SIGTERM)
        assert first.wait() == 0
        assert redis.xlen(KEYS.jobs) > 0
        start("worker", SLOW, "--announce", **environment).announced()
        assert_scored(request.result(50), images_BHWC)
        assert time.monotonic() - started_s < 45
        assert redis.hget(KEYS.events, "redeliveries") is None
        assert redis.xpending(KEYS.jobs, GROUP)["pending"] == 0  # type: ignore[index]


def test_a_request_is_named_in_all_logs(start: Start, redis_url: str) -> None:
    """From the client through the API to the worker, in lines that machines read."""
    environment = {"REDIS_URL": redis_url, "REWARD_LOG_FORMAT": "json"}
    api = start("api", "brightness", "--port", "0", "--announce", "--verbose", **environment)
    worker = start("worker", "brightness", "--announce", "--verbose", **environment)
    url = api.url()
    worker.announced()
    images_BHWC = random_images(3, 8, 8, 3)
    answer = post(url, images_BHWC, **{HEADER_REQUEST_ID: "named-by-its-client"})
    assert_scored(answer, images_BHWC)
    assert answer.headers[HEADER_REQUEST_ID] == "named-by-its-client"
    of_api = [json.loads(line) for line in api.errors().splitlines()]
    of_worker = [json.loads(line) for line in worker.errors().splitlines()]
    (answered,) = (line for line in of_api if line.get("request") == "named-by-its-client")
    assert answered["status"] == 200
    (scored,) = (line for line in of_worker if "named-by-its-client" in line.get("requests", ()))
    assert scored["images"] == 3


def test_an_api_without_redis_says_so_until_it_is_there(start: Start, tmp_path: Path) -> None:
    """503 with the reason and a time to come back, never a score; it recovers by itself."""
    with RedisServer() as redis:
        api = start("api", "brightness", "--port", "0", "--announce", REDIS_URL=redis.url)
        worker = start("worker", "brightness", "--announce", REDIS_URL=redis.url)
        url = api.url()
        worker.announced()
        images_BHWC = random_images(3, 8, 8, 3)
        assert_scored(post(url, images_BHWC), images_BHWC)
        assert redis.process is not None
        redis.process.kill()
        redis.process.wait()
        answer = httpx.get(f"{url}/readyz", trust_env=False)
        assert answer.status_code == 503
        assert "Redis is not available" in answer.json()["detail"]
        answer = post(url, images_BHWC)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        redis.revive()
        wait_until(lambda: httpx.get(f"{url}/readyz", trust_env=False).status_code == 200)
        assert_scored(post(url, images_BHWC), images_BHWC)


def test_readiness_tells_why_the_worker_could_not_start(start: Start, redis_url: str, tmp_path: Path) -> None:
    """Weights that are missing: one line and exit code 1 of the worker, 503 with the reason of the API."""
    weights = tmp_path / "clip.safetensors"
    digest = sha256_of(miniature_source("clip").path)  # type: ignore[arg-type]
    environment = {
        "REDIS_URL": redis_url,
        "REWARD_CLIP_MODEL": "mini-clip",
        "REWARD_CLIP_WEIGHTS": f"{weights}@sha256:{digest}",
    }
    url = start("api", "clip", "--port", "0", "--announce", **environment).url()
    worker = start("worker", "clip", **environment)
    assert worker.wait() == 1
    last = worker.errors().splitlines()[-1]
    assert last.startswith("error: REWARD_CLIP_WEIGHTS: reward 'clip' cannot be loaded:")
    assert f"weights {weights}: the file does not exist" in last
    answer = httpx.get(f"{url}/readyz", trust_env=False)
    assert answer.status_code == 503
    assert f"weights {weights}: the file does not exist" in answer.json()["detail"]
    weights.write_bytes(b"altered")
    assert start("worker", "clip", **environment).wait() == 1
    assert "altered or cut short" in httpx.get(f"{url}/readyz", trust_env=False).json()["detail"]
    shutil.copy(miniature_source("clip").path, weights)  # type: ignore[arg-type]
    start("worker", "clip", "--announce", **environment).announced()
    assert httpx.get(f"{url}/readyz", trust_env=False).status_code == 200


def test_readiness_tells_that_workers_are_of_another_version(start: Start, redis_url: str) -> None:
    """API and worker were told differently: each waits for the other, and the API says why."""
    url = start("api", "mini-clip", "--port", "0", "--announce", REDIS_URL=redis_url).url()
    start("worker", "mini-clip", "--announce", REDIS_URL=redis_url, REWARD_CLIP_PROMPT="a painting").announced()
    answer = httpx.get(f"{url}/readyz", trust_env=False)
    assert answer.status_code == 503
    assert "the last that started is of version mini-clip-" in answer.json()["detail"]
    assert "give API and workers the same settings" in answer.json()["detail"]


def test_readiness_does_not_repeat_a_strangers_words(start: Start, redis_url: str) -> None:
    """An error of anyone's own warm-up may hold a password: its kind is told, the rest is in the worker's log."""
    url = start("api", SECRETIVE, "--port", "0", "--announce", REDIS_URL=redis_url).url()
    worker = start("worker", SECRETIVE, REDIS_URL=redis_url)
    assert worker.wait() == 1
    assert "hunter2" in worker.errors()
    detail = httpx.get(f"{url}/readyz", trust_env=False).json()["detail"]
    assert "PermissionError, see the worker's log" in detail
    assert "hunter2" not in detail


def test_a_worker_that_redis_has_left_ends_in_one_line(start: Start) -> None:
    """After its patience, with what to check and an exit code that is not 0."""
    worker = start("worker", "brightness", REDIS_URL="unix:///nonexistent/redis.sock", REWARD_REDIS_PATIENCE_S="0.5")
    assert worker.wait() == 1
    last = worker.errors().splitlines()[-1]
    assert last.startswith("error: REDIS_URL: Redis is away for")
    assert last.endswith("check that Redis runs and REDIS_URL names it")


def test_an_api_that_never_reaches_redis_ends_in_one_line(start: Start) -> None:
    """After its patience: a wrong address must not look like a service that is about to be ready."""
    api = start("api", "brightness", "--port", "0", REDIS_URL="redis://127.0.0.1:1/0", REWARD_REDIS_PATIENCE_S="0.5")
    assert api.wait() == 1
    last = api.errors().splitlines()[-1]
    assert last.startswith("error: REDIS_URL: Redis at 127.0.0.1:1 has not answered for 0.5 s")
    assert last.endswith("check that it runs and REDIS_URL names it")


@pytest.mark.parametrize("credentials", ["", "reward:sesame"])
@pytest.mark.parametrize("role", [("api", "brightness", "--port", "0"), ("worker", "brightness")])
def test_a_wrong_password_ends_each_role_in_one_line(start: Start, role: tuple[str, ...], credentials: str) -> None:
    """At once, for waiting does not mend it; the line names the variable, and does not repeat the password."""
    with RedisServer() as server:
        with Redis.from_url(server.url) as redis:
            redis.acl_setuser("reward", enabled=True, passwords=["+open"], keys=["reward:*"], categories=["+@all"])
            redis.acl_setuser("default", enabled=False)
        place = server.url.removeprefix("unix://")
        process = start(*role, REDIS_URL=f"unix://{credentials}@{place}" if credentials else server.url)
        assert process.wait() == 1
    last = process.errors().splitlines()[-1]
    assert last.startswith(f"error: REDIS_URL: Redis at {place} refuses the user or the password")
    assert "sesame" not in process.errors()


def test_an_unknown_variable_ends_each_role_in_one_line(start: Start, redis_url: str) -> None:
    """A mistyped setting is not a setting that is silently not made."""
    for role in (
        ("api", "brightness", "--port", "0"),
        ("worker", "brightness"),
        ("serve", "brightness", "--port", "0"),
    ):
        process = start(*role, REDIS_URL=redis_url, REWARD_MAX_BACH="8")
        assert process.wait() == 1
        (line,) = process.errors().splitlines()
        assert line.startswith("error: REWARD_MAX_BACH: the services have no such setting")
        assert line.endswith("did you mean REWARD_MAX_BATCH?")
