"""Password, ACL user and TLS, all by URL, against whichever Redis is found."""

import contextlib
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError

from services.batching.errors import QueueAway
from services.batching.streams import connect
from services.batching.submit import SubmitQueue
from services.redis_server import find_redis
from services.rewards.brightness import Brightness
from tests.services.batching.workbench import KEYS, expected, jobs_of, scores, working
from tests.services.conftest import wait_until

pytestmark = [pytest.mark.redis, pytest.mark.anyio]

PASSWORD = "of-a-test"
# What docs/reliability.md gives as all that the services need.
USER = f"user reward on >{PASSWORD} resetkeys ~reward:* resetchannels -@all +@read +@write +@stream +@scripting"
USER += " +@connection +time -@dangerous"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def redis_with(folder: Path, options: Sequence[str], admin_url: str) -> Iterator[None]:
    """A Redis with these options; skips the test if it does not know them."""
    command = [find_redis(), "--dir", str(folder), "--save", "", "--bind", "127.0.0.1", *options]
    with (folder / "redis.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            with Redis.from_url(admin_url, socket_timeout=5) as admin:

                def answers() -> bool:
                    if process.poll() is not None:
                        pytest.skip(f"this Redis cannot: {(folder / 'redis.log').read_text()[-200:]}")
                    with contextlib.suppress(RedisError):
                        return bool(admin.ping())
                    return False

                wait_until(answers)
            yield
        finally:
            process.terminate()


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not on PATH; it makes the certificate")
    certificate, key = folder / "redis.crt", folder / "redis.key"
    words = "req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([openssl, *words.split(), *files], check=True, capture_output=True)
    return certificate, key


async def score_by(url: str) -> None:
    """The whole path through the queue at this address."""
    client = connect(url, timeout_s=5.0)
    try:
        async with (
            SubmitQueue(client, KEYS, queue_images=64, queue_bytes=2**20) as api,
            working(client, Brightness()),
        ):
            assert await api.ready()
            assert scores(await api.score(jobs_of(40), deadline_s=20.0)) == expected(jobs_of(40))
            await api.survey()
    finally:
        await client.aclose()


async def test_a_password(tmp_path: Path) -> None:
    """It is taken from the URL; a wrong one is an error that does not show it."""
    port = free_port()
    url = f"redis://:{PASSWORD}@127.0.0.1:{port}"
    with redis_with(tmp_path, ["--port", str(port), "--requirepass", PASSWORD], url):
        await score_by(url)
        client = connect(f"redis://:wrong-{PASSWORD}@127.0.0.1:{port}", timeout_s=5.0)
        async with SubmitQueue(client, KEYS, queue_images=64, queue_bytes=2**20) as api:
            with pytest.raises(QueueAway) as caught:
                await api.ready()
        await client.aclose()
        assert isinstance(caught.value.__cause__, AuthenticationError)
        assert PASSWORD not in str(caught.value)


async def test_a_user_with_few_rights(tmp_path: Path) -> None:
    """The rights that the documentation names are enough, and do not reach beyond the services' keys."""
    port = free_port()
    admin_url = f"redis://:admin@127.0.0.1:{port}"
    (tmp_path / "users.acl").write_text(f"user default on >admin ~* &* +@all\n{USER}\n")
    with redis_with(tmp_path, ["--port", str(port), "--aclfile", str(tmp_path / "users.acl")], admin_url):
        url = f"redis://reward:{PASSWORD}@127.0.0.1:{port}"
        await score_by(url)
        with Redis.from_url(url) as client:
            for refused in (client.flushall, client.keys, lambda: client.get("other")):
                with pytest.raises(NoPermissionError):
                    refused()


async def test_tls(tmp_path: Path) -> None:
    """`rediss://`, with an authority of one's own."""
    certificate, key = make_certificate(tmp_path)
    port = free_port()
    options = ["--port", "0", "--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key)]
    options += ["--tls-ca-cert-file", str(certificate), "--tls-auth-clients", "no"]
    url = f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificate}"
    with redis_with(tmp_path, options, url):
        await score_by(url)
