"""One validated tree of settings for a run, read from a recipe and the command line.

A recipe is a YAML file whose head comment gives its command, hardware, expected time and result. Unknown keys, wrong
types and values out of range are refused before anything starts; below `run.py`, functions take plain values.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import httpx
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from trainer.shaping import Affine, Shape, refuse_booleans

FREE_TO_CHANGE = {
    "model": ("var", "vqvae", "recompute", "compile", "classifier"),
    "rollout": ("chunk", "blocking"),
    "optim": ("micro_batch",),
    "rewards": ("url",),
}
"""What a run may change when it goes on: it moves work about, and alters nothing but the last digits.

Where weights are read may change, too: the state knows a digest of those that the run began with.
"""
MAX_CLASSES = 1_000_000  # a mistyped range must not fill the memory

Combine = Literal["sum_then_normalize", "normalize_then_sum"]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]


class ConfigError(ValueError):
    """A recipe or an option that cannot be used; the message says the value, the limit and the remedy."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: object, info: ValidationInfo) -> object:
        """YAML reads `on` and `yes` as true, which would pass for the number 1; only a switch may be given it."""
        is_switch = cls.model_fields[str(info.field_name)].annotation is bool
        return value if is_switch else refuse_booleans(value)


def _expand_range(value: object) -> object:
    """`3-5` as [3, 4, 5], and 3 as [3]."""
    if type(value) is int:
        return (value,)
    if not isinstance(value, str):
        return value
    first, _, last = value.replace(" ", "").partition("-")
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < MAX_CLASSES):
        raise ValueError(f"write FIRST-LAST, such as 0-499 and below {MAX_CLASSES:,}, or a list of labels")
    return tuple(range(int(first), int(last) + 1))


class LoraConfig(_Section):
    """Train small adapters in place of the whole transformer; the reference is then the same with them off.

    Args:
        rank: of each adapter.
        alpha: their output is multiplied by alpha / rank.
    """

    rank: Positive
    alpha: Annotated[float, Field(gt=0)]


class ModelConfig(_Section):
    """Which policy is trained, and with which tokenizer and classifier.

    A source is `miniature`, a local path (.pth or .safetensors), or a published name such as
    `FoundationVision/var:var_d16.pth`.

    Args:
        var: source of the transformer.
        vqvae: source of the tokenizer.
        classifier: which classifier tells whether a sample is still its label.
        lora: train adapters; null for the whole transformer.
        recompute: keep no activations of a block for its backward pass, but compute them again.
        compile: let `torch.compile` fuse the blocks: faster steps after minutes of compilation.
    """

    var: str = "miniature"
    vqvae: str = "miniature"
    classifier: Literal["miniature", "imagenet", "none"] = "miniature"
    lora: LoraConfig | None = None
    recompute: bool = False
    compile: bool = False


class RolloutConfig(_Section):
    """What a step samples.

    Args:
        labels: labels drawn a step, uniformly and with repetition.
        group_size: images sampled for each label.
        temperature: of the policy, in sampling and in scoring alike.
        chunk: images sampled at once, whole groups.
        classes: labels to draw from, `0-499` or a list; all classes when empty.
        blocking: wait for each chunk's scores before the next is sampled, as a naive loop would; for comparison.
    """

    labels: Positive = 32
    group_size: Annotated[int, Field(ge=2)] = 16
    temperature: Annotated[float, Field(gt=0, le=10)] = 0.7
    chunk: Positive = 64
    classes: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_expand_range)] = ()
    blocking: bool = False


class GrpoConfig(_Section):
    """The objective.

    Args:
        clip: ε of the clipped ratio.
        beta: β, the weight of the KL to the reference policy; at 0 no reference is kept.
        measure_kl: keep it at β = 0 as well, to know the KL.
        combine: how several rewards become one advantage: `sum_then_normalize` sums them by weight and normalises the
            sum in its group (the paper's), `normalize_then_sum` normalises each first, for rewards of different scales.
        epochs: passes over the images of a step.
        max_kl: a step whose KL exceeds it ends the run; null for no bound.
    """

    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    beta: NonNegative = 0.2
    measure_kl: bool = False
    combine: Combine = "sum_then_normalize"
    epochs: Positive = 1
    max_kl: Annotated[float, Field(gt=0)] | None = None


class OptimConfig(_Section):
    """AdamW and the splitting of a step's images.

    Args:
        lr: the highest learning rate.
        warmup_steps: steps over which it rises linearly.
        schedule: what it does afterwards: stay, or fall to 0 at the last step, linearly or as a cosine.
        minibatch: images an update, over all ranks.
        micro_batch: images a forward on one rank; gradients accumulate up to the minibatch. All of them when null.
        grad_clip: largest global norm of the gradient; null for none.
    """

    lr: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: NonNegative = 0.0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    minibatch: Positive = 32
    micro_batch: Positive | None = None
    grad_clip: Annotated[float, Field(gt=0)] | None = 1.0


class RewardConfig(_Section):
    """One reward service.

    Args:
        name: the service's name; where `url` is null the run starts that service itself.
        url: where it listens.
        weight: its share of the sum that is the reward.
        shape: how a raw score becomes a reward: identity, {at_least: T}, {below: T} or {scale: S, offset: O}.
        prompt: text sent along with every image, for rewards that take one.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    url: str | None = None
    weight: float = 1.0
    shape: Shape = Affine()
    prompt: str | None = None

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str | None) -> str | None:
        if url is not None:
            try:
                parts = httpx.URL(url)  # what the client will make of it
                usable = (
                    parts.scheme in {"http", "https"}
                    and bool(parts.host)
                    and (parts.port is None or 0 < parts.port < 65536)
                )
            except (httpx.InvalidURL, ValueError):
                usable = False
            if not usable or any(character.isspace() for character in url):
                raise ValueError("give http://HOST:PORT or https://HOST:PORT, or null to start the service here")
        return url


class EvalConfig(_Section):
    """The evaluation before and after training, and in between, from seeds that do not change with the run's.

    Args:
        samples: images, spread evenly over the classes.
        seed: of their random numbers.
        every: steps from one evaluation in between to the next; 0 for none.
        inference: also evaluate images drawn with guidance, top-k and top-p, as at inference.
        guidance, top_k, top_p: of these.
        rewards: services whose scores are looked at and never optimised.
    """

    samples: Positive = 500
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 20_250_523
    every: Annotated[int, Field(ge=0)] = 0
    inference: bool = False
    guidance: NonNegative = 1.5
    top_k: Annotated[int, Field(ge=0)] = 900
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.96
    rewards: tuple[RewardConfig, ...] = ()


class CheckpointConfig(_Section):
    """The states that a run can go on from.

    Args:
        every: steps from one to the next.
        keep: how many of the last are kept, besides the best by reward.
    """

    every: Positive = 20
    keep: Positive = 2


class RunConfig(_Section):
    """Length, seed, place and device of the run.

    Args:
        name: of its folder; the recipe's when null.
        dir: where its folder is.
        steps: of training.
        seed: of everything random.
        device: of the trainer.
        dtype: of the transformer's arithmetic; weights and optimizer stay in float32.
        decode_dtype: of the decoder's: bfloat16 is faster and moves a mean luma by up to 0.001.
        grid_every: steps from one grid of samples to the next; 0 for the first and the last alone.
        score_timeout_s: how long a reward may be away before the run stops.
        resume: `auto` goes on with the run of that name, where there is one.
        loggers: where the metrics go besides `metrics.jsonl`.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")] | None = None
    dir: Path = Path("runs")
    steps: Positive = 1000
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    decode_dtype: Literal["float32", "bfloat16"] = "float32"
    grid_every: Annotated[int, Field(ge=0)] = 0
    score_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    resume: Literal["never", "auto"] = "never"
    loggers: tuple[Literal["tensorboard", "prometheus", "wandb"], ...] = ("tensorboard",)


class Config(_Section):
    """All settings of a run."""

    summary: str = ""
    model: ModelConfig = ModelConfig()
    rollout: RolloutConfig = RolloutConfig()
    grpo: GrpoConfig = GrpoConfig()
    optim: OptimConfig = OptimConfig()
    rewards: Annotated[tuple[RewardConfig, ...], Field(min_length=1)]
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        images = self.rollout.labels * self.rollout.group_size
        if images % self.optim.minibatch:
            raise ValueError(
                f"optim.minibatch is {self.optim.minibatch}, which does not divide the {images} images of a step "
                f"(rollout.labels {self.rollout.labels} × rollout.group_size {self.rollout.group_size})"
            )
        micro = self.optim.micro_batch
        if micro is not None and self.optim.minibatch % micro:
            raise ValueError(
                f"optim.micro_batch is {micro}, which does not divide optim.minibatch {self.optim.minibatch}"
            )
        if self.rollout.chunk % self.rollout.group_size:
            raise ValueError(
                f"rollout.chunk is {self.rollout.chunk}; it must be a multiple of rollout.group_size "
                f"{self.rollout.group_size}"
            )
        if self.grpo.max_kl is not None and not self.grpo.beta and not self.grpo.measure_kl:
            raise ValueError("grpo.max_kl needs a reference, which β = 0 does without: set grpo.measure_kl true")
        names = [reward.name for reward in (*self.rewards, *self.eval.rewards)]
        if len(set(names)) < len(names):
            raise ValueError(f"rewards are named {names}; each name may stand once")
        return self

    def check_ranks(self, size: int) -> None:
        """Check that the work can be shared by so many ranks.

        Raises:
            ConfigError: it cannot.
        """
        for name, count in (("rollout.labels", self.rollout.labels), ("optim.minibatch", self.optim.minibatch)):
            if count % size:
                raise ConfigError(f"{name} is {count}, which {size} ranks cannot share evenly: make it a multiple")

    def identity(self) -> str:
        """A digest of the settings that a run cannot change when it goes on."""
        return hashlib.sha256(json.dumps(self.fixed(), sort_keys=True).encode()).hexdigest()

    def fixed(self) -> dict[str, Any]:
        """The settings that a run cannot change when it goes on, by section, as plain values."""
        content = self.to_dict()
        kept = {name: content[name] for name in ("model", "rollout", "grpo", "optim", "rewards")}
        for name, free in FREE_TO_CHANGE.items():
            for each in kept[name] if isinstance(kept[name], list) else [kept[name]]:
                for key in free:
                    del each[key]
        kept["run"] = {key: content["run"][key] for key in ("seed", "dtype", "decode_dtype")}
        if self.optim.schedule != "constant":  # the rate of each step depends on how many there are
            kept["run"]["steps"] = self.run.steps
        return kept

    def measured(self) -> dict[str, Any]:
        """The settings of evaluations, but for how often and by which addresses: those of one run are of the same."""
        content: dict[str, Any] = self.to_dict()["eval"]
        del content["every"]
        for reward in content["rewards"]:
            del reward["url"]
        return content

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are written to the run's folder."""
        return self.model_dump(mode="json")
