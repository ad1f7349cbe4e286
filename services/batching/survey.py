"""What can be seen of one queue at one moment, for metrics and for people."""

from collections.abc import Mapping
from dataclasses import dataclass

BATCH_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Upper bounds, in images, of the classes that batches are counted in; a last class has no bound."""


@dataclass(frozen=True, slots=True)
class Events:
    """What has happened since Redis last started empty, over all APIs and workers of this reward and version.

    Attributes:
        batches: forward passes by their size in images: one count for each of `BATCH_BOUNDS`, and one beyond.
        batch_images: images in all of them.
        renewals: leases renewed.
        redeliveries: jobs delivered again after their worker fell silent.
        dead_letters: jobs given up.
        resubmissions: jobs submitted again because Redis had lost them.
        dropped: jobs removed unscored: their caller left, or their deadline passed.
    """

    batches: tuple[int, ...] = (0,) * (len(BATCH_BOUNDS) + 1)
    batch_images: int = 0
    renewals: int = 0
    redeliveries: int = 0
    dead_letters: int = 0
    resubmissions: int = 0
    dropped: int = 0

    @classmethod
    def from_hash(cls, counts: Mapping[bytes, bytes]) -> "Events":
        """Read the hash that the queue's scripts count in."""
        numbers = {name.decode(): int(value) for name, value in counts.items()}
        batches = tuple(numbers.pop(f"batches:{bound}", 0) for bound in (*BATCH_BOUNDS, "more"))
        return cls(batches=batches, **{name: numbers.get(name, 0) for name in _COUNTERS})


_COUNTERS = ("batch_images", "renewals", "redeliveries", "dead_letters", "resubmissions", "dropped")


@dataclass(frozen=True, slots=True)
class Survey:
    """The queue now.

    Attributes:
        waiting_images: in jobs that no worker has taken.
        leased_images: in jobs that a worker has in hand.
        queued_bytes: of pixels, in both, and of what is being uploaded.
        oldest_s: age of the oldest job, in seconds; 0 if there is none.
        dead_letters: that can be inspected.
        events: counts since Redis last started empty.
    """

    waiting_images: int
    leased_images: int
    queued_bytes: int
    oldest_s: float
    dead_letters: int
    events: Events
