"""Our service against a bare handler on the same work, with room for the noise of a machine that does other things."""

import statistics

import pytest

from benchmarks.contenders import BARE, OURS
from benchmarks.peers.work import scorer
from benchmarks.serving import started, workload_of
from trainer.machine import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.redis]


@pytest.mark.parametrize(("name", "most"), [("w1", 2.5), ("w2", 1.6)])
def test_the_queue_costs_less_than_the_work(name: str, most: float) -> None:
    """CPU seconds of API, queue and worker for an image, over the bare handler's; measured 0.7 to 0.9 and 1.0 to 1.3.

    Before images went through shared memory it was 7.4 on W1 and 2.0 on W2; before pictures were decoded in turns, 1.3
    to 1.5 there. CPU seconds, because they are steadier than the clock where others use the machine as well.
    """
    work = workload_of(name)
    (expected,) = scorer(name)([work.body])
    with started(OURS, work, ROOT) as ours, started(BARE, work, ROOT) as bare:
        ratios = [ours(1.0, expected).cpu_ms / bare(1.0, expected).cpu_ms for _ in range(3)]
    assert statistics.median(ratios) < most
