"""One run from start to end: its services, the evaluations, the steps in between, and what is saved when."""

import json
import shlex
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trainer.checkpoint import Checkpoints, RunState
from trainer.config import Config
from trainer.distributed import Group, RankLost
from trainer.evaluation import Evaluator
from trainer.failures import Stopped, Suspended, passes
from trainer.interrupt import Interrupt
from trainer.loop import Learner, train_step
from trainer.metrics import Metrics, MetricsLog
from trainer.models.checkpoints import CheckpointError, write_atomically
from trainer.run_folder import drop_after, drop_end, write_text
from trainer.run_state import Snapshot, Tensors
from trainer.scoring import Scorer
from trainer.update import NotFinite


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
    reward: float | None = None  # of the step that the snapshot is of
    _snapshot: Snapshot | None = field(default=None, init=False)
    _written: int | None = field(default=None, init=False)  # the step of the last state that was saved
    _writing: threading.RLock = field(default_factory=threading.RLock, init=False)

    def train(self) -> None:
        """Evaluate, take all steps, evaluate, sum up."""
        if self.before is None:
            self.before = self._evaluate()
        self._begin()
        self.group.when_lost = self._rescue
        with (
            self.interrupt.deferred(),
            MetricsLog(self.folder, self.config, self.console, self.step, self.group.leads) as log,
        ):
            try:
                self._look()
                while self.step < self.config.run.steps:
                    self._take_step(log)
                    self._look()
            except RankLost as error:
                raise Suspended(f"{error}{self._rescue()}") from error
        with self._saved():
            self._finish()

    def _begin(self) -> None:
        """Make the folder that of a run after this step, and of none later: from here on one that is killed goes on."""
        with self.group.together():
            if not self.group.leads:
                return
            self._snapshot = Snapshot(self.learner)
            self._remember(self.reward)
            last = max(self.states.steps(), default=None)
            if last is not None and last > self.step:
                drop_end(self.folder)
            if last == self.step:
                self._written = self.step
            self._write(self._snapshot)
            drop_after(self.folder, self.step)

    def _take_step(self, log: MetricsLog) -> None:
        """One step, and its state where that is due."""
        began_s = time.perf_counter()
        try:
            metrics = train_step(self.learner, self.scorer.submit, self.config, self.step)
        except RankLost:
            raise
        except Exception as error:
            ending = self._save_after(error)
            self.group.any(False)  # wait until the first has saved: torchrun ends all once one has ended
            raise ending from error
        self.step += 1
        self._remember(metrics["reward"])  # before anything that waits for another rank, which may be gone
        self.seconds += time.perf_counter() - began_s
        with self.group.together():
            if self.group.leads:
                log.write(self.step, metrics)
        config, done = self.config, self.step == self.config.run.steps
        stops = self.group.any(self.interrupt.requested)
        kl, bound = metrics["kl"], config.grpo.max_kl
        exceeds = bound is not None and kl is not None and kl > bound
        if done or stops or exceeds or self._evaluates() or not self.step % config.checkpoint.every:
            self._save()
        if stops and not done:
            raise Suspended(f"interrupted; the state after step {self.step} is saved, {self._remedy()}")
        if exceeds:
            raise Stopped(f"step {self.step}: the KL is {kl:.3f}, grpo.max_kl is {bound}; the state after it is saved")

    def _evaluates(self) -> bool:
        """Whether an evaluation in between is due after the last step."""
        every = self.config.eval.every
        return bool(every) and self.step % every == 0 and 0 < self.step < self.config.run.steps

    def _look(self) -> None:
        """What is due to be looked at after the last step, unless it is there: a run may have been stopped before."""
        run = self.config.run
        if self._evaluates():
            # The others wait, and stop with the first: whoever of them is told to asks all of them after the next step.
            with self._saved(), self.interrupt.at_once() if self.group.leads else nullcontext():
                self._evaluate(self.folder / "evaluations" / f"step_{self.step:06d}.json")
        elif self.step == run.steps or (run.grid_every and self.step % run.grid_every == 0):
            with self.group.together():
                if self.group.leads:
                    self._draw_grid()

    def _remember(self, reward: float | None) -> None:
        """Copy what is to be saved, as it is after the steps so far; on the first rank."""
        if self._snapshot is not None:
            with self._writing:
                self._snapshot.take(self.step)
                self.reward = reward

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
        """Save the state after the last step."""
        with self.group.together():
            if self._snapshot is not None:
                self._write(self._snapshot)

    def _write(self, snapshot: Snapshot) -> None:
        """Save what was remembered last, if it is not saved already."""
        values = {
            "seconds": self.seconds,
            "before": self.before,
            "models": self.evaluator.models,
            "origin": self.learner.origin,
        }
        with self._writing:  # neither another save nor a snapshot in the making
            if snapshot.step not in {None, self._written}:
                self.states.save(RunState(snapshot.step, snapshot.tensors(), values, self.reward))
                self._written = snapshot.step

    def _rescue(self) -> str:
        """Save what there is when another rank is lost, from whatever thread finds out; the words that say so.

        The weights may be in the middle of an update, and the GPU in the middle of a collective that never ends: the
        snapshot is neither.
        """
        words = f"; {self._remedy()}"
        if self._snapshot is None:
            return words
        try:
            self._write(self._snapshot)
        except CheckpointError as error:
            return f"; the state could not be saved: {error}{words}"
        return f"; the state after step {self._written} is saved{words}"

    def _save_after(self, error: Exception) -> Exception:
        """Save what there was before a step that failed; and what a loss that was not finite came from.

        Returns:
            The error to raise: `Suspended` for one that passes.
        """
        if self._snapshot is not None:  # the first rank, which needs no other to save
            try:
                self._write(self._snapshot)
            except CheckpointError as second:  # the first error is the one to report, and not as one that passes
                self.console.print(f"[bold red]the state could not be saved:[/] {escape(str(second))}", soft_wrap=True)
                return error
            if isinstance(error, NotFinite):
                path = self.folder / "not_finite" / f"step_{self.step + 1:06d}.safetensors"
                try:
                    save_tensors(path, error.minibatch)
                except OSError as second:
                    return NotFinite(f"{error}; its minibatch could not be kept: {second}", error.minibatch)
                return NotFinite(f"{error}; its minibatch is in {path}", error.minibatch)
        return self._suspended(error) if passes(error) else error

    def _remedy(self) -> str:
        return f"go on with: {self.start.command} --resume {shlex.quote(str(self.folder))}"

    def _evaluate(self, path: Path | None = None) -> Metrics | None:
        """Measure the policy; the first rank alone does, the others wait.

        Args:
            path: of a file for the numbers; where it is there, they are not measured again.
        """
        measured: Metrics | None = None
        with self.group.together():
            if self.group.leads and not (path is not None and path.exists()):
                measured = self.evaluator.measure()
                self._draw_grid()
                if path is not None:
                    write_text(path, json.dumps(measured, indent=2) + "\n")
        return measured

    def _draw_grid(self) -> None:
        path = self.folder / "grids" / f"step_{self.step:06d}.png"
        if not path.exists():
            self.evaluator.save_grid(path)

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
