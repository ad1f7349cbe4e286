"""Small things that every process of a service needs: a socket, a log, one line of error, a death with its parent."""

import asyncio
import contextlib
import ctypes
import errno
import gc
import json
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterable
from typing import Any, TextIO

PR_SET_PDEATHSIG = 1
EXIT_INTERRUPTED = 130
LISTEN_BACKLOG = 2048
LAST_PORT = 65535
LARGE_BYTES = 2**20
"""Buffers of this size go back to the system when they are freed."""
KEPT_BYTES = 8 * 2**20
"""Free memory that malloc keeps at its end: the pieces of the bodies that are being read come and go there."""


class StartError(RuntimeError):
    """A process cannot start; its message is the one line to print."""


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process with its parent (Linux; elsewhere nothing).

    Args:
        parent: process id of the parent, which may be gone already; then this process ends at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(1)


def return_freed_memory() -> None:
    """Give the memory of large buffers back to the system when they are freed (mallopt(3); glibc alone).

    By itself it learns to keep what is often asked for: bodies of all sizes on many threads then add up over the days.
    What is smaller than `LARGE_BYTES` is kept, up to `KEPT_BYTES` of it: asyncio reads a socket in pieces of 256 KiB,
    and a piece whose memory is new each time costs a page fault for every 4 KiB.
    """
    m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((m_trim_threshold, KEPT_BYTES), (m_mmap_threshold, LARGE_BYTES), (m_arena_max, 2)):
            mallopt(parameter, value)


def raise_descriptor_limit() -> None:
    """Let this process, and those that it starts, open as many files as the system allows them (`ulimit -Hn`).

    The usual 1024 are there for programs that call select(2). Each connection takes one, and each request whose images
    lie in shared memory two more.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems refuse what they name as their limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def descriptor_limit() -> int:
    """How many files this process may have open at a time, connections and shared memory among them."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def spare_what_stays() -> None:
    """Have the garbage collector pass over what there is now, modules and models, which stays to the end.

    It went through all of it again and again: 4 % of the processor time of an API that is sent single pictures.
    """
    gc.collect()
    gc.freeze()


def describe(error: Exception) -> str:
    """An error of any kind in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(": ")


def open_standard_streams() -> None:
    """Put /dev/null in the place of a standard stream that is closed, lest a socket or file take its number."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one


def inherit(descriptor: int) -> socket.socket:
    """The listening socket that a parent passed on.

    Raises:
        StartError: the descriptor is no socket.
    """
    try:
        return socket.socket(fileno=descriptor)
    except OSError as error:
        raise StartError(f"descriptor {descriptor} is no socket ({error.strerror}): give --port instead") from error


def bind(host: str, port: int) -> socket.socket:
    """Bind and listen; port 0 takes a free one.

    Raises:
        StartError: the address cannot be had; the message names it.
    """
    return bind_several(host, port, 1)[0]


def bind_several(host: str, port: int, count: int) -> list[socket.socket]:
    """Bind and listen with several sockets at one address; Linux spreads the connections over them (socket(7)).

    Processes that shared one socket would race for its connections, and those that are kept would stay where they came.

    Args:
        host, port: of all of them; port 0 takes a free one.
        count: of sockets, 1 or more.

    Raises:
        StartError: the address cannot be had; the message names it.
    """
    if not 0 <= port <= LAST_PORT:  # the system would take the rest of a division by 65536
        raise StartError(f"port {port} does not exist: choose a --port from 0 to {LAST_PORT}")
    with contextlib.ExitStack() as stack:
        try:
            # With its protocol named: asyncio sets TCP_NODELAY only then, without which answers are 40 ms late.
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listeners = [stack.enter_context(socket.socket(family, kind, protocol))]
            listeners[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listeners[0].bind(address)
            listeners[0].listen(LISTEN_BACKLOG)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                remedy = "is in use: choose another --port, or 0 for a free one"
            else:
                remedy = f"cannot be listened on ({error}): choose another --host or --port"
            raise StartError(f"port {port} on {host} {remedy}") from error
        try:
            # Only now that the address is its own does the first let others in: so one in use is found.
            for _ in range(count - 1):
                listeners[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                listener = stack.enter_context(socket.socket(family, kind, protocol))
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                listener.bind(listeners[0].getsockname())
                listener.listen(LISTEN_BACKLOG)
                listeners.append(listener)
        except OSError as error:
            raise StartError(f"{count} processes cannot share a port here ({error}): let one have it") from error
        stack.pop_all()
    return listeners


def url_of(listener: socket.socket) -> str:
    """The address at which a listening socket is reached from this machine."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - read here, not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def stop_on_signals(stop: asyncio.Event, numbers: Iterable[signal.Signals]) -> list[int]:
    """Set an event on any of these signals; return the list that will hold those received.

    A SIGHUP that was ignored from the start, as under `nohup`, stays so. The others do not: a shell has SIGINT ignored
    by what a script starts in the background, and whoever sends it there means it.
    """
    received: list[int] = []

    def on_signal(number: int) -> None:
        received.append(number)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in numbers:
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue
        loop.add_signal_handler(number, on_signal, number)
    return received


_announcements: list[TextIO] = []
"""Where announcements go, once stdout is reserved for them."""


def reserve_stdout() -> None:
    """Keep stdout for announcements: whatever else is printed, by a reward for instance, goes to stderr."""
    _announcements.append(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)


def announce(message: dict[str, Any]) -> None:
    """Print one JSON line on stdout; a reader that has gone is no error."""
    try:
        print(json.dumps(message), flush=True, file=_announcements[-1] if _announcements else sys.stdout)
    except BrokenPipeError:
        logging.getLogger(__name__).warning("nobody reads the announcement")
