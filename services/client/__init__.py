"""Async client of any reward service that keeps the contract of `services.protocol`.

Errors, each with the `status`, `problem` and `index` of the answer behind it, where there are any::

    RewardError
    ├── RewardUnavailable       no connection, or 408, 429, 502, 503, 504, until the attempts were spent
    ├── RewardDeadlineExceeded  the deadline passed first, or would before the next attempt may be made
    ├── RewardRefused           another status: the request is at fault, or the reward failed; not sent again
    └── RewardAnswerInvalid     an answer with a missing, extra or non-finite score, of two models, or none at all
"""

from services.client.errors import (
    RewardAnswerInvalid,
    RewardDeadlineExceeded,
    RewardError,
    RewardRefused,
    RewardUnavailable,
)
from services.client.reward_client import RewardClient, ScoreResult

__all__ = [
    "RewardAnswerInvalid",
    "RewardClient",
    "RewardDeadlineExceeded",
    "RewardError",
    "RewardRefused",
    "RewardUnavailable",
    "ScoreResult",
]
