"""One validated tree of settings for a run, read from a recipe and the command line.

A recipe is a YAML file whose head comment gives its command, hardware, expected time and result. Unknown keys, wrong
types and values out of range are refused before anything starts; below `run.py`, functions take plain values.
"""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import httpx
import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from trainer.shaping import Affine, Shape, refuse_booleans

DEFAULT_RECIPE = "mini-bright"
MAX_CLASSES = 1_000_000  # a mistyped range must not fill the memory

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]


class ConfigError(ValueError):
    """A recipe or an option that cannot be used; the message says the value, the limit and the remedy."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: object) -> object:
        """YAML reads `on` and `yes` as true, which would pass for the number 1; no setting is a switch."""
        return refuse_booleans(value)


def _expand_range(value: object) -> object:
    """`3-5` as [3, 4, 5]."""
    if not isinstance(value, str):
        return value
    first, _, last = value.replace(" ", "").partition("-")
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < MAX_CLASSES):
        raise ValueError(f"write FIRST-LAST, such as 0-499 and below {MAX_CLASSES:,}, or a list of labels")
    return tuple(range(int(first), int(last) + 1))


class ModelConfig(_Section):
    """Which policy is trained, and with which tokenizer and classifier.

    A source is `miniature`, a local path (.pth or .safetensors), or a published name such as
    `FoundationVision/var:var_d16.pth`.
    """

    var: str = "miniature"
    vqvae: str = "miniature"
    classifier: Literal["miniature", "imagenet", "none"] = "miniature"


class RolloutConfig(_Section):
    """What a step samples.

    Args:
        labels: labels drawn a step, uniformly and with repetition.
        group_size: images sampled for each label.
        temperature: of the policy, in sampling and in scoring alike.
        chunk: images sampled at once, whole groups.
        classes: labels to draw from, `0-499` or a list; all classes when empty.
    """

    labels: Positive = 32
    group_size: Annotated[int, Field(ge=2)] = 16
    temperature: Annotated[float, Field(gt=0, le=10)] = 0.7
    chunk: Positive = 64
    classes: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_expand_range)] = ()


class GrpoConfig(_Section):
    """The objective: ε of the clip and β of the KL to the reference policy."""

    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    beta: NonNegative = 0.2


class OptimConfig(_Section):
    """AdamW and the splitting of a step's images.

    Args:
        lr: learning rate, constant after the warm-up.
        warmup_steps: steps over which it rises linearly.
        minibatch: images an update.
        micro_batch: images a forward; gradients accumulate up to the minibatch. The whole minibatch when null.
        grad_clip: largest global norm of the gradient; null for none.
    """

    lr: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 0
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
    """The evaluation before and after training, from seeds that do not change with the run's.

    Args:
        samples: images, spread evenly over the classes.
        seed: of their random numbers.
    """

    samples: Positive = 500
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 20_250_523


class RunConfig(_Section):
    """Length, seed, place and device of the run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")] | None = None
    dir: Path = Path("runs")
    steps: Positive = 1000
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    grid_every: Annotated[int, Field(ge=0)] = 0
    score_timeout_s: Annotated[float, Field(gt=0)] = 300.0


class Config(_Section):
    """All settings of a run."""

    summary: str = ""
    model: ModelConfig = ModelConfig()
    rollout: RolloutConfig = RolloutConfig()
    grpo: GrpoConfig = GrpoConfig()
    optim: OptimConfig = OptimConfig()
    rewards: Annotated[tuple[RewardConfig, ...], Field(min_length=1)]
    eval: EvalConfig = EvalConfig()
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
        names = [reward.name for reward in self.rewards]
        if len(set(names)) < len(names):
            raise ValueError(f"rewards are named {names}; each name may stand once")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are written to the run's folder."""
        return self.model_dump(mode="json")


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    folder = resources.files("trainer") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_recipe(recipe: str) -> tuple[str, dict[str, Any]]:
    """Name and content of a recipe, by its name or by the path of a YAML file.

    Raises:
        ConfigError: there is none, or it is not a YAML mapping.
    """
    if recipe in recipe_names():
        name, text = recipe, (resources.files("trainer") / "recipes" / f"{recipe}.yaml").read_text("utf-8")
    elif recipe.endswith((".yaml", ".yml")):
        name = Path(recipe).stem
        try:
            text = Path(recipe).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ConfigError(
                f"recipe {recipe}: {reason}; give the path of a YAML file or a name from --list"
            ) from error
    else:
        raise ConfigError(
            f"unknown recipe {recipe!r}; known: {', '.join(recipe_names())}; or give the path of a .yaml file"
        )
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {recipe} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"recipe {recipe} holds a {type(content).__name__}; it must be a mapping of sections")
    return name, content


def _assign(content: dict[str, Any], key: str, value: Any) -> None:
    """Sets `section.key` (or `rewards.0.weight`) in place."""
    *parents, last = key.split(".")
    node: Any = content
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                raise ConfigError(
                    f"--{key}: {'.'.join(parents[:depth])} has entries 0 to {len(node) - 1}, not {part!r}"
                )
            node = node[int(part)]
        else:
            node = node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise ConfigError(f"--{key}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    if isinstance(node, list):
        raise ConfigError(f"--{key}: name the field of the entry, as in rewards.0.weight")
    node[last] = value


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`--section.key value` or `--section.key=value` pairs; values are read as YAML.

    Raises:
        ConfigError: an argument that is not of that form.
    """
    overrides: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--") or len(option) < 3:
            raise ConfigError(f"unexpected argument {option!r}; options are --section.key value")
        key, equals, text = option[2:].partition("=")
        if not equals:
            if not rest or (rest[0].startswith("--") and len(rest[0]) > 2):
                raise ConfigError(f"--{key} needs a value: --{key} VALUE")
            text = rest.pop(0)
        try:
            overrides[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--{key} {text!r} is not a value: {' '.join(str(error).split())}") from error
    return overrides


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = f"unknown key; known here: {_known_keys(problem['loc'][:-1])}"
        elif problem["type"] == "missing":
            message = "missing; give it a value"
        elif where:
            message = f"{problem['input']!r}: {message}"
        lines.append(f"{where}: {message}" if where else message)
    return "; ".join(lines)


def _known_keys(location: tuple[int | str, ...]) -> str:
    section: Any = Config
    for part in location:
        if part == "rewards":
            section = RewardConfig
        elif isinstance(part, str) and isinstance(section, type) and issubclass(section, BaseModel):
            field = section.model_fields.get(part)
            section = field.annotation if field else section
    if not (isinstance(section, type) and issubclass(section, BaseModel)):
        return "see the recipe files"
    return ", ".join(section.model_fields)


def load_config(recipe: str, overrides: Mapping[str, Any]) -> Config:
    """The resolved settings of a run.

    Args:
        recipe: a recipe's name or the path of a YAML file.
        overrides: dotted key → value, on top of it.

    Raises:
        ConfigError: with one line that names each offending key, its value and the limit.
    """
    name, content = read_recipe(recipe)
    for key, value in overrides.items():
        _assign(content, key, value)
    try:
        config = Config.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"recipe {name}: {_explain(error)}") from error
    if config.run.name is None:
        config = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
    return config
