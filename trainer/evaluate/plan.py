"""What an evaluation is of: everything that may be wrong with it is found here, before any work."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.config import ConfigError
from trainer.evaluate.columns import Column
from trainer.evaluate.measures import Measures
from trainer.evaluate.picture_folder import open_pictures
from trainer.evaluate.rows import FolderRow, PolicyRow, Row
from trainer.inference.labels import World, label_names, parse_labels
from trainer.inference.sampling import Sampling
from trainer.inference.sources import PolicySource, find_sources, split_name
from trainer.nearest import nearest


@dataclass(frozen=True)
class Plan:
    """What is evaluated and by whom, once all of it is known to be there."""

    rows: Sequence[Row]
    seen: tuple[int, ...]
    measures: Measures
    columns: tuple[Column, ...]
    sampling: Sampling
    chunk: int


def make_plan(
    options: argparse.Namespace, sampling: Sampling, columns: tuple[Column, ...], device: torch.device
) -> Plan:
    """Finds the rows, their labels and who judges them; every policy is loaded once.

    Args:
        options: of `trainer.evaluate`.
        sampling: how policies are drawn from.
        columns: the scores.
        device: of this rank.

    Raises:
        ConfigError: a setting is wrong.
        CheckpointError, JudgeError, LoraError: weights are missing or do not fit.
    """
    sources, folders = find_sources(options.models, options.vqvae), _named_folders(options.images)
    names = [source.name for source in sources] + [name for name, _ in folders]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"two rows are named {twice!r}: tell them apart by NAME=MODEL")
    world: World = options.classifier or _one_world(sources)
    names_of = label_names(world)
    policies = [PolicyRow(source, device, options.dtype, keep=len(sources) == 1) for source in sources]
    count = _one_count(policies, world, names_of)
    names_of = names_of or _names_of_models(sources, count)
    labels = parse_labels(options.labels, count, names_of, "--labels") if options.labels else tuple(range(count))
    seen = parse_labels(options.seen, count, names_of, "--seen") if options.seen else _one_seen(sources)
    for row in policies:
        row.plan(labels, int(options.per_class), sampling, options.seed)
    side = options.size or next((row.side for row in policies), None)
    wanted = labels if options.labels else None
    pictures = [
        FolderRow(name, open_pictures(folder, count=count, names=names_of, side=side, labels=wanted))
        for name, folder in folders
    ]
    rows: list[Row] = [*policies, *pictures]
    if options.seen:
        for each in rows:
            each.seen = seen
    elif seen:  # what is no run's is there to be compared with; a run that was trained on all labels has none unseen
        for row, source in zip(policies, sources, strict=True):
            row.seen = tuple(source.run.rollout.classes) if source.run is not None and source.is_trained else seen
    return Plan(rows, seen, Measures(world, device), columns, sampling, int(options.chunk))


def _named_folders(texts: Sequence[str]) -> list[tuple[str, Path]]:
    pairs = [(name, Path(folder)) for name, folder in map(split_name, texts)]
    for _, folder in pairs:
        if not folder.is_dir():
            beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
            known = sorted(str(folder.parent / entry.name) for entry in beside if entry.is_dir())
            raise ConfigError(f"--images {folder}: no such folder; {nearest(str(folder), known)}")
    return [(name or folder.resolve().name, folder) for name, folder in pairs]


def _one_count(policies: Sequence[PolicyRow], world: World, names_of: Sequence[str]) -> int:
    """How many labels all of them have; 0 where neither a model nor a classifier says."""
    counts = sorted({row.classes for row in policies})
    if len(counts) > 1:
        raise ConfigError(f"the models have {' and '.join(map(str, counts))} labels: evaluate one kind at a time")
    count = counts[0] if counts else len(names_of)
    if names_of and count != len(names_of):
        raise ConfigError(f"--classifier {world} knows {len(names_of)} labels, the models have {count}: choose another")
    return count


def _names_of_models(sources: Sequence[PolicySource], count: int) -> tuple[str, ...]:
    """The labels' names where no classifier is wanted, but the models are of a world that has them."""
    worlds = {source.world for source in sources}
    names = label_names(worlds.pop()) if len(worlds) == 1 else ()
    return names if len(names) == count else ()


def _one_world(sources: Sequence[PolicySource]) -> World:
    worlds = sorted({source.world for source in sources})
    if len(worlds) > 1:
        raise ConfigError(f"the models' classifiers are {' and '.join(worlds)}: choose by --classifier")
    return worlds[0] if worlds else "none"


def _one_seen(sources: Sequence[PolicySource]) -> tuple[int, ...]:
    """The labels that the runs were trained on; none where they were all labels."""
    found = {source.run.rollout.classes for source in sources if source.run is not None} - {()}
    if len(found) > 1:
        raise ConfigError("the runs were trained on different labels: say by --seen which are to be told apart")
    return found.pop() if found else ()
