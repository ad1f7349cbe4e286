"""What a reward model is: it turns images into scores and knows nothing of HTTP or Redis.

Shape suffixes: B images of a batch, H height and W width in pixels, C = 3 channels (RGB).
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class UnfitImage(ValueError):
    """An image that this reward cannot score; the message says value, limit and remedy.

    Attributes:
        index: its position in the batch.
    """

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index


class Reward(Protocol):
    """A reward model.

    The API process creates one to describe it and never calls it: the constructor and the module's imports must be
    light, and whatever is heavy (torch, weights) belongs in `warmup`. A worker calls `warmup` once and then `score`,
    always on one and the same thread.
    """

    @property
    def name(self) -> str:
        """The reward's name: letters, digits, dot, dash, underscore."""

    @property
    def version(self) -> str:
        """Changes whenever the same image would get another score."""

    @property
    def low(self) -> float | None:
        """Smallest possible score, or None."""

    @property
    def high(self) -> float | None:
        """Largest possible score, or None."""

    @property
    def higher_is_better(self) -> bool:
        """The direction of the score."""

    @property
    def uses_prompts(self) -> bool:
        """Whether the prompts change the score."""

    @property
    def needs_prompts(self) -> bool:
        """Whether there is no score without a prompt."""

    @property
    def scale(self) -> str:
        """What the numbers are, in a few words; may be empty."""

    def warmup(self) -> None:
        """Load the weights and run once, so that the first request is not the slow one."""

    def score(self, images_BHWC: NDArray[np.uint8], prompts: Sequence[str] | None) -> NDArray[np.floating]:
        """Score a batch.

        Args:
            images_BHWC: uint8 (B, H, W, 3), 0–255, possibly read-only.
            prompts: one prompt for each image, or None.

        Returns:
            One score for each image (B,), in order; each depends on its own image and prompt alone.

        Raises:
            UnfitImage: one of the images is at fault.
            Exception: of any type, when the batch cannot be scored; a reward never answers with a made-up number.
        """
