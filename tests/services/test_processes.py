"""Small things that every process of a service needs."""

import asyncio
import socket

from services.processes import bind


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
