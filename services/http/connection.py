"""A connection that does not wait for ever for the head of a request; uvicorn sets no limit to it."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from services.http.receive_buffer import HandingBuffer


def patient_protocol(patience_s: float) -> type[H11Protocol]:
    """Make the protocol of a server.

    Args:
        patience_s: seconds that the head of a request may take, from the connection or from its first byte on.

    Returns:
        A class for `uvicorn.Config(http=…)`.
    """

    class PatientProtocol(H11Protocol):
        """Closes a connection on which no whole head of a request has come in time."""

        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            """Begin to wait for the first head."""
            self.conn._receive_buffer = HandingBuffer()
            super().connection_made(transport)
            self._wait_for_head()

        def data_received(self, data: bytes) -> None:
            """Wait for the rest of a head, or no longer."""
            super().data_received(data)
            if not self._lacks_head():
                self._stop_waiting()
            elif self._head_timer is None:
                self._wait_for_head()

        def connection_lost(self, exc: Exception | None) -> None:
            """Stop waiting."""
            self._stop_waiting()
            super().connection_lost(exc)

        def _lacks_head(self) -> bool:
            """Whether a head is begun, or has not come at all; between two requests the keep-alive limit holds."""
            return self.conn.their_state is h11.IDLE and (self.cycle is None or bool(self.conn.trailing_data[0]))

        def _wait_for_head(self) -> None:
            self._head_timer = self.loop.call_later(patience_s, self._end)

        def _stop_waiting(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _end(self) -> None:
            if self._lacks_head() and not self.transport.is_closing():
                self.transport.close()

    return PatientProtocol
