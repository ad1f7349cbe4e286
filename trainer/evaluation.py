"""What a policy is worth: the same samples before and after training, scored by the rewards and by an outside judge.

Shape legend: B images · H, W pixels.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.config import Config
from trainer.interface import Policy
from trainer.loop import LabelJudge, Learner
from trainer.metrics import Metrics
from trainer.pictures import save_grid
from trainer.policy import Rollout, keyed_uniforms
from trainer.rollout import Submit
from trainer.scoring import Scorer, collect
from trainer.var_policy import VarPolicy

Draw = Callable[[Tensor, Tensor], Rollout]
GRID_COLUMNS, GRID_ROWS = 16, 4
EVAL_STEP = 2**32  # no training step has this number, so no training sample shares its random numbers


class Samples(NamedTuple):
    """Images uint8 (B, H, W, 3) of labels int64 (B,)."""

    images_BHW3: NDArray[np.uint8]
    labels_B: NDArray[np.int64]


def draw_samples(policy: Policy, labels_B: NDArray[np.int64], draw: Draw, *, seed: int, chunk: int) -> Samples:
    """One image of each label; image i depends on (seed, i, label) alone.

    Args:
        policy: decodes what was drawn.
        labels_B: int64 (B,).
        draw: the way of sampling, from labels and uniform numbers to a rollout.
        seed: of the uniform numbers.
        chunk: images drawn at once.
    """
    images: list[NDArray[np.uint8]] = []
    for first in range(0, len(labels_B), chunk):
        slots = range(first, min(first + chunk, len(labels_B)))
        uniforms_BL = keyed_uniforms(seed, EVAL_STEP, slots, 1, policy.length)
        rollout = draw(torch.from_numpy(labels_B[first : slots.stop]), uniforms_BL)
        images.append(policy.decode(rollout).cpu().numpy())
    return Samples(np.concatenate(images), labels_B)


def spread_labels(count: int, classes: tuple[int, ...]) -> NDArray[np.int64]:
    """`count` labels spread evenly over the classes, int64: they take turns, or stand for their neighbours."""
    step = max(1.0, len(classes) / count)
    rows = (np.arange(count) * step).astype(np.int64) % len(classes)
    return np.asarray(classes, dtype=np.int64)[rows]


def score_samples(samples: Samples, submit: Submit, judge: LabelJudge | None, *, chunk: int) -> Metrics:
    """Mean reward, raw score (of the first reward), success rate and label accuracy of samples.

    Raises:
        RewardError, ScoreError: a score did not come or is not a number.
    """
    images = samples.images_BHW3
    scored = collect([submit(images[first : first + chunk]) for first in range(0, len(images), chunk)])
    named: Metrics = {f"raw_score/{name}": float(raw_B.mean()) for name, raw_B in scored.raw.items()}
    return {
        "reward": float(scored.reward.mean()),
        "raw_score": float(next(iter(scored.raw.values())).mean()),
        "success_rate": None if scored.success is None else float(scored.success.mean()),
        "label_accuracy": judge(images, samples.labels_B) if judge else None,
        **named,
    }


class Evaluator:
    """Measures a run's policy, always by the same labels and random numbers."""

    def __init__(self, config: Config, learner: Learner, scorer: Scorer, watcher: Scorer | None) -> None:
        """Bind what is measured and by what.

        Args:
            config: of the run.
            learner: its policy is measured.
            scorer: of the rewards that are optimised.
            watcher: of those that are only looked at.
        """
        assert isinstance(learner.policy, VarPolicy)
        self.policy = learner.policy
        self._config, self._judge, self._scorer, self._watcher = config, learner.judge, scorer, watcher

    def measure(self) -> Metrics:
        """What docs/metrics.md says of an evaluation.

        Raises:
            RewardError, ScoreError: a score did not come or is not a number.
        """
        config, chunk = self._config.eval, self._config.rollout.chunk
        labels_B = spread_labels(config.samples, tuple(self.policy.classes))
        samples = draw_samples(self.policy, labels_B, self._plain, seed=config.seed, chunk=chunk)
        measured = self._scored(samples)
        if config.inference:
            guided = draw_samples(self.policy, labels_B, self._guided, seed=config.seed, chunk=chunk)
            measured |= {f"inference/{name}": value for name, value in self._scored(guided).items()}
        return measured

    @property
    def models(self) -> dict[str, str]:
        """Name and version of each reward's model, by its name, of those that are optimised and those looked at."""
        return self._scorer.models | (self._watcher.models if self._watcher is not None else {})

    def save_grid(self, path: Path) -> None:
        """Samples of the same labels and seeds each time: a column a label, a row a seed."""
        classes = tuple(self.policy.classes)
        columns = np.asarray(classes[:: max(1, len(classes) // GRID_COLUMNS)][:GRID_COLUMNS])
        seed, chunk = self._config.eval.seed + 1, self._config.rollout.chunk
        samples = draw_samples(self.policy, np.tile(columns, GRID_ROWS), self._plain, seed=seed, chunk=chunk)
        save_grid(path, samples.images_BHW3, columns=len(columns))

    def _plain(self, labels_B: Tensor, uniforms_BL: Tensor) -> Rollout:
        return self.policy.sample(labels_B, temperature=self._config.rollout.temperature, uniforms_BL=uniforms_BL)

    def _guided(self, labels_B: Tensor, uniforms_BL: Tensor) -> Rollout:
        config = self._config.eval
        return self.policy.generate(
            labels_B, uniforms_BL=uniforms_BL, guidance=config.guidance, top_k=config.top_k, top_p=config.top_p
        )

    def _scored(self, samples: Samples) -> Metrics:
        chunk = self._config.rollout.chunk
        measured = score_samples(samples, self._scorer.submit, self._judge, chunk=chunk)
        if self._watcher is not None:
            watched = score_samples(samples, self._watcher.submit, None, chunk=chunk)
            measured |= {name: value for name, value in watched.items() if name.startswith("raw_score/")}
        return measured
