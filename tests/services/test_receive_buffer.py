"""What h11 makes of bytes is the same with our buffer as with its own, however they are cut."""

from typing import Any

import h11
from h11._receivebuffer import ReceiveBuffer
from hypothesis import given
from hypothesis import strategies as st

from services.http.receive_buffer import HandingBuffer

HEAD = b"POST /score HTTP/1.1\r\nHost: reward.test\r\n"


def plain(body: bytes) -> bytes:
    """A request of known length."""
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


def chunked(body: bytes) -> bytes:
    """A request in chunks of at most 100 bytes."""
    chunks = [body[start : start + 100] for start in range(0, len(body), 100)]
    framed = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + framed + b"0\r\n\r\n"


def events_of(buffer: ReceiveBuffer, pieces: list[bytes]) -> list[object]:
    """What a server sees; it answers each request, so that the next may follow on the connection."""
    connection, events = h11.Connection(h11.SERVER), list[object]()
    assert type(connection._receive_buffer) is ReceiveBuffer  # h11 still has one of this name
    connection._receive_buffer = buffer
    for piece in pieces:
        connection.receive_data(piece)
        while True:
            try:
                event = connection.next_event()
            except h11.RemoteProtocolError as error:
                return [*events, str(error)]
            if event is h11.NEED_DATA or event is h11.PAUSED:
                break
            events.append(event)
            if isinstance(event, h11.EndOfMessage):
                connection.send(h11.Response(status_code=200, headers=[("Content-Length", "0")]))
                connection.send(h11.EndOfMessage())
                connection.start_next_cycle()
    return [*events, connection.trailing_data]


@given(
    bodies=st.lists(st.tuples(st.sampled_from([plain, chunked]), st.binary(max_size=500)), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 400), max_size=12),
    broken=st.none() | st.tuples(st.integers(0, 600), st.binary(min_size=1, max_size=3)),
)
def test_the_same_events_from_the_same_bytes(
    bodies: list[Any], cuts: list[int], broken: tuple[int, bytes] | None
) -> None:
    """Bodies of known length and in chunks, one after the other, cut anywhere, and with bytes that do not belong."""
    sent = b"".join(frame(body) for frame, body in bodies)
    if broken is not None:
        sent = sent[: broken[0]] + broken[1] + sent[broken[0] :]
    places = sorted({cut % len(sent) for cut in cuts} | {0})
    pieces = [sent[start:stop] for start, stop in zip(places, [*places[1:], len(sent)], strict=True)]
    found = events_of(HandingBuffer(), pieces)
    assert found == events_of(ReceiveBuffer(), pieces)
    if broken is None:
        data = b"".join(bytes(event.data) for event in found if isinstance(event, h11.Data))
        assert data == b"".join(body for _, body in bodies)


def test_a_piece_is_handed_over() -> None:
    """And not copied, which is what the buffer is for."""
    buffer = HandingBuffer()
    buffer.__iadd__(b"of a body")
    held = buffer._data
    assert buffer.maybe_extract_at_most(100) is held
    assert not buffer
