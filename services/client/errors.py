"""The errors of the client; `services.client` draws their tree."""

from services.protocol import Problem


class RewardError(Exception):
    """A reward service did not give scores.

    Attributes:
        status: HTTP status of the last answer, or None where there was none.
        problem: what the service said in it, or None; its `index` counts within the request that was sent.
        index: position in the caller's batch of the image at fault, or None where the service names none.
    """

    def __init__(
        self, message: str, *, status: int | None = None, problem: Problem | None = None, index: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.problem = problem
        self.index = index


class RewardUnavailable(RewardError):
    """The service cannot be reached, or stayed too busy, for all attempts."""


class RewardDeadlineExceeded(RewardError):
    """The deadline passed before the scores came, or would pass before the service may be asked again."""


class RewardRefused(RewardError):
    """The service refused the request or failed to score it; `status` and `problem` are always set."""

    status: int
    problem: Problem


class RewardAnswerInvalid(RewardError):
    """The service answered with something that is not one finite score of one model for each image."""
