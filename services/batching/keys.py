"""The names of the queue's keys in Redis."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Keys:
    """The names of one queue's keys; the braces keep them in one slot of a cluster."""

    reward: str
    version: str

    @property
    def prefix(self) -> str:
        """What all keys of this reward and version begin with."""
        return f"reward:{{{self.reward}:{self.version}}}"

    @property
    def jobs(self) -> str:
        """Stream of jobs."""
        return f"{self.prefix}:jobs"

    @property
    def dead(self) -> str:
        """Stream of dead letters."""
        return f"{self.prefix}:dead"

    @property
    def uploads(self) -> str:
        """Sorted set of reservations whose jobs are not yet in the stream, by expiry in ms."""
        return f"{self.prefix}:uploads"

    @property
    def load(self) -> str:
        """Hash of the images and bytes that are reserved, wait, or are in work."""
        return f"{self.prefix}:load"

    @property
    def events(self) -> str:
        """Hash of what `survey.Events` counts."""
        return f"{self.prefix}:events"

    @property
    def alive(self) -> str:
        """Exists while at least one warm worker lives."""
        return f"{self.prefix}:alive"

    @property
    def start(self) -> str:
        """How the last start of a worker went, of whatever version: API and workers may have been told differently."""
        return f"reward:{self.reward}:start"

    def payload(self, uid: str) -> str:
        """Pixels and prompts of a job, as safetensors."""
        return f"{self.prefix}:payload:{uid}"

    def answer(self, key: str) -> str:
        """Hash of the answer to the requests of an idempotency key."""
        return f"{self.prefix}:answer:{hashlib.sha256(key.encode()).hexdigest()}"

    def replies(self, api: str) -> str:
        """Stream of replies to one API process."""
        return f"{self.prefix}:replies:{api}"
