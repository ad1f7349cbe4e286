"""Aesthetic score: what people would rate a picture, predicted from its CLIP embedding.

Shape suffixes: B images of a batch, D dimensions of an embedding, H height and W width in pixels, C = 3 channels (RGB).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from services.rewards.clip import MINIATURE_MODEL, miniature_source, version_of
from services.rewards.options import STANDARD, RewardOptions, Runtime
from services.rewards.sources import Published, Source, WeightsError, check_file, fetch, parse_source

if TYPE_CHECKING:
    from services.rewards.encoder import Encoder
    from services.rewards.head import Affine

REVISION = "1"
"""Changes whenever this code gives the same pictures other scores."""
MODEL = "ViT-L-14-quickgelu"
PUBLISHED = {
    "laion-v2": Published(
        url="https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
        "sac%2Blogos%2Bava1-l14-linearMSE.pth",
        sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
        size_bytes=3_714_759,
    )
}
DEFAULT_CACHE = Path("~/.cache/var-grpo")


class Aesthetic:
    """The LAION aesthetic predictor V2: linear layers over the unit embedding of OpenAI's CLIP ViT-L/14.

    Source: github.com/christophschuhmann/improved-aesthetic-predictor, `sac+logos+ava1-l14-linearMSE`.
    """

    name = "aesthetic"
    low: float | None = None
    high: float | None = None
    higher_is_better = True
    uses_prompts = False
    needs_prompts = False
    scale = "predicted rating, from about 1 to about 10"

    def __init__(self, model: str, source: Source, head: Source, runtime: Runtime = STANDARD) -> None:
        """Say what is to be loaded; nothing is loaded yet.

        Args:
            model: an `open_clip` model, or `mini-clip`.
            source: of its weights.
            head: `laion-v2`, or a file of linear layers.
            runtime: how it runs.
        """
        self._model, self._source, self._head_source, self._runtime = model, source.held(), head.held(), runtime
        self.version = version_of(model, self._source, REVISION, self._head_source.identity(), runtime.precision)
        self._encoder: Encoder | None = None
        self._head: Affine | None = None

    @classmethod
    def configured(cls, options: RewardOptions) -> Self:
        """The reward that the settings describe."""
        source, head = parse_source(options.aesthetic_weights), parse_source(options.aesthetic_head)
        return cls(MODEL, source, head, options.runtime)

    def warmup(self) -> None:
        """Load the weights and run once.

        Raises:
            services.rewards.sources.WeightsError: they cannot be loaded.
        """
        from services.rewards.encoder import Encoder  # noqa: PLC0415 - torch, which the API does without
        from services.rewards.head import load_head  # noqa: PLC0415

        self._head = load_head(self._head_path())  # first: it is small, and so tells soon what is wrong
        self._encoder = Encoder(self._model, self._source, self._runtime)
        self._encoder.warmup()
        self._head.check(self._encoder.dimensions, f"{self._model}'s")

    def _head_path(self) -> Path:
        head = self._head_source
        if head.path is not None:
            return check_file(head.path, head.sha256)
        published = PUBLISHED.get(str(head.name))
        if published is None:
            raise WeightsError(f"there is no head {head.name!r}: give {', '.join(PUBLISHED)}, or a path")
        return fetch(published, (self._runtime.cache_dir or DEFAULT_CACHE).expanduser())

    def score(self, images_BHWC: NDArray[np.uint8], prompts: Sequence[str] | None) -> NDArray[np.float64]:
        """Score a batch.

        Args:
            images_BHWC: uint8 (B, H, W, 3).
            prompts: not used.

        Returns:
            float64 (B,), mostly from 1 to 10.
        """
        del prompts
        assert self._encoder is not None
        assert self._head is not None
        return self._head(self._encoder.images(images_BHWC))


class MiniatureAesthetic(Aesthetic):
    """The same over the miniature's own CLIP; both weights are part of this package."""

    name = "mini-aesthetic"

    @classmethod
    def configured(cls, options: RewardOptions) -> Self:
        """The reward that the settings describe; the weights are the package's."""
        return cls(MINIATURE_MODEL, miniature_source("clip"), miniature_source("aesthetic"), options.runtime)
