"""`python -m services.client`: from files to scores, with one line for every error."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from services.client import RewardAnswerInvalid, RewardClient
from services.client.__main__ import PictureUnreadable, read_token, score_files
from services.images import decode_picture
from services.protocol import Limits
from services.rewards.brightness import Brightness
from tests.services.conftest import ROOT, Process, random_images
from tests.services.fake_service import URL, FakeService, batch_of, content, info, scored

TOKEN = "of-a-test"


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("REWARD_")}
    return subprocess.run(
        [sys.executable, "-m", "services.client", *map(str, arguments)],
        cwd=ROOT,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def only_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a command that failed."""
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def decoded(file: Path) -> np.ndarray:
    """The pixels that are sent for a file."""
    return decode_picture(file.read_bytes(), 0, Limits(), room_bytes=10**9)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of four sizes and four kinds, the sizes in turn."""
    folder = tmp_path_factory.mktemp("pictures")
    files = []
    for number in range(12):
        height, width = [(8, 8), (8, 6), (6, 8), (1, 1)][number % 4]
        picture = Image.fromarray(random_images(height, width, 3, seed=number))
        kind = ["png", "webp", "jpg"][number % 3]
        file = folder / f"[red]{'a long name ' * (10 * (number == 0))}{number}.{kind}"
        (picture.convert("L") if number == 6 else picture).save(file, lossless=True)
        files.append(file)
    return files


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a brightness service that wants a token and takes four images at once."""
    with (tmp_path_factory.mktemp("service") / "stderr").open("w+b") as stderr:
        environment = {"REWARD_TOKEN": TOKEN, "REWARD_MAX_IMAGES": "4", "REWARD_MAX_PROMPT_CHARS": "10"}
        arguments = ("serve", "brightness", "--port", "0", "--announce", "--until-stdin-closes")
        process = Process(arguments, environment, stderr)
        try:
            yield process.url()
            process.close_stdin()
            assert process.wait() == 0
        finally:
            process.close()


@pytest.mark.redis
def test_json_has_the_very_scores_in_the_order_of_the_files(service: str, pictures: list[Path]) -> None:
    """Of pictures of several sizes, more than the service takes at once, one of them twice."""
    files = [*pictures, pictures[0]]
    done = run(service, *files, "--json", "--prompt", "a", REWARD_TOKEN=TOKEN)
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    assert (answer["reward"], answer["version"]) == ("brightness", "1")
    assert [row["file"] for row in answer["scores"]] == [str(file) for file in files]
    expected = [Brightness().score(decoded(file)[None], None)[0] for file in files]
    assert [row["score"] for row in answer["scores"]] == expected


@pytest.mark.redis
def test_the_table_has_a_row_for_each_file(service: str, pictures: list[Path]) -> None:
    """In order, with whole names, also of files whose names look like markup; the token's variable may be another."""
    done = run(service, *pictures, "--token-env", "MY_TOKEN", MY_TOKEN=TOKEN, COLUMNS="60")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line[1:-1].split("│") for line in done.stdout.splitlines() if line.startswith("│")]
    assert "".join(row[0].strip() for row in rows).replace(" ", "") == "".join(map(str, pictures)).replace(" ", "")
    scores = [float(row[1]) for row in rows if row[1].strip()]
    expected = [Brightness().score(decoded(file)[None], None)[0] for file in pictures]
    assert scores == pytest.approx(expected, rel=1e-5)
    assert "brightness 1 (higher is better)" in done.stdout


@pytest.mark.redis
def test_a_file_that_cannot_be_read_is_named(service: str, pictures: list[Path], tmp_path: Path) -> None:
    """Missing, a folder, no picture, or cut off: exit 2, and nothing is printed of the others."""
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(pictures[0].read_bytes()[:-20])
    (tmp_path / "folder.png").mkdir()
    for name in ("missing.png", "folder.png", "text.png", "cut.png"):
        done = run(service, pictures[0], tmp_path / name, pictures[1], REWARD_TOKEN=TOKEN)
        assert done.returncode == 2, name
        assert f"{tmp_path / name}: " in only_line(done)


@pytest.mark.redis
def test_a_wrong_token_is_refused_with_the_remedy(service: str, pictures: list[Path]) -> None:
    """Exit 1; the line names the variable, and not what it holds."""
    for environment, options, name in [
        ({}, (), "REWARD_TOKEN"),
        ({"REWARD_TOKEN": "hidden"}, (), "REWARD_TOKEN"),
        ({"OTHER": "hidden", "REWARD_TOKEN": TOKEN}, ("--token-env", "OTHER"), "OTHER"),
    ]:
        done = run(service, pictures[0], *options, **environment)
        assert done.returncode == 1
        assert "401" in only_line(done)
        assert f"set {name} to the token" in done.stderr
        assert "hidden" not in done.stderr


@pytest.mark.redis
def test_a_refusal_of_one_picture_names_its_file(service: str, pictures: list[Path]) -> None:
    """The service counts in its request, the line says which file that was."""
    done = run(service, pictures[1], "--prompt", "x" * 11, REWARD_TOKEN=TOKEN)
    assert done.returncode == 1
    assert f"{pictures[1]}: " in only_line(done)
    assert "422" in done.stderr


def test_a_service_that_is_down_is_one_line(pictures: list[Path]) -> None:
    """Exit 1, soon, with the address."""
    started_s = time.monotonic()
    done = run("http://127.0.0.1:9", pictures[0])
    assert done.returncode == 1
    assert "http://127.0.0.1:9 is not available" in only_line(done)
    assert time.monotonic() - started_s < 30


def test_a_service_that_is_silent_is_one_line_by_the_deadline(pictures: list[Path]) -> None:
    """Exit 1, after the seconds that the command line gives."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        started_s = time.monotonic()
        done = run(f"http://127.0.0.1:{listener.getsockname()[1]}", pictures[0], "--deadline", "0.5")
    assert done.returncode == 1
    assert "deadline" in only_line(done)
    assert time.monotonic() - started_s < 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "required: URL, FILE"),
        ((URL,), "required: FILE"),
        ((URL, "a.png", "--deadline", "0"), "positive number of seconds"),
        ((URL, "a.png", "--deadline", "inf"), "positive number of seconds"),
        ((URL, "a.png", "--token", "hidden"), "unrecognized arguments"),
        ((URL, "a.png", "--token-env", "hid-den"), "no name of an environment variable"),
        ((URL, "a.png", "--token-env", "ABSENT"), "ABSENT: the variable is not set"),
        (("reward:80", "a.png"), "give http://HOST:PORT"),
    ],
)
def test_a_wrong_command_line_exits_2(arguments: tuple[str, ...], message: str) -> None:
    """Before anything is sent; the token cannot be given there, and one that was given by mistake is not repeated."""
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "hid-den" not in done.stderr


@pytest.mark.anyio
@pytest.mark.parametrize("portion_bytes", [1, 200, 500, 10**9])
async def test_portions_and_sizes_change_no_score_and_no_order(pictures: list[Path], portion_bytes: int) -> None:
    """However few pixels are held at once; a request holds one size."""
    service = FakeService()
    async with RewardClient(URL, transport=service.transport) as client:
        result = await score_files(client, pictures, None, deadline_s=30, portion_bytes=portion_bytes)
    assert result.scores == [content(decoded(file)) for file in pictures]
    batches = [batch_of(request).images_HWC for request in service.posts]
    assert all(len({image_HWC.shape for image_HWC in batch}) == 1 for batch in batches)
    assert all(len(batch) == 1 or sum(image_HWC.nbytes for image_HWC in batch) <= portion_bytes for batch in batches)
    assert len(batches) == (4 if portion_bytes == 10**9 else len(batches))


@pytest.mark.anyio
async def test_one_table_is_of_one_model(pictures: list[Path]) -> None:
    """A service that is upgraded between two portions gives no table."""
    service = FakeService()

    def on_score(request: httpx.Request) -> httpx.Response:
        return scored(request, version="1" if len(service.posts) < 3 else "2")

    service.on_score = on_score
    async with RewardClient(URL, transport=service.transport) as client:
        with pytest.raises(RewardAnswerInvalid, match="changed its model between pictures"):
            await score_files(client, pictures, None, deadline_s=30, portion_bytes=1)


@pytest.mark.anyio
async def test_a_picture_beyond_the_services_limits_is_not_sent(pictures: list[Path]) -> None:
    """The limit is the service's own; the message names the file."""
    service = FakeService(told=info(max_pixels=63))
    async with RewardClient(URL, transport=service.transport) as client:
        with pytest.raises(PictureUnreadable, match="limit of 63 pixels") as caught:
            await score_files(client, pictures[:1], None, deadline_s=30)
    assert str(pictures[0]) in str(caught.value)
    assert not service.posts


def test_other_settings_of_services_do_not_concern_a_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell may hold what is meant for a service, right or wrong."""
    monkeypatch.setenv("REDIS_URL", "nonsense")
    monkeypatch.setenv("REWARD_MAX_IMAGES", "0")
    monkeypatch.setenv("REWARD_TOKEN", "of-a-test")
    monkeypatch.setenv("OTHER_TOKEN", "of-another")
    assert read_token(None) == "of-a-test"
    assert read_token("OTHER_TOKEN") == "of-another"
    with pytest.raises(ValueError, match="--token-env NONE: the variable is not set"):
        read_token("NONE")
