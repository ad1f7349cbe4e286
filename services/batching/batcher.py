"""When do waiting jobs become a batch? Pure: items, limits and a clock in, batches out."""

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Waiting(Generic[T]):
    """An item that waits, its size in images, and when it came, in seconds."""

    item: T
    images: int
    since_s: float
    alone: bool


class Batcher(Generic[T]):
    """Collects items, in order, into batches counted in images.

    A batch is due as soon as it is full, its first item has waited `max_wait_s`, or the next item cannot join it:
    because it would exceed `max_batch`, or because one of them wants to be alone. An item larger than `max_batch`
    becomes a batch of its own. No item is lost, doubled or overtaken.
    """

    def __init__(self, *, max_batch: int, max_wait_s: float) -> None:
        """Set the limits.

        Args:
            max_batch: images in one batch, at least 1.
            max_wait_s: seconds that the first item of a batch waits for others, at least 0.

        Raises:
            ValueError: a limit is out of range.
        """
        if max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}, must be at least 1")
        if not max_wait_s >= 0:
            raise ValueError(f"max_wait_s is {max_wait_s}, must be at least 0")
        self._max_batch = max_batch
        self._max_wait_s = max_wait_s
        self._waiting: deque[Waiting[T]] = deque()

    def __len__(self) -> int:
        """Items that wait."""
        return len(self._waiting)

    @property
    def room(self) -> int:
        """Images that may still be added before `max_batch` of them wait."""
        return max(0, self._max_batch - sum(waiting.images for waiting in self._waiting))

    def add(self, item: T, images: int, now_s: float, *, alone: bool = False) -> None:
        """Let an item wait.

        Args:
            item: anything.
            images: its size, at least 1.
            now_s: the time, in seconds of any clock that does not run backwards.
            alone: whether it must share its batch with no other.

        Raises:
            ValueError: `images` is below 1.
        """
        if images < 1:
            raise ValueError(f"an item of {images} images cannot wait: it must have at least 1")
        self._waiting.append(Waiting(item, images, now_s, alone))

    def due_s(self) -> float | None:
        """The time at which the first batch is due by waiting, in seconds; None if nothing waits."""
        return self._waiting[0].since_s + self._max_wait_s if self._waiting else None

    def pop(self, now_s: float) -> list[T]:
        """Take the first batch if it is due.

        Args:
            now_s: the time, in seconds.

        Returns:
            Its items in order; empty if none is due.
        """
        due_s = self.due_s()
        if due_s is None:
            return []
        size, closed = self._first_batch()
        if not closed and now_s < due_s:
            return []
        return [self._waiting.popleft().item for _ in range(size)]

    def clear(self) -> list[T]:
        """Take everything that waits, in order."""
        items = [waiting.item for waiting in self._waiting]
        self._waiting.clear()
        return items

    def _first_batch(self) -> tuple[int, bool]:
        """How many items make up the first batch, and whether no other can join it."""
        total = 0
        for size, waiting in enumerate(self._waiting):
            if size and (waiting.alone or total + waiting.images > self._max_batch):
                return size, True
            total += waiting.images
            if waiting.alone or total >= self._max_batch:
                return size + 1, True
        return len(self._waiting), False
