"""How images are drawn, as the commands' options say it: as at inference, or plainly as in training."""

import argparse
from dataclasses import asdict, dataclass

from trainer.command import Parser, number
from trainer.config import ConfigError

GUIDANCE, TOP_K, TOP_P = 1.5, 900, 0.96
"""Of the official samples that FID is computed on (arXiv 2404.02905)."""
PLAIN_TEMPERATURE = 0.7
"""Of the paper's training (arXiv 2505.23331)."""


@dataclass(frozen=True)
class Sampling:
    """A way of drawing.

    Args:
        plain: multinomial sampling at a temperature and nothing else; then the following three are None.
        guidance: at least 0, on the official ramp over the scales.
        top_k: tokens kept at each position; 0 keeps all.
        top_p: in (0, 1], probability mass kept at each position.
        temperature: above 0.
    """

    plain: bool
    guidance: float | None
    top_k: int | None
    top_p: float | None
    temperature: float

    def to_dict(self) -> dict[str, object]:
        """Plain values, for a file."""
        return asdict(self)

    def __str__(self) -> str:
        if self.plain:
            return f"plain sampling at temperature {self.temperature:g}"
        tempered = "" if self.temperature == 1 else f", temperature {self.temperature:g}"
        return f"guidance {self.guidance:g}, top-k {self.top_k}, top-p {self.top_p:g}{tempered}"


def add_sampling_options(parser: Parser) -> None:
    """Adds what `sampling_of` reads."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--guidance", type=number(float, 0, 100), help=f"on the official ramp ({GUIDANCE})")
    group.add_argument("--top-k", type=number(int, 0, 10**6), help=f"tokens kept at each position; 0 for all ({TOP_K})")
    group.add_argument(
        "--top-p", type=number(float, 0, 1, above=True), help=f"probability mass kept at each position ({TOP_P})"
    )
    group.add_argument(
        "--temperature", type=number(float, 0, 10, above=True), help=f"(1; with --plain {PLAIN_TEMPERATURE})"
    )
    group.add_argument(
        "--plain", action="store_true", help="as in training: no guidance, no top-k, no top-p, at the temperature"
    )


def sampling_of(options: argparse.Namespace) -> Sampling:
    """The way of drawing that was asked for.

    Raises:
        ConfigError: plain sampling was asked for, and something that it does without.
    """
    if options.plain:
        for name in ("guidance", "top_k", "top_p"):
            if getattr(options, name) is not None:
                raise ConfigError(f"--plain samples without --{name.replace('_', '-')}: leave one of the two out")
        return Sampling(True, None, None, None, options.temperature or PLAIN_TEMPERATURE)
    return Sampling(
        False,
        GUIDANCE if options.guidance is None else options.guidance,
        TOP_K if options.top_k is None else int(options.top_k),
        TOP_P if options.top_p is None else options.top_p,
        options.temperature or 1.0,
    )
