"""What the training step needs of a generator, and nothing more: `trainer.var_policy` makes one of a VAR.

Shape legend: N conditions · B images · L tokens · H, W pixels.
"""

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor, device, nn

from trainer.policy import Rollout


class Policy(Protocol):
    """A next-scale image generator whose distribution over tokens is known.

    A condition is whatever an image is drawn for: a class label here, a row of text tokens in another generator.
    """

    @property
    def device(self) -> device:
        """Where it runs."""

    @property
    def length(self) -> int:
        """L, the tokens of an image."""

    def draw_conditions(self, seed: int, step: int, count: int) -> Tensor:
        """The conditions of a step, (N, …), uniform with repetition, set by seed and step alone."""

    def sample(self, conditions_B: Tensor, *, temperature: float, uniforms_BL: Tensor) -> Rollout:
        """Draw one image for each condition; a token depends on its condition and its own uniform number alone."""

    def decode(self, rollout: Rollout) -> Tensor:
        """The images of a rollout, uint8 (B, H, W, 3)."""

    def log_probs(self, conditions_B: Tensor, tokens_BL: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities of tokens, with gradient, and entropies; float32 (B, L)."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """Those that are trained."""
