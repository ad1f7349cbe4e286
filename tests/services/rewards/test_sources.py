"""Where weights come from: names, files and their digests, and a publisher that may be away or send something else."""

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from services.rewards.sources import MISSING, Published, WeightsError, check_file, fetch, parse_source

CONTENT = b"some weights" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@contextmanager
def publisher(content: bytes) -> Iterator[str]:
    """A server on loopback that answers every GET with these bytes, and counts them not."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/a%2Bhead.pth"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def published(url: str) -> Published:
    """What `CONTENT` was published as."""
    return Published(url, DIGEST, len(CONTENT))


@pytest.mark.parametrize(
    ("text", "name", "path", "sha256"),
    [
        ("openai", "openai", None, None),
        ("laion2b_s32b_b82k", "laion2b_s32b_b82k", None, None),
        ("/weights/ViT-L-14", None, "/weights/ViT-L-14", None),
        ("hps.pt", None, "hps.pt", None),
        (f"./a b.safetensors@sha256:{DIGEST.upper()}", None, "a b.safetensors", DIGEST),
    ],
)
def test_names_and_paths_are_told_apart(text: str, name: str | None, path: str | None, sha256: str | None) -> None:
    """A slash or the suffix of a weight file makes a path, which a digest may follow."""
    source = parse_source(text)
    assert (source.name, source.path and str(source.path), source.sha256) == (name, path, sha256)


@pytest.mark.parametrize("text", ["", "  ", "a.pt@sha256:12", f"openai@sha256:{DIGEST}", "a.pt@sha256:"])
def test_a_setting_that_names_no_weights_is_refused(text: str) -> None:
    """With what would do."""
    with pytest.raises(ValueError, match="give"):
        parse_source(text)


def test_weights_are_told_apart_by_their_content(tmp_path: Path) -> None:
    """A file is its digest, whether it is given or computed; one that is not there has an identity too."""
    file = tmp_path / "a.pt"
    assert parse_source(str(file)).identity() == MISSING
    file.write_bytes(CONTENT)
    assert parse_source(str(file)).identity() == DIGEST
    assert parse_source(f"{file}@sha256:{DIGEST}").identity() == DIGEST
    assert parse_source("openai").identity() == "openai"


def test_a_file_is_held_to_its_digest(tmp_path: Path) -> None:
    """Missing, a folder, altered: each has its own words."""
    file = tmp_path / "a.pt"
    with pytest.raises(WeightsError, match="does not exist"):
        check_file(file, None)
    with pytest.raises(WeightsError, match="is no regular file"):
        check_file(tmp_path, None)
    file.write_bytes(CONTENT[:-1])
    assert check_file(file, None) == file
    with pytest.raises(WeightsError, match=f"expected {DIGEST}: the file was altered or cut short"):
        check_file(file, DIGEST)


def test_a_published_file_is_fetched_once_and_kept(tmp_path: Path) -> None:
    """The second time no network is needed."""
    with publisher(CONTENT) as url:
        path = fetch(published(url), tmp_path / "cache")
    assert path == tmp_path / "cache" / "a+head.pth"
    assert path.read_bytes() == CONTENT
    assert fetch(published(url), tmp_path / "cache") == path
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT[:-1] + b"!", CONTENT + b"!", b""])
def test_another_file_is_not_kept(content: bytes, tmp_path: Path) -> None:
    """Shorter, altered, longer or empty: an error, and nothing is left behind."""
    with publisher(content) as url, pytest.raises(WeightsError, match=r"cut short|answers more than the 12000 bytes"):
        fetch(published(url), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_there_is_one_clear_error(tmp_path: Path) -> None:
    """It names the address, the reason, and what to do."""
    with publisher(CONTENT) as url:
        pass
    with pytest.raises(WeightsError, match=r"Connection refused.*fetch it where there is a network") as caught:
        fetch(published(url), tmp_path)
    assert url in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_altered_file_in_the_cache_is_named(tmp_path: Path) -> None:
    """It is not overwritten: whoever put it there may want to know."""
    (tmp_path / "a+head.pth").write_bytes(b"altered")
    with pytest.raises(WeightsError, match="altered"):
        fetch(published("http://127.0.0.1:9/a%2Bhead.pth"), tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """The network is not blamed."""
    (tmp_path / "file").write_bytes(b"")
    with publisher(CONTENT) as url, pytest.raises(WeightsError, match=r"cannot be kept in .*set REWARD_CACHE_DIR"):
        fetch(published(url), tmp_path / "file" / "below")


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    """Nobody waits for what will never be written."""
    os.mkfifo(tmp_path / "a.pt")
    source = parse_source(str(tmp_path / "a.pt"))
    assert source.identity() == MISSING
    with pytest.raises(WeightsError, match="is no regular file"):
        check_file(tmp_path / "a.pt", None)


def test_a_source_is_held_to_what_was_there(tmp_path: Path) -> None:
    """A file that is exchanged after the reward said its version is refused."""
    file = tmp_path / "a.pt"
    assert parse_source(str(file)).held() == parse_source(str(file))
    file.write_bytes(CONTENT)
    held = parse_source(str(file)).held()
    assert held.sha256 == DIGEST
    file.write_bytes(CONTENT + b"!")
    with pytest.raises(WeightsError, match="altered"):
        check_file(file, held.sha256)
