"""h11's buffer of what has arrived, which hands a piece of a body over where the original copies it twice.

`h11._receivebuffer.ReceiveBuffer.maybe_extract_at_most` slices the buffer to see whether it is empty, and slices it
again to take the slice out. A body of some MB spends a fifth of its way through the server there.
"""

from h11._receivebuffer import ReceiveBuffer


class HandingBuffer(ReceiveBuffer):
    """Gives what the original gives: bytes in order, each once."""

    def maybe_extract_at_most(self, count: int) -> bytearray | None:
        """Take up to `count` bytes from the front, `count` at least 1; None if there are none."""
        if not self._data:
            return None
        if len(self._data) > count:  # the rest belongs to what follows
            return self._extract(count)
        piece, self._data = self._data, bytearray()
        self._next_line_search = self._multiple_lines_search = 0
        return piece
