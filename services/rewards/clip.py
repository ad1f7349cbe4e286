"""CLIP similarity: how well a picture goes with a text.

Shape suffixes: B images of a batch, H height and W width in pixels, C = 3 channels (RGB).
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from numpy.typing import NDArray

from services.rewards.options import STANDARD, RewardOptions, Runtime
from services.rewards.sources import Source, parse_source

if TYPE_CHECKING:
    from services.rewards.encoder import Encoder

REVISION = "1"
"""Changes whenever this code gives the same pictures other scores."""
MINIATURE_MODEL = "mini-clip"
WEIGHTS = Path(__file__).parent / "weights"
RECORDS = WEIGHTS / "metrics.json"


class Clip:
    """Cosine of the embeddings of picture and prompt by an `open_clip` model (Radford et al., arXiv 2103.00020)."""

    name = "clip"
    low: float | None = -1.0
    high: float | None = 1.0
    higher_is_better = True
    uses_prompts = True
    scale = "cosine similarity of picture and prompt, not multiplied by 100"

    def __init__(self, model: str, source: Source, prompt: str | None = None, runtime: Runtime = STANDARD) -> None:
        """Say what is to be loaded; nothing is loaded yet.

        Args:
            model: an `open_clip` model, or `mini-clip`.
            source: of its weights.
            prompt: for pictures that come without.
            runtime: how it runs.
        """
        self._model, self._source, self._prompt, self._runtime = model, source.held(), prompt, runtime
        self.version = version_of(model, self._source, REVISION, prompt or "", runtime.precision)
        self.needs_prompts = prompt is None
        self._encoder: Encoder | None = None

    @classmethod
    def configured(cls, options: RewardOptions) -> Self:
        """The reward that the settings describe."""
        return cls(options.clip_model, parse_source(options.clip_weights), options.clip_prompt, options.runtime)

    def warmup(self) -> None:
        """Load the weights and run once.

        Raises:
            services.rewards.sources.WeightsError: they cannot be loaded.
        """
        from services.rewards.encoder import Encoder  # noqa: PLC0415 - torch, which the API does without

        self._encoder = Encoder(self._model, self._source, self._runtime)
        self._encoder.warmup()
        self._encoder.texts([self._prompt or "a picture"])

    def score(self, images_BHWC: NDArray[np.uint8], prompts: Sequence[str] | None) -> NDArray[np.float64]:
        """Score a batch.

        Args:
            images_BHWC: uint8 (B, H, W, 3).
            prompts: one for each image; the settings' prompt for all if None.

        Returns:
            float64 (B,) in [−1, 1].

        Raises:
            ValueError: there is no prompt, or another number of them than of images.
        """
        assert self._encoder is not None
        if prompts is None:
            if self._prompt is None:
                raise ValueError("there is no prompt: send one for each image, or set REWARD_CLIP_PROMPT")
            prompts = [self._prompt]  # for all
        elif len(prompts) != len(images_BHWC):
            raise ValueError(f"{len(images_BHWC)} images with {len(prompts)} prompts: give one for each image")
        cosines_B = (self._encoder.images(images_BHWC) * self._encoder.texts(prompts)).sum(dim=-1)
        scores_B: NDArray[np.float64] = cosines_B.clamp(-1, 1).double().cpu().numpy()
        return scores_B


class MiniatureClip(Clip):
    """The same by the miniature's own small model, whose weights are part of this package."""

    name = "mini-clip"

    @classmethod
    def configured(cls, options: RewardOptions) -> Self:
        """The reward that the settings describe; the weights are the package's."""
        return cls(MINIATURE_MODEL, miniature_source("clip"), options.clip_prompt, options.runtime)


def miniature_source(part: Literal["clip", "aesthetic"]) -> Source:
    """The package's own weights, held to the digest in their record."""
    record = json.loads(RECORDS.read_text("utf-8"))[part]
    return Source(None, WEIGHTS / f"mini-{part}.safetensors", record["sha256"])


def version_of(model: str, weights: Source, *parts: str) -> str:
    """A version that names the model, and its weights where they have a name, and differs where any part differs.

    Args:
        model: its name.
        weights: a file is what it holds, wherever it is.
        parts: whatever else changes a score.
    """
    digest = hashlib.sha256(repr((model, weights.identity(), *parts)).encode()).hexdigest()[:12]
    readable = "-".join(part for part in (model, weights.name) if part)[:48]
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', readable)}-{digest}".lstrip("._-")
