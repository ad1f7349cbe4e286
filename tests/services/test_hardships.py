"""Processes that are treated badly: each says what is wrong in one line, or goes on."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from redis import Redis

from services.batching.keys import Keys
from services.images import encode_batch
from services.protocol import HEADER_DEADLINE_MS, HEADER_IDEMPOTENCY_KEY, MEDIA_SAFETENSORS
from services.redis_server import RedisServer
from services.settings import Settings, SettingsError, load_settings
from tests.services.conftest import Process, random_images, wait_until

pytestmark = pytest.mark.redis

Start = Callable[..., Process]
DUMMY = "tests.services.dummies:"
BODY = encode_batch(random_images(1, 8, 8, 3))


def post(url: str, **headers: str) -> httpx.Response:
    """One request, without a client that would try again."""
    headers = {"Content-Type": MEDIA_SAFETENSORS, **headers}
    return httpx.post(f"{url}/score", content=BODY, headers=headers, timeout=60, trust_env=False)


@pytest.mark.parametrize("url", ["redis://:pass/word@h:6379", "redis://:pa#ss@h:6379", "redis://h:99999"])
@pytest.mark.parametrize("role", ["api", "worker", "dead"])
def test_a_redis_url_that_is_none_is_one_line(start: Start, role: str, url: str) -> None:
    """Without a part of its password, and with how to write it."""
    process = start(role, "brightness", REDIS_URL=url)
    assert process.wait() == 1
    (line,) = process.errors().splitlines()
    assert line.startswith("error: REDIS_URL: ")
    assert "HOST:PORT" in line
    assert "pa" not in line.replace("password", "").replace("part", "")


def test_a_job_is_never_larger_than_a_forward_pass() -> None:
    """Whoever lowers the batch for a small GPU means it."""
    assert Settings(max_batch=8, _env_file=None).images_per_job == 8
    assert Settings(_env_file=None).images_per_job == Settings(_env_file=None).job_images


def test_a_hanging_image_is_found_within_a_deadline() -> None:
    """By default: hung in a batch, taken over, hung alone and given up, all before its caller goes."""
    settings = Settings(_env_file=None)
    assert 2 * (settings.score_timeout_s + 1.5 * settings.lease_ms / 1000) < settings.default_deadline_s


def test_settings_are_refused_without_their_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one that is wrong, by its name."""
    monkeypatch.setenv("REWARD_MAX_BATCH", "none")
    with pytest.raises(SettingsError, match=r"^REWARD_MAX_BATCH: "):
        load_settings()


def test_a_token_that_fits_no_header_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No client could send it; the message does not show it."""
    monkeypatch.setenv("REWARD_TOKEN", "two words")
    with pytest.raises(SettingsError, match=r"^REWARD_TOKEN: .*without spaces$") as caught:
        load_settings()
    assert "two words" not in str(caught.value)


def test_rewards_that_call_themselves_alike_are_refused(start: Start) -> None:
    """They would share a queue and answer for each other."""
    process = start("serve", "brightness", f"{DUMMY}Twin", "--port", "0", "--announce", "--until-stdin-closes")
    assert process.wait() == 1
    (line,) = process.errors().splitlines()
    assert line == (
        f"error: brightness and {DUMMY}Twin both call themselves brightness 1: give one of them another name or version"
    )


def test_a_worker_that_cannot_even_look_at_its_clock_is_ended(start: Start, redis_url: str) -> None:
    """Native code that keeps the interpreter's lock stops the event loop too; the process ends all the same."""
    environment = {"REDIS_URL": redis_url, "REWARD_SCORE_TIMEOUT_S": "0.5"}
    url = start("api", f"{DUMMY}Stuck", "--port", "0", "--announce", **environment).url()
    worker = start("worker", f"{DUMMY}Stuck", "--announce", **environment)
    worker.announced()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(post, url, **{HEADER_DEADLINE_MS: "3000"})
        assert worker.wait(30) == 1
    assert "Timeout (0:00:05" in worker.errors()
    assert "dummies.py" in worker.errors()


def test_a_frozen_redis_holds_nobody_beyond_a_deadline(start: Start) -> None:
    """With a key or without: an error when the time is over, and scores again when Redis wakes; metrics meanwhile."""
    with RedisServer() as redis:
        assert redis.process is not None
        environment = {"REDIS_URL": redis.url, "REWARD_REDIS_TIMEOUT_S": "20"}
        url = start("api", "brightness", "--port", "0", "--announce", **environment).url()
        start("worker", "brightness", "--announce", **environment).announced()
        assert post(url).status_code == 200
        redis.process.send_signal(signal.SIGSTOP)
        try:
            for headers in ({}, {HEADER_IDEMPOTENCY_KEY: "a-key"}):
                started_s = time.monotonic()
                answer = post(url, **{HEADER_DEADLINE_MS: "1000"}, **headers)
                assert answer.status_code == 504, answer.text
                assert time.monotonic() - started_s < 4
            told = httpx.get(f"{url}/metrics", timeout=4, trust_env=False).text
            assert "reward_requests_total" in told
            assert "reward_queue_images" not in told
        finally:
            redis.process.send_signal(signal.SIGCONT)
        wait_until(lambda: post(url).status_code == 200)


def test_a_connection_without_a_request_is_closed(start: Start) -> None:
    """Silent ones and half a head; one that is kept for the next request is not, before its own time."""
    process = start(
        "serve", "brightness", "--port", "0", "--announce", "--until-stdin-closes", REWARD_UPLOAD_STALL_S="1"
    )
    url = process.url()
    host, _, port = url.removeprefix("http://").partition(":")
    for head in (b"", b"GET /healthz HT", b"POST /score HTTP/1.1\r\nHost: x\r\nX-Slow: "):
        with socket.create_connection((host, int(port)), timeout=10) as slow:
            slow.sendall(head)
            started_s = time.monotonic()
            assert slow.recv(1) == b""
            assert 0.5 < time.monotonic() - started_s < 5
    with httpx.Client(base_url=url, trust_env=False) as client:
        assert client.get("/healthz").status_code == 200
        time.sleep(1.5)
        assert client.get("/healthz").status_code == 200
    with socket.create_connection((host, int(port)), timeout=10) as kept:
        kept.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert kept.recv(4096).startswith(b"HTTP/1.1 200")
        kept.sendall(b"GET /hea")  # the head of a second one, cut short
        started_s = time.monotonic()
        while kept.recv(4096):
            pass
        assert time.monotonic() - started_s < 5


def test_a_head_without_end_is_refused(start: Start) -> None:
    """Whether in one value, many headers, blank lines or behind a body; and no other protocol is spoken."""
    url = start("serve", "brightness", "--port", "0", "--announce", "--until-stdin-closes").url()
    host, _, port = url.removeprefix("http://").partition(":")
    post_head = b"POST /score HTTP/1.1\r\nHost: x\r\n"
    heads = (
        (post_head + b"X-Long: ", b"x" * 1024),
        (post_head, b"X-Many: x\r\n" * 100),
        (b"", b"\r\n" * 512),
        (post_head + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nX-Trail: ", b"x" * 1024),
        (post_head + b"Transfer-Encoding: chunked\r\n\r\n1;", b"x" * 1024),
    )
    for head, more in heads:
        with socket.create_connection((host, int(port)), timeout=10) as greedy:
            greedy.sendall(head)
            sent = 0
            with contextlib.suppress(ConnectionError):  # it is closed before everything is sent
                while sent < 4 * 2**20:
                    sent += greedy.send(more)
            assert sent < 4 * 2**20, head
    body = encode_batch(random_images(1, 256, 256, 3))
    chunked = httpx.post(
        f"{url}/score", content=iter([body[:9], body[9:]]), headers={"Content-Type": MEDIA_SAFETENSORS}
    )
    assert chunked.status_code == 200, chunked.text
    upgrading = httpx.post(
        f"{url}/score",
        content=body,
        headers={"Content-Type": MEDIA_SAFETENSORS, "Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c"},
    )
    assert upgrading.status_code == 400, upgrading.text
    assert "Upgrade" in upgrading.json()["detail"]
    info = httpx.get(f"{url}/info", headers={"Connection": "Upgrade", "Upgrade": "h2c"})
    assert info.status_code == 200, info.text


def test_a_request_named_like_markup_is_shown(start: Start, redis_url: str) -> None:
    """The name of a dead letter's request is its client's choice."""
    fields = {"uid": "u", "request": "[/x]", "reason": "[bold]", "images": 1, "deliveries": 4, "submitted": 1}
    with Redis.from_url(redis_url) as redis:
        redis.xadd(Keys("brightness", "1").dead, fields)
        redis.expire(Keys("brightness", "1").dead, 60)
    shown = start("dead", "brightness", REDIS_URL=redis_url, COLUMNS="200")
    assert shown.wait() == 0
    text = shown.rest_of_stdout().decode()
    assert "[/x]" in text
    assert "[bold]" in text


def test_the_address_of_an_embedded_queue_is_logged(start: Start) -> None:
    """So that dead letters can be looked at beside a plain `serve`."""
    process = start("serve", "brightness", "--port", "0", "--announce", "--verbose", "--until-stdin-closes")
    process.announced()
    (line,) = (line for line in process.errors().splitlines() if "queue at unix://" in line)
    shown = start("dead", "brightness", REDIS_URL=line.rpartition("queue at ")[2].strip())
    assert shown.wait() == 0
    lost = start("dead", "brightness", REDIS_URL="")
    assert lost.wait() == 1
    assert "the address that `serve` logs" in lost.errors()
    assert os.path.exists(line.rpartition("unix://")[2].strip())
