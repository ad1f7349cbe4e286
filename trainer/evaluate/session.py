"""An evaluation from start to end: what is checked before any work, the chunks of each row, the numbers of all.

Each rank measures a share of the chunks, a round at a time; the first one joins them.
"""

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainer.build import choose_device
from trainer.distributed import Group
from trainer.evaluate.bootstrap import LEVEL, REPLICATES
from trainer.evaluate.chunks import Chunks, digest_of
from trainer.evaluate.columns import Column, Scorers
from trainer.evaluate.measures import COLOURFULNESS, LABELS, PAINTED, RANKS, SCORE, STYLE, THUMBNAILS, Begun
from trainer.evaluate.plan import Plan, make_plan
from trainer.evaluate.rows import Row
from trainer.evaluate.summary import summarise
from trainer.evaluate.table import markdown_table
from trainer.failures import Suspended, passes
from trainer.inference.sampling import Sampling
from trainer.interrupt import Interrupt
from trainer.local_rewards import LocalRewards
from trainer.models.checkpoints import CheckpointError
from trainer.run_folder import hold, write_text
from trainer.scoring import ScoreError
from trainer.settings import Ranks

FORMAT = 1
"""Of the chunks; one that changes what they hold has another."""
SPARE_S = 6 * 3600.0
"""How much longer than for the scores a rank waits for a living one."""


def evaluate(
    options: argparse.Namespace,
    sampling: Sampling,
    columns: tuple[Column, ...],
    ranks: Ranks,
    command: str,
    console: Console,
    *,
    ends_process: bool,
) -> None:
    """Evaluate what the command line says.

    Args:
        options: of `trainer.evaluate`.
        sampling: how policies are drawn from.
        columns: the scores.
        ranks: of this process.
        command: that started it, and that goes on where it stops.
        console: for progress and the table.
        ends_process: whether the process ends with it.

    Raises:
        ConfigError: a setting is wrong; nothing has been done.
        Suspended: a service or a rank stayed away; what is done is kept.
        CheckpointError, JudgeError, LoraError, PictureError, LocalRewardsError, RewardError, ScoreError, RankError,
        OSError: with a message of one line.
    """
    out: Path = options.out
    with ExitStack() as stack:
        stack.enter_context(Interrupt(console, is_last=ends_process))
        console = console if ranks.rank == 0 else Console(quiet=True)
        device = choose_device(options.device, ranks.local_rank)
        group = stack.enter_context(closing(Group(ranks, device, timeout_s=options.score_timeout + SPARE_S)))
        group.when_lost = lambda: f"; what is done is kept in {out}: go on with: {command}"
        with group.together():
            plan = make_plan(options, sampling, columns, device)
            if group.leads:
                stack.enter_context(hold(out, "evaluation is", "--out"))
        services, urls = _start_services(plan, out, group, stack, console)
        try:
            scorers = _open_scorers(plan, options.score_timeout, services, urls, group, stack)
            done = [_measure(row, plan, scorers, out, group, console) for row in plan.rows]
        except Exception as error:
            if passes(error):
                raise Suspended(f"{error}; what is done is kept in {out}: go on with: {command}") from error
            raise
        if group.leads:
            _write(plan, scorers, done, options, command, device, console)


def _start_services(
    plan: Plan, out: Path, group: Group, stack: ExitStack, console: Console
) -> tuple[LocalRewards, dict[str, str]]:
    """Starts the rewards that have no url, on the first rank, and tells all where they listen."""
    local = list(dict.fromkeys(column.reward.name for column in plan.columns if column.reward.url is None))
    services = LocalRewards(local if group.leads else [], out / "services.log")
    with group.together():
        stack.enter_context(services)
    urls: dict[str, str] = json.loads(group.tell(json.dumps(services.urls)))
    for name, url in urls.items():
        console.print(escape(f"reward {name}: {url}  (started for this evaluation)"), soft_wrap=True)
    return services, urls


def _open_scorers(
    plan: Plan, timeout_s: float, services: LocalRewards, urls: dict[str, str], group: Group, stack: ExitStack
) -> Scorers:
    """Reaches the services of all columns; every rank must reach the same models."""
    scorers = Scorers(plan.columns, services, urls, timeout_s)
    with group.together():
        scorers.open(stack)
    with group.together():
        if json.loads(group.tell(json.dumps(scorers.models))) != scorers.models:
            raise ScoreError(f"rank {group.rank} reaches other models of a reward than the first: {scorers.models}")
    return scorers


def _measure(
    row: Row, plan: Plan, scorers: Scorers, out: Path, group: Group, console: Console
) -> tuple[str, dict[str, dict[str, object]] | None]:
    """Measures what is missing of a row; its digest, and on the first rank its numbers."""
    identity = {
        "format": FORMAT,
        "pictures": row.identity,
        "chunk": plan.chunk,
        "classifiers": plan.measures.identity,
        "scores": scorers.models,
    }
    digest, total = digest_of(identity), len(row.labels_N)
    with group.together():
        if group.tell(digest) != digest:
            raise CheckpointError(f"{row.name} is another for rank {group.rank} than for the first; name one source")
    count = -(-total // plan.chunk)
    chunks = Chunks(out / "work", digest, count)
    missing: list[int] = json.loads(group.tell(json.dumps(chunks.missing() if group.leads else None)))
    _go_through(row, plan, scorers, chunks, missing, group, console)
    row.close()
    summary: dict[str, dict[str, object]] | None = None
    with group.together():
        if group.leads:
            optional = [
                *([RANKS] if plan.measures.classifies else []),
                *([STYLE, PAINTED] if plan.measures.styles else []),
            ]
            names = [f"{SCORE}{column.name}" for column in plan.columns]
            arrays = chunks.join([*names, LABELS, COLOURFULNESS, THUMBNAILS, *optional])
            summary = summarise(
                arrays, columns=[c.name for c in plan.columns], styles=plan.measures.styles, seen=row.seen
            )
    return digest, summary


def _go_through(
    row: Row, plan: Plan, scorers: Scorers, chunks: Chunks, missing: Sequence[int], group: Group, console: Console
) -> None:
    """Measures the missing chunks: each rank one a round, while the scores of the one before are on their way."""
    total = len(row.labels_N)
    sizes = {index: min(plan.chunk, total - index * plan.chunk) for index in missing}
    bar = Progress(
        TextColumn("[bold]{task.description}"),
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=2,
        disable=not group.leads,
    )
    with bar:
        task = bar.add_task(escape(row.name), total=total, completed=total - sum(sizes.values()))
        begun: tuple[int, Begun] | None = None
        for first in range(0, len(missing) + group.size, group.size):
            turn = missing[first : first + group.size]
            with group.together():
                begun, previous = None, begun
                if group.rank < len(turn):
                    begun = (turn[group.rank], _begin(row, plan, scorers, turn[group.rank], total))
                if previous is not None:
                    chunks.write(previous[0], plan.measures.finish(previous[1]))
            bar.update(task, advance=sum(sizes[index] for index in missing[max(0, first - group.size) : first]))


def _begin(row: Row, plan: Plan, scorers: Scorers, index: int, total: int) -> Begun:
    places = range(index * plan.chunk, min((index + 1) * plan.chunk, total))
    return plan.measures.begin(row.images(places), row.labels_N[places.start : places.stop], scorers)


def _write(
    plan: Plan,
    scorers: Scorers,
    done: Sequence[tuple[str, dict[str, dict[str, object]] | None]],
    options: argparse.Namespace,
    command: str,
    device: torch.device,
    console: Console,
) -> None:
    """Writes and prints what was found."""
    rows = [
        {"name": row.name, "digest": digest, **row.about, "splits": splits}
        for row, (digest, splits) in zip(plan.rows, done, strict=True)
    ]
    content = {
        "format": FORMAT,
        "command": command,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "sampling": {**plan.sampling.to_dict(), "seed": options.seed, "per_class": int(options.per_class)},
        "dtype": options.dtype,
        "scores": [
            {"column": c.name, "reward": c.reward.name, "prompt": c.reward.prompt, "model": scorers.models[c.name]}
            for c in plan.columns
        ],
        "seen": list(plan.seen),
        "interval": {"level": LEVEL, "replicates": REPLICATES, "resampled": "images within each class"},
        "rows": rows,
    }
    table = markdown_table(rows)
    settings = (
        f"Samples: {plan.sampling}, seed {options.seed}. ± is half of the {LEVEL:.0%} bootstrap interval's width.\n"
    )
    write_text(options.out / "evaluation.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    write_text(options.out / "table.md", f"{table}\n{settings}")
    print(table)  # what the command is asked for; all else goes to the other stream
    console.print(escape(f"{options.out / 'evaluation.json'}, {options.out / 'table.md'}"), soft_wrap=True)
