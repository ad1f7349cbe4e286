"""What the ranks of a group do in tests: `python -m torch.distributed.run … -m tests.trainer.ranks NAME`.

Each function runs on every rank, and its result is printed as one JSON line that begins with the rank.
"""

import json
import os
import sys
import time

import torch

from trainer.distributed import Gradients, Group, RankError
from trainer.local_rewards import LocalRewardsError
from trainer.settings import Ranks


def collectives(group: Group) -> object:
    """Shares, gathered rows, means, maxima, words."""
    own = group.share(6)
    rows = torch.arange(own.start, own.stop).float()
    return {
        "share": [own.start, own.stop],
        "gathered": group.gather(rows).tolist(),
        "empty": list(group.gather(torch.empty(3, 0)).shape),
        "mean": group.mean(float(group.rank)),
        "greatest": group.greatest(torch.tensor([float(group.rank)])).tolist(),
        "any": [group.any(group.rank == 1), group.any(False)],
        "told": group.tell("für alle" if group.leads else "nothing"),
    }


def gradients(group: Group) -> object:
    """Two parameters whose gradients differ by rank."""
    parameters = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3, 2))]
    gradients = Gradients(parameters, group)
    for factor in (1.0, 10.0):  # accumulated
        sum(((factor + group.rank) * parameter).sum() for parameter in parameters).backward()  # type: ignore[union-attr]
    gradients.average()
    averaged = [parameter.grad.flatten().tolist() for parameter in parameters if parameter.grad is not None]
    gradients.clear()
    return {"averaged": averaged, "cleared": [float(p.grad.abs().sum()) for p in parameters if p.grad is not None]}


def failure(group: Group) -> object:
    """The second rank fails, first by what passes, then by what does not; both say what they saw."""
    seen: list[object] = []
    for error in (LocalRewardsError("the service is away"), ValueError("a bad value\nin two lines")):
        try:
            with group.together():
                if group.rank == 1:
                    raise error
        except RankError as found:
            seen.append([str(found), found.passes])
        except (LocalRewardsError, ValueError) as found:
            seen.append([type(found).__name__, found is error])
    with group.together():
        seen.append("goes on")
    return seen


def silence(group: Group) -> object:
    """The second rank hangs; the first waits for it in a collective until the watch ends it."""
    if group.rank == 1:
        group._stop.set()  # its heart stops
        time.sleep(60)
    group.mean(0.0)
    return "never"


def main() -> None:
    """Run the function of that name."""
    name = sys.argv[1]
    group = Group(Ranks(), torch.device("cpu"), timeout_s=120)
    functions = {function.__name__: function for function in (collectives, gradients, failure, silence)}
    line = json.dumps([group.rank, functions[name](group)]) + "\n"
    os.write(1, line.encode())  # at once, so that the ranks' lines do not mix
    group.close()


if __name__ == "__main__":
    main()
