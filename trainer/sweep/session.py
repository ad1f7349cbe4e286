"""One call of the command: look, lock, run what is left, sum up after each run."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from trainer.build import check_names
from trainer.config import ConfigError
from trainer.failures import Suspended
from trainer.interrupt import Interrupt
from trainer.models.checkpoints import CheckpointError
from trainer.run_folder import hold
from trainer.sweep.display import Display
from trainer.sweep.found import is_done
from trainer.sweep.jobs import Ended, run_all
from trainer.sweep.plan import Plan, Run
from trainer.sweep.table import show, summarise

ANOTHER = "sweep, or a run that it started, is"


def sweep(plan: Plan, runs: Sequence[Run], at_once: int, command: str, console: Console, *, ends_process: bool) -> bool:
    """Runs what is not done yet, and sums up.

    Args:
        plan: of the sweep.
        runs: of it that are wanted.
        at_once: how many may run at a time.
        command: that goes on with it.
        console: for progress, failures and the table.
        ends_process: whether the process ends with it.

    Returns:
        Whether no run has failed.

    Raises:
        ConfigError: another sweep is at work in the folder, or a run in it had other settings.
        Suspended: it was told to stop, or a run was held up by what passes; the same command goes on.
    """
    seeds = [run.seed for run in runs]
    with Interrupt(console, is_last=ends_process) as interrupt, hold(plan.folder, ANOTHER, "--dir") as lock:
        left = [run for run in runs if not is_done(run)]
        done = len(runs) - len(left)
        already = f", {done} of them done already" if done else ""
        word = "run" if len(runs) == 1 else "runs"
        console.print(
            f"[bold]{escape(plan.name)}[/]: {len(runs)} {word}{already} → {escape(str(plan.folder))}", soft_wrap=True
        )
        summarise(plan, seeds)
        images = sum(run.config.run.steps * run.images_a_step for run in left)
        with Display(console, total=len(runs), done=done, images=images, at_once=at_once) as display:
            ended = run_all(left, at_once, display, interrupt, lock, lambda: summarise(plan, seeds))
        show(summarise(plan, seeds), console)
        done = sum(map(is_done, runs))
    _report(ended, console)
    failed = [each for each in ended if not each.goes_on]
    if done < len(runs) and not failed:
        why = "interrupted" if interrupt.requested else "held up by what passes"
        raise Suspended(f"{why}; {done} of {len(runs)} runs are done, and nothing is lost: go on with: {command}")
    return not failed


def check(runs: Sequence[Run]) -> None:
    """Check that all that the runs name is there: rewards, and weights.

    Raises:
        ConfigError: something is not; the message names the run.
    """
    for run in runs:
        try:
            check_names(run.config)
        except (ConfigError, CheckpointError) as error:
            raise ConfigError(f"point {run.point}: {error}") from error


def _report(ended: Sequence[Ended], console: Console) -> None:
    """A line for each run that is not done."""
    for each in ended:
        word = "stopped" if each.goes_on else "failed"
        line = f"{each.run.name} {word} (exit code {each.code}): {each.words}; its log: {each.run.log}"
        console.print(escape(line), soft_wrap=True)
