"""Small things that every process of a service needs: a socket, a log, one line of error, a death with its parent."""

import asyncio
import ctypes
import errno
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
EXIT_INTERRUPTED = 130
LISTEN_BACKLOG = 2048


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


def start_logging(*, quiet: bool, file: Path | None) -> None:
    """Send the log to stderr or to a file; quiet means warnings only.

    Raises:
        StartError: the file cannot be written.
    """
    try:
        logging.basicConfig(
            level=logging.WARNING if quiet else logging.INFO,
            format="%(asctime)s %(levelname)s %(name)s[%(process)d] %(message)s",
            filename=file,
            force=True,
        )
    except OSError as error:
        raise StartError(f"log file {file} cannot be written ({error.strerror}): choose another --log-file") from error


def bind(host: str, port: int) -> socket.socket:
    """Bind and listen; port 0 takes a free one.

    Raises:
        StartError: the address cannot be had; the message names it.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(LISTEN_BACKLOG)
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            remedy = "is in use: choose another --port, or 0 for a free one"
        else:
            remedy = f"cannot be listened on ({error}): choose another --host or --port"
        raise StartError(f"port {port} on {host} {remedy}") from error
    return listener


def url_of(listener: socket.socket) -> str:
    """The address at which a listening socket is reached from this machine."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - read here, not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def stop_on_signals(stop: asyncio.Event, numbers: Iterable[signal.Signals]) -> list[int]:
    """Set an event on any of these signals; return the list that will hold those received."""
    received: list[int] = []

    def on_signal(number: int) -> None:
        received.append(number)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in numbers:
        loop.add_signal_handler(number, on_signal, number)
    return received


def announce(message: dict[str, Any]) -> None:
    """Print one JSON line on stdout; a reader that has gone is no error."""
    try:
        print(json.dumps(message), flush=True)
    except BrokenPipeError:
        logging.getLogger(__name__).warning("nobody reads the announcement")
