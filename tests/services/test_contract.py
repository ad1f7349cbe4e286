"""docs/contract.md is true: its shell lines run against a real service, and its tables are the code's."""

import json
import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest

from services import protocol
from services.http.bodies import MEDIA_TYPES
from services.http.problems import KINDS
from services.images import encode_batch, encode_json, encode_png
from services.rewards.brightness import Brightness
from services.settings import Settings
from tests.services.conftest import ROOT, Process, random_images
from tests.shellblocks import blocks

PAGE = ROOT / "docs" / "contract.md"
TEXT = PAGE.read_text("utf-8")
ADDRESS = "http://127.0.0.1:8000"
SERVE = ("serve", "brightness", "--port", "0", "--announce", "--until-stdin-closes")
Start = Callable[..., Process]


def shell(script: str, folder: Path) -> str:
    """What a script prints; any failing line fails it."""
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, ""), script
    return done.stdout


def table(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    rows = [line for line in TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


@pytest.fixture
def url(start: Start) -> str:
    """A real service, started as the page's first shell line has it but for the port."""
    serve = shlex.split(blocks(PAGE, "sh")[0])
    assert serve[:3] == ["python", "-m", "services"]
    serve[serve.index("--port") + 1] = "0"
    return start(*serve[3:], "--announce", "--until-stdin-closes").url()


@pytest.mark.redis
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not on the PATH")
def test_the_shell_lines_of_the_page_run_and_answer_as_shown(url: str, tmp_path: Path) -> None:
    """Each block is followed by the JSON that it prints; the last one asks for all that has no body."""
    _, *scripts, last = blocks(PAGE, "sh")
    answers = blocks(PAGE, "json")
    assert len(scripts) == len(answers) == 5
    for script, answer in zip(scripts, answers, strict=True):
        given, shown = (json.loads(text) for text in (shell(script.replace(ADDRESS, url), tmp_path), answer))
        assert set(given.pop("timing_ms", {})) == set(shown.pop("timing_ms", {}))
        assert given.pop("scores", None) == pytest.approx(shown.pop("scores", None), abs=1e-9)
        assert given == shown
    info, ready, metrics = (shell(line.replace(ADDRESS, url), tmp_path) for line in last.splitlines())
    assert protocol.Info.model_validate_json(info).name == "brightness"
    assert json.loads(ready) == {"status": "ok"}
    assert re.search(r"^reward_images_total\{.*\} 7\.0$", metrics, flags=re.MULTILINE)


@pytest.mark.redis
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not on the PATH")
def test_the_same_pictures_have_the_same_scores_in_any_body(url: str, tmp_path: Path) -> None:
    """curl -F, JSON and safetensors, through the whole path, against the reward itself."""
    images_BHWC = random_images(20, 16, 24, 3)
    for index, image_HWC in enumerate(images_BHWC):
        (tmp_path / f"{index}.png").write_bytes(encode_png(image_HWC))
    files = " ".join(f"-F images=@{index}.png" for index in range(len(images_BHWC)))
    scores = [json.loads(shell(f"curl -sS {files} {url}/score", tmp_path))["scores"]]
    for encode, media in ((encode_json, protocol.MEDIA_JSON), (encode_batch, protocol.MEDIA_SAFETENSORS)):
        answer = httpx.post(
            f"{url}/score", content=encode(images_BHWC), headers={"Content-Type": media}, trust_env=False, timeout=60
        )
        scores.append(answer.json()["scores"])
    assert np.array_equal(scores, [Brightness().score(images_BHWC, None)] * 3)


@pytest.mark.redis
def test_a_repeat_over_the_wire_brings_the_first_answer_back(url: str) -> None:
    """As the page says of Idempotency-Key, with the real queue behind it."""
    images_BHWC = random_images(2, 8, 8, 3)

    def post(body: bytes, media: str) -> httpx.Response:
        headers = {"Content-Type": media, protocol.HEADER_IDEMPOTENCY_KEY: "key-of-a-test"}
        return httpx.post(f"{url}/score", content=body, headers=headers, trust_env=False, timeout=60)

    first = post(encode_batch(images_BHWC), protocol.MEDIA_SAFETENSORS)
    repeat = post(encode_json(images_BHWC), protocol.MEDIA_JSON)
    assert first.status_code == 200
    assert repeat.content == first.content
    assert repeat.headers[protocol.HEADER_IDEMPOTENCY_REPLAYED] == "true"
    assert protocol.HEADER_IDEMPOTENCY_REPLAYED not in first.headers
    other = post(encode_batch(images_BHWC[::-1]), protocol.MEDIA_SAFETENSORS)
    assert (other.status_code, other.json()["type"]) == (422, "urn:reward:idempotency-key-reused")


@pytest.mark.redis
def test_a_silent_upload_is_ended_over_the_wire(start: Start) -> None:
    """408 with its problem, and the connection is closed; a request that comes byte by byte is answered meanwhile."""
    address = httpx.URL(start(*SERVE, REWARD_UPLOAD_STALL_S="0.5").url())
    body = encode_batch(random_images(1, 4, 4, 3))
    head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: {protocol.MEDIA_SAFETENSORS}\r\nContent-Length: "
    with (
        socket.create_connection((address.host, address.port), timeout=20) as silent,
        socket.create_connection((address.host, address.port), timeout=20) as slow,
    ):
        silent.sendall(f"{head}{64 * 2**20}\r\n\r\nabc".encode())
        slow.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in f"{head}{len(body)}\r\nConnection: close\r\n\r\n".encode() + body:
            slow.send(bytes([byte]))
        assert b"".join(iter(lambda: slow.recv(4096), b"")).startswith(b"HTTP/1.1 200 ")
        answer = b"".join(iter(lambda: silent.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"after 3 bytes" in answer


def test_every_kind_of_problem_stands_in_the_table() -> None:
    """With its status."""
    assert {kind.strip("`"): int(status) for status, kind, *_ in table("Problems")} == {
        name: kind.status for name, kind in KINDS.items()
    }


def test_limits_and_their_defaults_are_the_settings() -> None:
    """Each variable, and the number beside it."""
    settings = Settings.model_construct()
    rows = table("Limits")
    assert len(rows) == 10
    for variable, default, _ in rows:
        value = getattr(settings, variable.strip("`").removeprefix("REWARD_").lower())
        assert float(default.replace(" ", "")) == value, variable


def test_the_bodies_and_headers_of_the_page_are_the_protocols() -> None:
    """No more and no fewer."""
    bodies = [media for cell, _ in table("Bodies of `POST /score`") for media in re.findall("`(.+?)`", cell)]
    assert bodies == list(MEDIA_TYPES)
    (remedy,) = (row[-1] for row in table("Problems") if row[1] == "`unsupported-media-type`")
    assert f"one of the {len(MEDIA_TYPES)} above" in remedy
    headers = {header.strip("`").partition(":")[0] for header, *_ in table("Headers")}
    assert headers == {
        "Authorization",
        protocol.HEADER_DEADLINE_MS,
        protocol.HEADER_IDEMPOTENCY_KEY,
        protocol.HEADER_IDEMPOTENCY_REPLAYED,
        protocol.HEADER_REQUEST_ID,
        protocol.HEADER_RETRY_AFTER,
    }
