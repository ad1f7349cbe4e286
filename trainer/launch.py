"""torchrun for a machine that is restarted by others: `python -m trainer.launch [torchrun's options] -m trainer.run …`.

torchrun ends with 1 whatever its ranks end with, so that nobody above it can tell a run that goes on from one that is
broken. This is torchrun, and its exit code is the ranks' own; docs/operations.md lists them.
"""

import signal
import sys
from collections.abc import Collection, Sequence

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import parse_args, run

from trainer.failures import EXIT_SUSPENDED

EXIT_ALONE = 69
"""EX_UNAVAILABLE of sysexits.h: the other machines were not to be reached in time."""
BY_SIGNAL = 128


def code_of(ended: Collection[int]) -> int:
    """The exit code of a machine.

    Args:
        ended: exit codes of the ranks that failed, at least one; a negative one is the signal that ended it. SIGTERM is
            what torchrun sends to all when one has failed.

    Returns:
        A failure's own code where a rank has failed; else 128 + signal where one was killed, for whoever starts it
        again to bound (it may be the memory that is too small); else 75: all of them say that the run goes on.
    """
    failed = [code for code in ended if code > 0 and code != EXIT_SUSPENDED]
    killed = [-code for code in ended if code < 0 and code != -signal.SIGTERM]
    return max(failed) if failed else BY_SIGNAL + max(killed) if killed else EXIT_SUSPENDED


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs torchrun; returns its exit code.

    0: all ranks have done all steps. 75: told to stop, or all that failed say 75. 69: the others cannot be reached.
    """
    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in sorted(error.failures.items())}
        print(f"ranks and their exit codes: {codes}", file=sys.stderr)
        return code_of(codes.values())
    except SignalException as error:
        print(f"{error}: the ranks were told, and the run goes on from its last state", file=sys.stderr)
        return EXIT_SUSPENDED
    except (RendezvousError, DistError) as error:
        print(f"error: the other machines are not to be reached: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_ALONE
    return 0


if __name__ == "__main__":
    sys.exit(main())
