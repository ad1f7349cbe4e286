"""What the built-in rewards may be told; `services.settings` reads it from the environment."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class Runtime:
    """How a model of a reward runs.

    Attributes:
        device: where; `auto` is a GPU if there is one.
        precision: of the arithmetic; half precision is autocast, and becomes part of the reward's version.
        compiled: whether `torch.compile` makes it faster, for batches filled up to one of a few sizes.
        max_batch: images in one forward pass.
        cache_dir: where downloaded weights are kept; by default where each library keeps them.
    """

    device: Device = "auto"
    precision: Precision = "float32"
    compiled: bool = False
    max_batch: int = 64
    cache_dir: Path | None = None


STANDARD = Runtime()


@dataclass(frozen=True, slots=True)
class RewardOptions:
    """Everything that the built-in rewards may be told.

    Weights are a name, or the path of a file, which `@sha256:HEX` may follow to hold it to its digest.

    Attributes:
        clip_model: an `open_clip` model.
        clip_weights: one of its pretrained tags, or a path.
        clip_prompt: what pictures are compared to where a request brings no prompts.
        aesthetic_weights: likewise, of the ViT-L/14 under the aesthetic head.
        aesthetic_head: `laion-v2`, or a path.
        runtime: how the models run.
    """

    clip_model: str = "ViT-L-14-quickgelu"
    clip_weights: str = "openai"
    clip_prompt: str | None = None
    aesthetic_weights: str = "openai"
    aesthetic_head: str = "laion-v2"
    runtime: Runtime = STANDARD
