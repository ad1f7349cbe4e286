"""What is measured of each picture: scores, whether it is its label, style, strokes, colourfulness, and a thumbnail.

Shape legend: B pictures of a chunk · H, W pixels · K classes.
"""

import hashlib
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from trainer.evaluate.columns import Scorers, collect_scores
from trainer.evaluate.picture_folder import UNLABELLED
from trainer.inference.labels import World
from trainer.judges import Classify, make_classifier
from trainer.miniature.classifiers import predict
from trainer.miniature.rating import colourfulness
from trainer.miniature.render import STYLES
from trainer.miniature.strokes import is_painted
from trainer.miniature.weights import FILES, load_classifier
from trainer.scoring import Scored

THUMBNAIL = 16  # pixels a side; what pictures of a class are compared by
SCORE = "score/"
LABELS, RANKS, STYLE, PAINTED = "labels", "ranks", "style", "painted"
COLOURFULNESS, THUMBNAILS = "colourfulness", "thumbnails"
Arrays = dict[str, NDArray[np.float64] | NDArray[np.float32] | NDArray[np.int64]]


class Begun(NamedTuple):
    """A chunk whose scores are on their way: what is measured already, and what is awaited."""

    arrays: Arrays
    pending: dict[str, Future[Scored]]


class Measures:
    """Measures pictures of one world, by its classifiers and by reward services."""

    def __init__(self, world: World, device: torch.device) -> None:
        """Load the classifiers.

        Args:
            world: `miniature` has a judge of labels and one of styles, `imagenet` one of labels, `none` none.
            device: where they run.

        Raises:
            JudgeError, CheckpointError: their weights cannot be had.
        """
        self._classify: Classify | None = make_classifier(world, device, option="--classifier")
        self._style = load_classifier("style", device=device) if world == "miniature" else None
        self.styles: tuple[str, ...] = STYLES if self._style is not None else ()
        self.identity: str = world
        if world == "miniature":
            parts = [hashlib.sha256(FILES[kind].read_bytes()).hexdigest() for kind in ("label", "style")]
            self.identity = f"{world} {' '.join(parts)} {PAINTED}"

    @property
    def classifies(self) -> bool:
        """Whether there is a judge of labels."""
        return self._classify is not None

    def begin(self, images_BHW3: NDArray[np.uint8], labels_B: NDArray[np.int64], scorers: Scorers) -> Begun:
        """Sends pictures off to be scored, and measures meanwhile what is measured here.

        Args:
            images_BHW3: uint8 (B, H, W, 3).
            labels_B: int64 (B,), `UNLABELLED` where there is none.
            scorers: that score them.
        """
        pending = scorers.submit(images_BHW3)
        arrays: Arrays = {
            LABELS: labels_B,
            COLOURFULNESS: colourfulness(images_BHW3),
            THUMBNAILS: thumbnails(images_BHW3),
        }
        if self._classify is not None:
            arrays[RANKS] = label_ranks(self._classify(images_BHW3), labels_B)
        if self._style is not None:
            arrays[STYLE] = predict(self._style, images_BHW3).argmax(axis=1)
            arrays[PAINTED] = is_painted(images_BHW3).astype(np.int64)
        return Begun(arrays, pending)

    @staticmethod
    def finish(begun: Begun) -> Arrays:
        """All that is measured, once the scores have come.

        Raises:
            RewardError, ScoreError: a score did not come or is not a number.
        """
        scores = collect_scores(begun.pending)
        return begun.arrays | {f"{SCORE}{name}": values_B for name, values_B in scores.items()}


def label_ranks(scores_BK: NDArray[np.float64], labels_B: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many classes are likelier than the label, int64 (B,); at 0 it is recognised. `UNLABELLED` stays.

    Raises:
        ValueError: a label is none of the K classes.
    """
    if labels_B.max(initial=0) >= scores_BK.shape[1]:
        raise ValueError(f"label {labels_B.max()} is none of the classifier's {scores_BK.shape[1]}; choose another")
    own_B1 = np.take_along_axis(scores_BK, np.maximum(labels_B, 0)[:, None], axis=1)
    ranks_B = (scores_BK > own_B1).sum(axis=1).astype(np.int64)
    return np.where(labels_B == UNLABELLED, UNLABELLED, ranks_B)


def thumbnails(images_BHW3: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pictures averaged to 16×16, float32 (B, 768) in [0, 1]."""
    images_B3HW = torch.from_numpy(np.ascontiguousarray(images_BHW3)).permute(0, 3, 1, 2).float() / 255
    small: NDArray[np.float32] = F.adaptive_avg_pool2d(images_B3HW, THUMBNAIL).flatten(1).numpy()
    return small
