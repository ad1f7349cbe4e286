"""Small things that every process of a service needs."""

import asyncio
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys

import pytest

from services.batching.errors import QueueAway
from services.processes import StartError, bind, bind_several, descriptor_limit, stop_on_signals
from tests.services.conftest import ROOT


async def answers_at_once(listener: socket.socket) -> bool:
    """Whether a server of asyncio on this socket sends small answers without waiting for more (TCP_NODELAY)."""
    found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def on_client(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        found.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(on_client, sock=listener):
        _, writer = await asyncio.open_connection(*listener.getsockname()[:2])
        nodelay = await found
        writer.close()
        await writer.wait_closed()
    return bool(nodelay)


def test_a_bound_socket_answers_at_once() -> None:
    """Nagle's algorithm and delayed acknowledgements together cost 40 ms an answer."""
    assert asyncio.run(answers_at_once(bind("127.0.0.1", 0)))


def test_connections_are_spread_over_the_sockets_of_an_address() -> None:
    """By a hash of the addresses: of 64, fewer than 8 at one of two would be seen once in 10^10 times."""
    listeners = bind_several("127.0.0.1", 0, 2)
    address = listeners[0].getsockname()
    assert listeners[1].getsockname() == address
    callers = [socket.create_connection(address) for _ in range(64)]
    counts = [0, 0]
    with selectors.DefaultSelector() as selector:
        for number, listener in enumerate(listeners):
            selector.register(listener, selectors.EVENT_READ, number)
        while sum(counts) < len(callers):
            events = selector.select(timeout=10)
            assert events
            for key, _ in events:
                listeners[key.data].accept()[0].close()
                counts[key.data] += 1
    for connection in (*callers, *listeners):
        connection.close()
    assert min(counts) >= 8


@pytest.mark.parametrize(("first", "second"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_an_address_in_use_is_refused_however_many_share_it(first: int, second: int) -> None:
    """Two services that shared a port would answer for each other."""
    listeners = bind_several("127.0.0.1", 0, first)
    port = listeners[0].getsockname()[1]
    with pytest.raises(StartError, match=f"port {port} on 127.0.0.1 is in use: choose another --port"):
        bind_several("127.0.0.1", port, second)
    for listener in listeners:
        listener.close()
    for listener in bind_several("127.0.0.1", port, second):  # nothing of either is left
        listener.close()


def test_a_name_is_looked_up_once_for_all_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has several addresses gives another each time."""
    addresses = iter(("127.0.0.2", "127.0.0.3"))
    monkeypatch.setattr(
        "socket.getaddrinfo",
        lambda _, port, **__: [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (next(addresses), port))],
    )
    listeners = bind_several("several.example", 0, 3)
    assert {listener.getsockname()[0] for listener in listeners} == {"127.0.0.2"}
    for listener in listeners:
        listener.close()


def test_a_role_may_open_as_many_files_as_the_system_allows() -> None:
    """The limit that a shell gives is meant for programs of another kind."""
    program = (
        "import resource, sys; from services.__main__ import main; main(['list']); "
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE), file=sys.stderr)"
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    try:
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert done.stderr.split() == [str(hard)] * 2


def test_a_process_out_of_descriptors_does_not_call_redis_missing() -> None:
    """Whoever reads it looks at the limit, and not for a Redis that is there."""
    wrapped = ConnectionError("cannot connect")
    wrapped.__context__ = OSError(24, "Too many open files")
    for error in (wrapped, wrapped.__context__):
        said = str(QueueAway.of(error))
        assert "not available" not in said
        assert f"all of the {descriptor_limit()} files" in said
        assert "ulimit -n" in said
    assert str(QueueAway.of(ConnectionRefusedError(111, "refused"))) == "Redis is not available ([Errno 111] refused)"


@pytest.mark.parametrize(("handler", "expected"), [(signal.SIG_IGN, []), (signal.SIG_DFL, [signal.SIGHUP])])
def test_what_nohup_started_outlives_its_terminal(handler: signal.Handlers, expected: list[int]) -> None:
    """The end of a terminal stops what was started from it, unless that was told to ignore it."""

    async def end_terminal() -> list[int]:
        stop = asyncio.Event()
        received = stop_on_signals(stop, (signal.SIGTERM, signal.SIGHUP))
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)
        await stop.wait()
        await asyncio.sleep(0.05)
        return [number for number in received if number != signal.SIGTERM]

    before = signal.signal(signal.SIGHUP, handler)
    try:
        assert asyncio.run(end_terminal()) == expected
    finally:
        signal.signal(signal.SIGHUP, before)
