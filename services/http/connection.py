"""A connection that bounds the head of a request in time and size; uvicorn's parser sets no limit to either."""

import asyncio
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_LIMIT_BYTES = 64 * 2**10
"""What may come between pieces of bodies: a head, the line before a chunk, or trailers; and one reading more."""


class PatientProtocol(HttpToolsProtocol):
    """Closes a connection on which no whole head of a request has come in time, or one that is too long."""

    patience_s: ClassVar[float]
    _lacks_head = True
    """Whether a head is begun, or has not come at all; between two requests the keep-alive limit holds."""
    _head_timer: asyncio.TimerHandle | None = None
    _unread_bytes = 0
    _is_deaf = False
    """Whether a request asked for another protocol: the parser leaves its body to that, and nothing more is read."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Wait for the rest of a head, or no longer."""
        if self._is_deaf:
            return
        self._unread_bytes += len(data)
        super().data_received(data)
        if self._unread_bytes > HEAD_LIMIT_BYTES and not self.transport.is_closing():
            self._refuse()
        if not self._lacks_head:
            self._stop_waiting()
        elif self._head_timer is None:
            self._wait_for_head()

    def on_message_begin(self) -> None:
        """A head begins."""
        self._lacks_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A head is whole."""
        self._lacks_head, self._unread_bytes = False, 0
        super().on_headers_complete()
        if self.parser.should_upgrade():
            self._is_deaf, self.cycle.keep_alive = True, False

    def on_body(self, body: bytes) -> None:
        """A piece of a body has come."""
        self._unread_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is whole."""
        self._unread_bytes = 0
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _refuse(self) -> None:
        """Say why, unless an answer has begun."""
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self.send_400_response(f"More than {HEAD_LIMIT_BYTES} bytes of headers: send fewer or shorter ones.")
        else:
            self.transport.close()

    def _wait_for_head(self) -> None:
        self._head_timer = self.loop.call_later(self.patience_s, self._end)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end(self) -> None:
        if self._lacks_head and not self.transport.is_closing():
            self.transport.close()


def patient_protocol(patience_s: float) -> type[PatientProtocol]:
    """Make the protocol of a server.

    Args:
        patience_s: seconds that the head of a request may take, from the connection or from its first byte on.

    Returns:
        A class for `uvicorn.Config(http=…)`.
    """
    return type("PatientProtocol", (PatientProtocol,), {"patience_s": patience_s})
