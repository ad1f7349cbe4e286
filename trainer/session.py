"""One run from start to end: its services, the evaluations, the steps in between, and what is saved when."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trainer.build import choose_device, make_learner
from trainer.checkpoint import Checkpoints, RunState
from trainer.config import Config, ConfigError, RewardConfig
from trainer.distributed import Group, RankLost
from trainer.evaluation import Evaluator
from trainer.failures import Stopped, Suspended, passes
from trainer.interrupt import Interrupt
from trainer.local_rewards import LocalRewards
from trainer.loop import Learner, train_step
from trainer.metrics import Metrics, MetricsLog
from trainer.models.checkpoints import CheckpointError, write_atomically
from trainer.run_folder import STATES, describe, hold, open_folder, write_text
from trainer.run_state import Snapshot, Tensors, generators, restore, tensors_of
from trainer.scoring import Scorer
from trainer.settings import Ranks, Settings
from trainer.update import NotFinite

READY_S = 30.0
SPARE_S = 6 * 3600.0
"""How much longer than for the scores a rank waits for a living one: for an evaluation, or while it saves."""


@dataclass(frozen=True)
class Start:
    """How a run is started.

    Args:
        recipe: its name.
        resume: the folder of a run or of one of its states to go on from, if one was named.
        must_resume: whether it must go on, and not begin.
        command: what resumes it, but for the folder.
        ends_process: whether the process ends with the run.
    """

    recipe: str
    resume: Path | None = None
    must_resume: bool = False
    command: str = "python -m trainer.run"
    ends_process: bool = False


def train(config: Config, start: Start, console: Console) -> Path:
    """Trains by a resolved configuration and returns the run's folder.

    Args:
        config: validated settings.
        start: how it was started.
        console: for progress and the closing table.

    Raises:
        Suspended: it was told to stop, or a service stayed away; the state is saved.
        Stopped: it reached a bound of its settings; the state is saved.
        ConfigError, CheckpointError, JudgeError, LoraError, LocalRewardsError, RewardError, ScoreError, RankError,
        FloatingPointError, OSError: with a message of one line; services that the run started are stopped first.
    """
    ranks = Ranks()
    config.check_ranks(ranks.world_size)
    device = choose_device(config.run.device, ranks.local_rank)
    timeout_s = config.run.score_timeout_s + SPARE_S
    with ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt(console, is_last=start.ends_process))
        console = console if ranks.rank == 0 else Console(quiet=True)
        group = stack.enter_context(closing(Group(ranks, device, timeout_s=timeout_s)))
        torch.manual_seed(config.run.seed)
        with group.together():
            learner = make_learner(config, group, device)
            found = open_folder(config, start.resume, ranks, must_resume=start.must_resume) if group.leads else None
        folder, state_path = _told(group, found)
        states = Checkpoints(folder / STATES, keep=config.checkpoint.keep, run=config.identity())
        with group.together():
            if group.leads:
                stack.enter_context(hold(folder))
            state = states.load(state_path) if state_path or states.latest() else None
            if state is not None:
                restore(learner, state.tensors)
                state.tensors.clear()  # in the learner now
            if group.leads:
                describe(folder, config, device)
        step = 0 if state is None else state.step
        if step > config.run.steps:
            raise ConfigError(f"run.steps is {config.run.steps}, and {step} are done: give as many or more")
        _announce(config, start, folder, step, console)
        scorers = _open_scorers(config, group, folder, stack, console, {} if state is None else state.values["models"])
        evaluator = Evaluator(config, learner, *scorers)
        run = Session(config, start, learner, group, folder, states, evaluator, scorers[0], interrupt, console, step)
        if state is not None:
            run.seconds, run.before = state.values["seconds"], state.values["before"]
        run.train()
    return folder


def _told(group: Group, found: tuple[Path, Path | None] | None) -> tuple[Path, Path | None]:
    """What the first rank found, for all."""
    folder, state = json.loads(group.tell(json.dumps([str(path or "") for path in found] if found else None)))
    return Path(folder), Path(state) if state else None


def _announce(config: Config, start: Start, folder: Path, step: int, console: Console) -> None:
    goes_on = f"   resumed after step {step}" if step else ""
    line = f"[bold]{escape(start.recipe)}[/] → {escape(f'{folder}   {config.summary}{goes_on}')}"
    console.print(line, soft_wrap=True)


def _open_scorers(
    config: Config, group: Group, folder: Path, stack: ExitStack, console: Console, models: Mapping[str, str]
) -> tuple[Scorer, Scorer | None]:
    """The services that are optimised, and those that are only looked at; both as clients of this rank."""
    every = (*config.rewards, *config.eval.rewards)
    local = [reward.name for reward in every if reward.url is None]
    with group.together():
        services = stack.enter_context(LocalRewards(local if group.leads else [], folder / "services.log"))
    urls: dict[str, str] = json.loads(group.tell(json.dumps(services.urls)))
    for name, url in urls.items():
        console.print(escape(f"reward {name}: {url}  (started for this run)"), soft_wrap=True)
    for reward in every:
        if reward.url is not None:
            urls[reward.name] = reward.url
            console.print(escape(f"reward {reward.name}: {reward.url}"), soft_wrap=True)

    def open_scorer(rewards: tuple[RewardConfig, ...]) -> Scorer:
        timeout_s = config.run.score_timeout_s
        scorer = Scorer(
            rewards,
            urls,
            timeout_s=timeout_s,
            ready_timeout_s=min(timeout_s, READY_S),
            token=Settings().token,
            models=models,
        )
        services.when_dead(scorer.abort)
        return stack.enter_context(scorer)

    with group.together():
        scorer = open_scorer(config.rewards)
        watcher = open_scorer(config.eval.rewards) if config.eval.rewards and group.leads else None
    return scorer, watcher


@dataclass
class Session:
    """A run between its start and its end, on one rank."""

    config: Config
    start: Start
    learner: Learner
    group: Group
    folder: Path
    states: Checkpoints
    evaluator: Evaluator
    scorer: Scorer
    interrupt: Interrupt
    console: Console
    step: int
    seconds: float = 0.0
    before: Metrics | None = None
    _reward: float | None = field(default=None, init=False)

    def train(self) -> None:
        """Evaluate, take all steps, evaluate, sum up."""
        if self.before is None:
            self.before = self._evaluate("before", 0)
        snapshot = Snapshot(self.learner) if self.group.leads else None
        with (
            self.interrupt.deferred(),
            MetricsLog(self.folder, self.config, self.console, self.step, self.group.leads) as log,
        ):
            while self.step < self.config.run.steps:
                self._take_step(log, snapshot)
        with self._saved():
            self._finish()

    def _take_step(self, log: MetricsLog, snapshot: Snapshot | None) -> None:
        """One step, and whatever is due after it."""
        began_s = time.perf_counter()
        if snapshot is not None:
            snapshot.take()
        try:
            metrics = train_step(self.learner, self.scorer.submit, self.config, self.step)
        except Exception as error:
            ending = self._save_after(error, snapshot)
            if not isinstance(error, RankLost):
                self.group.any(False)  # wait until the first has saved: torchrun ends all once one has ended
            raise ending from error
        self.step += 1
        self.seconds += time.perf_counter() - began_s
        self._reward = metrics["reward"]
        with self.group.together():
            if self.group.leads:
                log.write(self.step, metrics)
        config, done = self.config, self.step == self.config.run.steps
        stops = self.group.any(self.interrupt.requested)
        kl, bound = metrics["kl"], config.grpo.max_kl
        exceeds = bound is not None and kl is not None and kl > bound
        evaluates = bool(config.eval.every) and not self.step % config.eval.every and not done
        if done or stops or exceeds or evaluates or not self.step % config.checkpoint.every:
            self._save()
        if stops and not done:
            raise Suspended(f"interrupted; the state after step {self.step} is saved, {self._remedy()}")
        if exceeds:
            raise Stopped(f"step {self.step}: the KL is {kl:.3f}, grpo.max_kl is {bound}; the state after it is saved")
        if evaluates:
            with self._saved():
                self._evaluate("between", self.step)
        elif done or (config.run.grid_every and not self.step % config.run.grid_every):
            self._draw_grid()

    @contextmanager
    def _saved(self) -> Iterator[None]:
        """Whatever passes, within, leaves a run that goes on: the state after the last step is saved."""
        try:
            yield
        except Exception as error:
            raise self._suspended(error) if passes(error) else error from error

    def _suspended(self, error: Exception) -> Suspended:
        return Suspended(f"{error}; the state after step {self.step} is saved, {self._remedy()}")

    def _save(self) -> None:
        """Save the state as it is now."""
        with self.group.together():
            if self.group.leads:
                self._write(self.step, tensors_of(self.learner) | generators(), self._reward)

    def _write(self, step: int, tensors: Tensors, reward: float | None) -> None:
        values = {"seconds": self.seconds, "before": self.before, "models": self.scorer.models}
        self.states.save(RunState(step, tensors, values, reward))

    def _save_after(self, error: Exception, snapshot: Snapshot | None) -> Exception:
        """Save what there was before a step that failed; and what a loss that was not finite came from.

        Returns:
            The error to raise: `Suspended` for one that passes.
        """
        if snapshot is not None:  # the first rank, which needs no other to save
            try:
                self._write(self.step, snapshot.tensors(), self._reward)
            except CheckpointError as second:  # the first error is the one to report, and not as one that passes
                self.console.print(f"[bold red]the state could not be saved:[/] {escape(str(second))}", soft_wrap=True)
                return error
            if isinstance(error, NotFinite):
                path = self.folder / "not_finite" / f"step_{self.step + 1:06d}.safetensors"
                save_tensors(path, error.minibatch)
                return NotFinite(f"{error}; its minibatch is in {path}", error.minibatch)
        return self._suspended(error) if passes(error) else error

    def _remedy(self) -> str:
        return f"go on with: {self.start.command} --resume {self.folder}"

    def _evaluate(self, when: str, step: int) -> Metrics | None:
        """Measure the policy; the first rank alone does, the others wait."""
        measured: Metrics | None = None
        with self.group.together():
            if self.group.leads:
                measured = self.evaluator.measure()
                self.evaluator.save_grid(self.folder, step)
                if when == "between":
                    write_text(
                        self.folder / "evaluations" / f"step_{step:06d}.json", json.dumps(measured, indent=2) + "\n"
                    )
        return measured

    def _draw_grid(self) -> None:
        with self.group.together():
            if self.group.leads:
                self.evaluator.save_grid(self.folder, self.step)

    def _finish(self) -> None:
        """Keep the trained policy, measure it and sum up."""
        config = self.config
        metadata = {"recipe": self.start.recipe, "seed": str(config.run.seed), "steps": str(config.run.steps)}
        after: Metrics | None = None
        with self.group.together():
            if self.group.leads:
                self.evaluator.policy.save(self.folder / "checkpoint" / "var.safetensors", metadata)  # first
                after = self.evaluator.measure()
                summary = {
                    "recipe": self.start.recipe,
                    "seed": config.run.seed,
                    "steps": config.run.steps,
                    "seconds": round(self.seconds, 1),
                    "before": self.before,
                    "after": after,
                }
                write_text(self.folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
                _closing_table(summary, self.folder, self.console)


def save_tensors(path: Path, tensors: Tensors) -> None:
    """Write tensors for study."""
    from safetensors.torch import save_file  # noqa: PLC0415 - where something went wrong

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    needed = sum(tensor.nbytes for tensor in contiguous.values())
    write_atomically(path, needed, lambda temporary: save_file(contiguous, temporary))


def _closing_table(summary: Mapping[str, Any], folder: Path, console: Console) -> None:
    table = Table(
        title=f"{escape(summary['recipe'])}: {summary['steps']} steps in {summary['seconds']:.0f} s",
        title_justify="left",
    )
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    for name, label, form in (
        ("reward", "reward", "{:.3f}"),
        ("raw_score", "raw score", "{:.3f}"),
        ("success_rate", "success rate", "{:.1%}"),
        ("label_accuracy", "label accuracy", "{:.1%}"),
    ):
        values = [summary[when][name] for when in ("before", "after")]
        table.add_row(label, *("–" if value is None else form.format(value) for value in values))
    console.print(table)
    for line in (
        f"samples     {folder / 'grids'}",
        f"metrics     {folder / 'metrics.jsonl'}   tensorboard --logdir {folder.parent}",
        f"checkpoint  {folder / 'checkpoint' / 'var.safetensors'}",
    ):
        console.print(escape(line), soft_wrap=True)
