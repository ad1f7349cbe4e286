"""Why a request did not get its scores from the queue.

Errors::

    QueueError
    ├── QueueFull      the bound on images or bytes is reached; try again later
    ├── QueueAway      Redis is gone or out of memory; try again later
    ├── DeadlinePassed no answer came in time
    ├── ScoringFailed  the worker answered with an error
    └── KeyReused      an idempotency key was used for another request
"""

import errno

from services.processes import descriptor_limit


class QueueError(Exception):
    """A request did not get its scores from the queue; see the module for the tree."""


class QueueFull(QueueError):
    """The bound on queued images or bytes is reached."""


class QueueAway(QueueError):
    """Redis cannot be reached or cannot take more."""

    @classmethod
    def of(cls, error: Exception) -> "QueueAway":
        """The error of a Redis client, in one line."""
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        if _lacks_descriptor(error):
            most = f"this process has all of the {descriptor_limit()} files open that it may have"
            return cls(f"{most}, and needs one to reach Redis ({line}): raise `ulimit -n`, or send less at once")
        return cls(f"Redis is not available ({line})")


class DeadlinePassed(QueueError):
    """The deadline passed before the last score."""


class ScoringFailed(QueueError):
    """A worker answered with an error.

    Attributes:
        index: position in the request of the image that caused it, where it is known.
    """

    def __init__(self, message: str, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


class KeyReused(QueueError):
    """An idempotency key was used for another request."""


def _lacks_descriptor(error: BaseException | None) -> bool:
    """Whether an error comes of this process having as many open files as it may; the client may wrap it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.EMFILE:
            return True
        error = error.__cause__ or error.__context__
    return False
