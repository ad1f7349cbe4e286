"""The rows of an evaluation: each a policy's samples or a folder's pictures, in an order that nothing changes.

Shape legend: N pictures of a row · B of a chunk · H, W pixels.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.config import ConfigError
from trainer.evaluate.picture_folder import PictureFolder
from trainer.inference.drawing import draw
from trainer.inference.loading import load_policy
from trainer.inference.sampling import Sampling
from trainer.inference.sources import PolicySource
from trainer.var_policy import VarPolicy


class Row(Protocol):
    """Pictures to be measured.

    Attributes:
        name: of the row.
        labels_N: int64 (N,).
        identity: plain values that tell which pictures these are.
        about: plain values that a reader wants to know of them.
        seen: labels that are to be told from the others; none where they are not.
    """

    name: str
    labels_N: NDArray[np.int64]
    identity: dict[str, object]
    about: dict[str, object]
    seen: tuple[int, ...]

    def images(self, places: range) -> NDArray[np.uint8]:
        """Some of the pictures, uint8 (B, H, W, 3)."""

    def close(self) -> None:
        """Let go of what takes memory."""


class PolicyRow:
    """Samples of a policy: `per_class` of each label, label after label. The policy is in memory while it is in use."""

    def __init__(self, source: PolicySource, device: torch.device, dtype: str, *, keep: bool = False) -> None:
        """Load the policy, to find out what it is and whether it can be loaded at all.

        Args:
            source: of the policy.
            device: where it runs.
            dtype: of its transformer.
            keep: it in memory until it is used; else it is loaded again.

        Raises:
            CheckpointError, LoraError: it cannot.
        """
        self.name, self._source, self._device, self._dtype = source.name, source, device, dtype
        policy = load_policy(source, device, dtype)
        self._policy: VarPolicy | None = policy if keep else None
        self.weights = policy.digest()
        self.classes = policy.var.config.num_classes
        self.side = policy.vqvae.config.image_size
        self.labels_N = np.empty(0, dtype=np.int64)
        self.identity: dict[str, object] = {}
        self.about: dict[str, object] = {}
        self.seen: tuple[int, ...] = ()

    def plan(self, labels: Sequence[int], per_class: int, sampling: Sampling, seed: int) -> None:
        """Decide what is drawn.

        Raises:
            ConfigError: the policy has no such label.
        """
        outside = [label for label in labels if label >= self.classes]
        if outside:
            raise ConfigError(f"{self.name} has no label {outside[0]}; the nearest is {self.classes - 1}")
        self._sampling, self._seed, self._per_class = sampling, seed, per_class
        self.labels_N = np.repeat(np.asarray(labels, dtype=np.int64), per_class)
        self.identity = {
            "weights": self.weights,
            "labels": list(labels),
            "per_class": per_class,
            "sampling": sampling.to_dict(),
            "seed": seed,
            "dtype": self._dtype,
            "device": self._device.type,
        }
        source = self._source
        self.about = {
            "var": str(source.state or source.var),
            "vqvae": source.vqvae,
            "weights": self.weights,
        }

    def images(self, places: range) -> NDArray[np.uint8]:
        """Samples, uint8 (B, H, W, 3)."""
        if self._policy is None:
            self._policy = load_policy(self._source, self._device, self._dtype)
        labels, indices = self.labels_N[places.start : places.stop].tolist(), [p % self._per_class for p in places]
        return draw(self._policy, labels, indices, self._sampling, seeds=[self._seed] * len(labels))

    def close(self) -> None:
        """Let go of the policy."""
        self._policy = None


class FolderRow:
    """The pictures of a folder."""

    def __init__(self, name: str, pictures: PictureFolder) -> None:
        self.name, self._pictures, self.labels_N = name, pictures, pictures.labels_N
        self.identity: dict[str, object] = {"pictures": pictures.digest()}
        self.about: dict[str, object] = {"images": str(pictures.folder), "side": pictures.side}
        self.seen: tuple[int, ...] = ()

    def images(self, places: range) -> NDArray[np.uint8]:
        """Pictures, uint8 (B, H, W, 3)."""
        return self._pictures.read(places)

    def close(self) -> None:
        """Nothing is kept."""
