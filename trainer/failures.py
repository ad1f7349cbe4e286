"""How a run that cannot go on ends: which failures pass, and so leave a run that the same command resumes.

Suspended     told to stop, or held up by what passes: the state is saved, exit code 75
Stopped       stopped by a bound of its own settings: the state is saved, exit code 1
"""

from services.client import RewardDeadlineExceeded, RewardUnavailable
from trainer.local_rewards import LocalRewardsError

EXIT_SUSPENDED = 75
"""EX_TEMPFAIL of sysexits.h: not done; the same command with `--resume` goes on."""


class Suspended(RuntimeError):
    """The run is not done; the message says why, and what resumes it."""


class Stopped(RuntimeError):
    """The run has reached a bound that its settings draw."""


def passes(error: BaseException) -> bool:
    """Whether a failure is of the kind that passes: a service that is away, another rank that is."""
    known = (RewardUnavailable, RewardDeadlineExceeded, LocalRewardsError)
    return isinstance(error, known) or bool(getattr(error, "passes", False))
