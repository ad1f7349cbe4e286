"""What a run needs before its first step: ranks, models, its folder and state, its services; then the session."""

import json
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from trainer import loggers
from trainer.build import choose_device, make_learner
from trainer.checkpoint import Checkpoints, RunState
from trainer.config import Config, ConfigError, RewardConfig
from trainer.distributed import Group
from trainer.evaluation import Evaluator
from trainer.interrupt import Interrupt
from trainer.local_rewards import LocalRewards
from trainer.loop import Learner
from trainer.models.checkpoints import CheckpointError
from trainer.run_folder import STATES, check_settings, describe, hold, mark, open_folder
from trainer.run_state import restore
from trainer.scoring import Scorer
from trainer.session import Session, Start
from trainer.settings import Ranks, load_settings

READY_S = 30.0
SPARE_S = 6 * 3600.0
"""How much longer than for the scores a rank waits for a living one: for an evaluation, or while it saves."""


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
    load_settings()  # a wrong variable ends it here, before any work
    config.check_ranks(ranks.world_size)
    loggers.check(config.run.loggers)
    device = choose_device(config.run.device, ranks.local_rank)
    timeout_s = config.run.score_timeout_s + SPARE_S
    with ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt(console, is_last=start.ends_process))
        console = console if ranks.rank == 0 else Console(quiet=True)
        group = stack.enter_context(closing(Group(ranks, device, timeout_s=timeout_s)))
        torch.manual_seed(config.run.seed)
        with group.together():
            learner = make_learner(config, group, device)
            began = group.launch if ranks.torchelastic_restart_count else ""
            found = open_folder(config, start.resume, began, must_resume=start.must_resume) if group.leads else None
        folder, state_path = _told(group, found)
        states = Checkpoints(folder / STATES, keep=config.checkpoint.keep, run=config.identity())
        with group.together():
            if group.leads:
                stack.enter_context(hold(folder))
                mark(folder, group.launch)
            state = None
            if state_path or states.latest():
                check_settings(folder, config)
                state = states.load(state_path)
                _check_origin(state, learner, config)
                restore(learner, state.tensors)
                state.tensors.clear()  # in the learner now
        with group.together():
            if group.tell(learner.origin) != learner.origin:
                raise CheckpointError(f"{_sources(config)} hold other weights for rank {group.rank} than for the first")
        step = 0 if state is None else state.step
        if step > config.run.steps:
            raise ConfigError(f"run.steps is {config.run.steps}, and {step} are done: give as many or more")
        _announce(config, start, folder, step, console)
        scorers = _open_scorers(config, group, folder, stack, console, {} if state is None else state.values["models"])
        evaluator = Evaluator(config, learner, *scorers)
        run = Session(config, start, learner, group, folder, states, evaluator, scorers[0], interrupt, console, step)
        with group.together():
            if group.leads:
                describe(folder, config, device)  # now that nothing refuses to begin
        if state is not None:
            run.seconds, run.before, run.reward = state.values["seconds"], state.values["before"], state.score
        run.train()
    return folder


def _told(group: Group, found: tuple[Path, Path | None] | None) -> tuple[Path, Path | None]:
    """What the first rank found, for all."""
    folder, state = json.loads(group.tell(json.dumps([str(path or "") for path in found] if found else None)))
    return Path(folder), Path(state) if state else None


def _check_origin(state: RunState, learner: Learner, config: Config) -> None:
    """The reference of a run is what it began with, wherever that is read now."""
    if state.values["origin"] != learner.origin:
        raise CheckpointError(
            f"{_sources(config)} hold other weights than those that the run began with; name those, or start a new run"
        )


def _sources(config: Config) -> str:
    return f"model.var {config.model.var} and model.vqvae {config.model.vqvae}"


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
            token=load_settings().token,
            models=models,
        )
        services.when_dead(scorer.abort)
        return stack.enter_context(scorer)

    with group.together():
        scorer = open_scorer(config.rewards)
        watcher = open_scorer(config.eval.rewards) if config.eval.rewards and group.leads else None
    with group.together():
        for name, model in json.loads(group.tell(json.dumps(scorer.models))).items():
            scorer.check_model(name, model)
    return scorer, watcher
