"""The trainer's side of the reward services: many requests in flight, one answer a batch, never an invented score.

One background thread runs the event loop that holds the clients, so that the step goes on while scores are on their
way. Shape legend: B images · H, W pixels.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from services.client import RewardClient
from services.protocol import Info
from trainer.config import RewardConfig
from trainer.shaping import Scores

LARGEST = 1e100  # of a score and of a reward; beyond it the statistics of a batch overflow


class ScoreError(RuntimeError):
    """A score is missing, of the wrong count, not a finite number, or too large; the step cannot go on."""


class Scored(NamedTuple):
    """Rewards of a batch: raw and shaped for each model by name, and what the policy is trained on; all (B,)."""

    raw: dict[str, Scores]
    shaped: dict[str, Scores]
    success: NDArray[np.bool_] | None  # reached every threshold; None where nothing is thresholded
    reward: Scores  # weighted sum of the shaped rewards

    def map(self, change: Callable[[Scores], Scores]) -> "Scored":
        """The same with every row of scores changed alike."""
        success = None if self.success is None else change(self.success.astype(np.float64)) > 0
        raw, shaped = ({name: change(values) for name, values in each.items()} for each in (self.raw, self.shaped))
        return Scored(raw, shaped, success, change(self.reward))


def combine(raw: Mapping[str, Scores], rewards: Sequence[RewardConfig], count: int) -> Scored:
    """Shapes the raw scores and sums them by weight.

    Args:
        raw: scores (B,) of each reward, by name.
        rewards: the run's rewards.
        count: B, the number of images that were sent.

    Raises:
        ScoreError: a reward is missing, has another number of scores than images, or a score that is not finite;
            or a score or the weighted sum is beyond ±1e100.
    """
    total, shaped, success = np.zeros(count), {}, None
    for reward in rewards:
        if reward.name not in raw:
            raise ScoreError(f"no score from {reward.name!r}; answered: {', '.join(raw) or 'none'}")
        scores_B = raw[reward.name]
        if scores_B.shape != (count,):
            raise ScoreError(f"{reward.name!r} answered {scores_B.size} scores for {count} images")
        if not np.isfinite(scores_B).all():
            index = int(np.flatnonzero(~np.isfinite(scores_B))[0])
            raise ScoreError(f"{reward.name!r} answered {scores_B[index]} for image {index}; a score must be finite")
        if not (np.abs(scores_B) <= LARGEST).all():
            index = int(np.flatnonzero(np.abs(scores_B) > LARGEST)[0])
            raise ScoreError(
                f"{reward.name!r} answered {scores_B[index]:g} for image {index}, beyond ±{LARGEST:g}; "
                "let it answer smaller scores"
            )
        with np.errstate(over="ignore", invalid="ignore"):  # found below, and then an error
            shaped[reward.name] = reward.shape.reward(scores_B)
            total += reward.weight * shaped[reward.name]
        reached = reward.shape.success(scores_B)
        if reached is not None:
            success = reached if success is None else success & reached
    if not (np.abs(total) <= LARGEST).all():
        index = int(np.flatnonzero(~(np.abs(total) <= LARGEST))[0])
        raise ScoreError(
            f"the reward of image {index} is {total[index]:g}, beyond ±{LARGEST:g}; "
            "choose smaller weights, scales or offsets"
        )
    return Scored(dict(raw), shaped, success, total)


class Scorer:
    """Sends batches to every reward of a run and combines the answers.

    Args:
        rewards: the run's rewards.
        urls: where each of them listens, by name.
        timeout_s: seconds a batch may take, retries included.
        ready_timeout_s: seconds to wait for the services to be ready.
        token: bearer token that is sent to all of them.
        models: name and version of each reward's model, by its name, where the run has begun already.

    Attributes:
        models: the same for all rewards, once it is made.

    Raises:
        RewardError: a service cannot be reached or is not ready in time.
        ScoreError: a prompt is missing or of no use, or a reward is of another model than before.
    """

    def __init__(
        self,
        rewards: Sequence[RewardConfig],
        urls: Mapping[str, str],
        *,
        timeout_s: float,
        ready_timeout_s: float = 30.0,
        token: str | None = None,
        models: Mapping[str, str] | None = None,
    ) -> None:
        self._rewards, self._timeout_s = tuple(rewards), timeout_s
        self._clients = {
            reward.name: RewardClient(urls[reward.name], token=token, timeout_s=timeout_s) for reward in rewards
        }
        self._in_flight: set[asyncio.Task[object] | None] = set()
        self._broken: Exception | None = None
        self.models: dict[str, str] = dict(models or {})
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rewards", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._open(ready_timeout_s), self._loop).result()
        except BaseException:
            self.close()
            raise

    async def _open(self, ready_timeout_s: float) -> None:
        for client in self._clients.values():
            await client.__aenter__()
        await asyncio.gather(*(client.wait_ready(ready_timeout_s) for client in self._clients.values()))
        for reward in self._rewards:
            info = await self._clients[reward.name].info()
            _check_prompt(reward, info)
            self.check_model(reward.name, f"{info.name} {info.version}")

    def submit(self, images_BHW3: NDArray[np.uint8]) -> Future[Scored]:
        """Starts scoring uint8 images (B, H, W, 3) by every reward; the future holds the result or the error."""
        return asyncio.run_coroutine_threadsafe(self._score(images_BHW3), self._loop)

    def abort(self, error: Exception) -> None:
        """Fails what is in flight, and whatever is submitted from now on, with an error; from any thread."""

        def fail() -> None:
            self._broken = error
            for task in self._in_flight:
                if task is not None:
                    task.cancel()

        with contextlib.suppress(RuntimeError):  # the loop is closed: nothing is in flight
            self._loop.call_soon_threadsafe(fail)

    async def _score(self, images_BHW3: NDArray[np.uint8]) -> Scored:
        if self._broken is not None:
            raise self._broken
        task = asyncio.current_task()
        self._in_flight.add(task)
        try:
            return await self._score_by_all(images_BHW3)
        except asyncio.CancelledError:
            if self._broken is not None:
                raise self._broken from None
            raise
        finally:
            self._in_flight.discard(task)

    async def _score_by_all(self, images_BHW3: NDArray[np.uint8]) -> Scored:
        async def one(reward: RewardConfig) -> Scores:
            prompts = None if reward.prompt is None else [reward.prompt] * len(images_BHW3)
            answer = await self._clients[reward.name].score(images_BHW3, prompts, deadline_s=self._timeout_s)
            self.check_model(reward.name, f"{answer.reward} {answer.version}")
            return np.asarray(answer.scores, dtype=np.float64)

        async with asyncio.TaskGroup() as group:
            tasks = {reward.name: group.create_task(one(reward)) for reward in self._rewards}
        return combine({name: task.result() for name, task in tasks.items()}, self._rewards, len(images_BHW3))

    def check_model(self, name: str, model: str) -> None:
        """Hold a reward to one model: throughout a run, on all ranks, scores of two cannot be compared.

        Args:
            name: of the reward.
            model: name and version; the first that is given is the one.

        Raises:
            ScoreError: it is another than before.
        """
        first = self.models.setdefault(name, model)
        if first != model:
            raise ScoreError(
                f"{name!r} was scored by {first} and now is by {model}: bring the first back, or start a new run"
            )

    def close(self) -> None:
        """Drops what is in flight and closes the connections."""
        if not self._thread.is_alive():
            return
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    async def _close(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for client in self._clients.values():
            await client.__aexit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _check_prompt(reward: RewardConfig, info: Info) -> None:
    """Finds before the first step what every step would fail by, or would do without.

    Raises:
        ScoreError: the service needs a prompt and the recipe has none, or the recipe has one that would be ignored.
    """
    if info.needs_prompts and reward.prompt is None:
        raise ScoreError(f"{reward.name!r} compares images with a prompt, and the recipe has none: give it a `prompt`")
    if reward.prompt is not None and not info.uses_prompts:
        raise ScoreError(f"{reward.name!r} does not read prompts, and the recipe has {reward.prompt!r}: leave it out")


def collect(pending: Sequence[Future[Scored]]) -> Scored:
    """Waits for the batches of a step, in the order they were sent, and joins them.

    Raises:
        RewardError, ScoreError: the first failure among them; the other batches are cancelled.
    """
    try:
        parts = [future.result() for future in pending]
    except BaseException as error:
        for future in pending:
            future.cancel()
        if isinstance(error, BaseExceptionGroup):  # of the task group: the first is the cause, the others its echo
            raise error.exceptions[0] from None
        raise
    first = parts[0]
    success = None if first.success is None else np.concatenate([p.success for p in parts if p.success is not None])
    return Scored(
        {name: np.concatenate([p.raw[name] for p in parts]) for name in first.raw},
        {name: np.concatenate([p.shaped[name] for p in parts]) for name in first.shaped},
        success,
        np.concatenate([p.reward for p in parts]),
    )
