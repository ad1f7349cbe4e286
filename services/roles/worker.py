"""The worker process: scores the jobs of one reward."""

import asyncio
import contextlib
import faulthandler
import logging
import os
import signal
import uuid
from collections.abc import Iterator

import uvloop
from redis.exceptions import RedisError

from services.batching.keys import Keys
from services.batching.scoring import ScorerHung
from services.batching.streams import WorkQueue, connect
from services.batching.worker import QueueGone, Worker, WorkerLimits
from services.processes import EXIT_INTERRUPTED, StartError, announce, describe, spare_what_stays, stop_on_signals
from services.rewards import create_reward
from services.rewards.base import Reward
from services.rewards.sources import WeightsError
from services.roles.contact import check_access
from services.settings import Settings

logger = logging.getLogger(__name__)

EXIT_HUNG = 70
STDERR = 2
VARIABLES = {"clip": "REWARD_CLIP_WEIGHTS", "aesthetic": "REWARD_AESTHETIC_WEIGHTS, REWARD_AESTHETIC_HEAD"}
"""What names the weights of the rewards that are told theirs."""
STUCK_AFTER_S = 5.0
"""How long after its time limit a forward pass, which then holds up even this process's event loop, ends it."""


def run_worker(name: str, redis_url: str, settings: Settings, *, announces: bool) -> int:
    """Score the jobs of one reward until a signal comes.

    Args:
        name: the reward, as `services.rewards.create_reward` knows it.
        redis_url: where the queue lives.
        settings: batch, lease, timeouts.
        announces: whether to print a JSON line on stdout once jobs are taken.

    Returns:
        The exit code.

    Raises:
        services.rewards.UnknownReward: there is no such reward.
        StartError: Redis stayed away or lets it not in, or the reward cannot be loaded.
    """
    return uvloop.run(
        _work(create_reward(name, settings.reward_options), name, redis_url, settings, announces=announces)
    )


@contextlib.contextmanager
def _end_if_stuck(after_s: float) -> Iterator[None]:
    """End this process, with the stacks of its threads on stderr, should the block not end in time.

    The limit of a forward pass is kept by the event loop, which does not run while native code holds the GIL. A process
    that was stopped for all of this time may end as it wakes: it cannot tell that from native code.
    """
    faulthandler.dump_traceback_later(after_s, exit=True, file=STDERR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


async def _work(reward: Reward, name: str, redis_url: str, settings: Settings, *, announces: bool) -> int:
    stop = asyncio.Event()
    received = stop_on_signals(stop, (signal.SIGTERM, signal.SIGINT))
    redis = connect(redis_url, timeout_s=settings.redis_timeout_s)
    keys = Keys(reward.name, reward.version)
    queue = WorkQueue(redis, keys, consumer=uuid.uuid4().hex, lease_ms=settings.lease_ms)
    worker = Worker(
        queue,
        reward,
        WorkerLimits(
            max_batch=settings.max_batch,
            max_wait_s=settings.max_wait_ms / 1000,
            job_images=settings.images_per_job,
            lease_s=settings.lease_ms / 1000,
            max_deliveries=settings.max_deliveries,
            score_timeout_s=settings.score_timeout_s,
            patience_s=settings.redis_patience_s,
        ),
        guard=lambda: _end_if_stuck(settings.score_timeout_s + STUCK_AFTER_S),
    )

    def on_ready() -> None:
        spare_what_stays()
        logger.info("worker for %s %s takes jobs", reward.name, reward.version)
        if announces:
            announce({"worker": name})

    try:
        with contextlib.suppress(RedisError, OSError):  # one that is away may come back
            await check_access(redis, redis_url, keys.alive)
        if await _warm_up(worker, queue, name, stop):
            await worker.run(stop, on_ready=on_ready)
    except ScorerHung as error:
        logger.error("%s: the worker ends; others take over its jobs", error)
        logging.shutdown()
        os._exit(EXIT_HUNG)
    except QueueGone as error:
        raise StartError(f"REDIS_URL: {error}: check that Redis runs and REDIS_URL names it") from error
    finally:
        await redis.aclose()
    code = EXIT_INTERRUPTED if signal.SIGINT in received else 0
    if not worker.is_warm:  # its thread still loads the model and cannot be stopped
        logging.shutdown()
        os._exit(code)
    return code


async def _warm_up(worker: Worker, queue: WorkQueue, name: str, stop: asyncio.Event) -> bool:
    """Load the reward's model; False if told to stop before it was done.

    Raises:
        StartError: the reward cannot be loaded.
    """
    warming, stopping = asyncio.create_task(worker.warmup()), asyncio.create_task(stop.wait())
    await asyncio.wait({warming, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not warming.done():
        return False
    try:
        await warming
    except Exception as error:
        is_ours = isinstance(error, WeightsError)
        logger.info("the reward cannot be loaded", exc_info=not is_ours)  # ours says all in its line
        reason = f"reward {name!r} cannot be loaded: {error if is_ours else describe(error)}"
        if is_ours and name in VARIABLES:
            reason = f"{VARIABLES[name]}: {reason}"
        # Anyone may read what an API tells; the words of a stranger's error may hold an address with its password.
        await _note_start(queue, reason if is_ours else f"{type(error).__name__}, see the worker's log")
        raise StartError(reason) from error
    await _note_start(queue, "")
    return True


async def _note_start(queue: WorkQueue, trouble: str) -> None:
    """Have the APIs say why there is no worker, where Redis can be reached."""
    try:
        await queue.note_start(trouble)
    except (RedisError, OSError) as error:
        logger.warning("the queue cannot be told how the start went: %s", describe(error))
