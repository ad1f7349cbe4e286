"""Settings of the services: the one place here that reads the environment.

Every variable begins with `REWARD_`, but for `REDIS_URL`, which others share.
"""

import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.protocol import Limits
from services.rewards.options import STANDARD, Device, Precision, RewardOptions, Runtime
from services.rewards.sources import parse_source

PREFIX = "REWARD_"
METRICS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""Where prometheus-client counts, if it is set when that is imported."""
DEFAULTS = RewardOptions()


class SettingsError(ValueError):
    """A setting is missing or out of range."""


class Settings(BaseSettings):
    """What a service may be told; the defaults suit one machine."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        frozen=True,
        populate_by_name=True,
        extra="ignore",
        allow_inf_nan=False,
    )

    redis_url: str | None = Field(
        default=None,
        validation_alias=AliasChoices("redis_url", "REDIS_URL"),
        description="Redis 6.2 or newer, or Valkey; with user, password and TLS by URL",
    )
    redis_timeout_s: float = Field(default=10, ge=2, description="for one command, and to connect")
    redis_patience_s: float = Field(default=60, gt=0, description="how long a worker outlives a Redis that is gone")
    token: SecretStr | None = Field(default=None, min_length=1, description="bearer token that requests must carry")

    max_images: int = Field(default=256, ge=1, description="images in one request")
    max_body_bytes: int = Field(default=64 * 2**20, ge=1024, description="bytes of a body, packed or decoded")
    max_pixels: int = Field(default=2048 * 2048, ge=1, description="width times height of one image")
    max_prompt_chars: int = Field(default=1000, ge=1, description="characters of one prompt")
    max_deadline_s: float = Field(default=600, gt=0, description="longest deadline that a request is given")
    default_deadline_s: float = Field(default=120, gt=0, description="deadline of a request that names none")

    api_processes: int = Field(
        default=1, ge=1, le=64, description="API processes that `serve` starts for a reward, behind its one port"
    )
    upload_stall_s: float = Field(default=10, gt=0, description="silence in an upload after which it is ended")
    answer_ttl_s: float = Field(
        default=600, ge=1, description="how long an Idempotency-Key brings the same answer back"
    )

    shared_memory: bool = Field(
        default=False, description="whether pixels reach workers of the API's own host without Redis; `serve` sets it"
    )
    job_images: int = Field(default=16, ge=1, description="images in one job, where pixels go through Redis")
    job_bytes: int = Field(default=4 * 2**20, ge=1, description="likewise bytes of pixels in one job of several images")
    queue_images: int = Field(default=2048, ge=1, description="images that may wait or be in work; beyond it 429")
    queue_bytes: int = Field(default=512 * 2**20, ge=1, description="likewise in bytes of pixels")
    retry_after_s: int = Field(default=1, ge=1, description="Retry-After of a full queue")

    max_batch: int = Field(default=64, ge=1, description="images in one forward pass")
    max_wait_ms: float = Field(default=3, ge=0, description="how long the first job of a batch waits for others")
    lease_ms: int = Field(default=15_000, ge=100, description="silence after which a worker's jobs are taken over")
    max_deliveries: int = Field(default=3, ge=1, description="deliveries without a reply that make a dead letter")
    score_timeout_s: float = Field(default=30, gt=0, description="longest forward pass; then the worker ends itself")

    device: Device = Field(default=STANDARD.device, description="where a model runs; auto: a GPU if there is one")
    precision: Precision = Field(
        default=STANDARD.precision, description="of a model's arithmetic; half precision is autocast"
    )
    compile: bool = Field(default=STANDARD.compiled, description="whether torch.compile makes a model faster")
    cache_dir: Path | None = Field(default=None, description="where downloaded weights are kept")
    clip_model: str = Field(default=DEFAULTS.clip_model, min_length=1, description="open_clip model of `clip`")
    clip_weights: str = Field(
        default=DEFAULTS.clip_weights, description="a pretrained tag of it, or a path, perhaps with @sha256:HEX"
    )
    clip_prompt: str | None = Field(
        default=None,
        min_length=1,
        max_length=1000,
        description="prompt of `clip` and `mini-clip` for requests without prompts",
    )
    aesthetic_weights: str = Field(
        default=DEFAULTS.aesthetic_weights, description="likewise, of the ViT-L/14 under `aesthetic`"
    )
    aesthetic_head: str = Field(
        default=DEFAULTS.aesthetic_head, description="laion-v2, or a path, perhaps with @sha256:HEX"
    )

    log_format: Literal["text", "json"] = Field(default="text", description="of the log: for people or for machines")

    @property
    def limits(self) -> Limits:
        """The limits of one request, as `/info` tells them."""
        return Limits(
            max_images=self.max_images,
            max_body_bytes=self.max_body_bytes,
            max_pixels=self.max_pixels,
            max_prompt_chars=self.max_prompt_chars,
        )

    @property
    def reward_options(self) -> RewardOptions:
        """What the built-in rewards are told."""
        return RewardOptions(
            clip_model=self.clip_model,
            clip_weights=self.clip_weights,
            clip_prompt=self.clip_prompt,
            aesthetic_weights=self.aesthetic_weights,
            aesthetic_head=self.aesthetic_head,
            runtime=Runtime(self.device, self.precision, self.compile, self.max_batch, self.cache_dir),
        )

    def held_bytes(self, processes: int) -> int:
        """Bytes of requests that one of so many API processes holds: its part of the bound, and one body at least."""
        return max(self.max_body_bytes, self.queue_bytes // processes)

    @property
    def images_per_job(self) -> int:
        """Images in one job: no more than one forward pass may hold, and all of those where memory is shared."""
        return self.max_batch if self.shared_memory else min(self.job_images, self.max_batch)

    @property
    def bytes_per_job(self) -> int:
        """Bytes of pixels in one job: bounded for the sake of Redis, where they go through it."""
        return self.max_body_bytes if self.shared_memory else self.job_bytes

    @field_validator("clip_weights", "aesthetic_weights", "aesthetic_head")
    @classmethod
    def _names_weights(cls, text: str) -> str:
        parse_source(text)
        return text

    @field_validator("token")
    @classmethod
    def _fits_a_header(cls, token: SecretStr | None) -> SecretStr | None:
        if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token.get_secret_value()):
            raise ValueError("a character of it fits no header; use visible ASCII without spaces")
        return token

    @field_validator("redis_url")
    @classmethod
    def _is_an_address(cls, url: str | None) -> str | None:
        """Found here, for the client's own error would show a part of the password."""
        if url is not None and not url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("it must begin with redis://, rediss:// (TLS) or unix://")
        try:
            if url is not None:
                _ = urlsplit(url).port
        except ValueError:
            raise ValueError("it names no HOST:PORT; percent-encode / # ? @ in its password") from None
        return url

    @model_validator(mode="after")
    def _request_fits_queue(self) -> Self:
        """A request beyond the queue's bound would be refused for ever."""
        if self.max_images > self.queue_images:
            raise ValueError(
                f"REWARD_MAX_IMAGES {self.max_images} exceeds REWARD_QUEUE_IMAGES {self.queue_images}: raise the latter"
            )
        if self.max_body_bytes > self.queue_bytes:
            raise ValueError(
                f"REWARD_MAX_BODY_BYTES {self.max_body_bytes} exceeds REWARD_QUEUE_BYTES {self.queue_bytes}: "
                "raise the latter"
            )
        return self


def environment_of_children(redis_url: str) -> dict[str, str]:
    """The environment for processes of ours, on this host, that shall use this Redis.

    No list of processes shows its password.
    """
    return {f"{PREFIX}SHARED_MEMORY": "true", **os.environ, "REDIS_URL": redis_url}


def count_in(folder: Path | None) -> None:
    """Have prometheus-client, which is still to be imported, count in a folder with others, or in this process alone.

    What the user's own variable says is for other programs.

    Raises:
        OSError: the folder is not there and cannot be made.
    """
    for name in [name for name in os.environ if name.upper() == METRICS_VARIABLE]:
        del os.environ[name]
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[METRICS_VARIABLE] = str(folder)


def variables() -> list[str]:
    """The names of all variables, in the order of the settings."""
    return ["REDIS_URL" if name == "redis_url" else f"{PREFIX}{name}".upper() for name in Settings.model_fields]


def _refuse_unknown() -> None:
    """A mistyped variable would be a setting that is silently not made.

    Raises:
        SettingsError: there is one.
    """
    known = [name for name in variables() if name.startswith(PREFIX)]
    for name in sorted(os.environ):
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            close = get_close_matches(name.upper(), known, n=1)
            meant = f"did you mean {close[0]}?" if close else "docs/settings.md has all there are"
            raise SettingsError(f"{name}: the services have no such setting: correct or unset it; {meant}")


def load_settings(*, redis_url: str | None = None) -> Settings:
    """Read the settings from the environment.

    Args:
        redis_url: in place of the environment's.

    Returns:
        The validated settings.

    Raises:
        SettingsError: a variable is unknown or out of range; the message names the first one in one line.
    """
    _refuse_unknown()
    try:
        return Settings() if redis_url is None else Settings(redis_url=redis_url)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field, words = str(first["loc"][0]) if first["loc"] else "", first["msg"].removeprefix("Value error, ")
        name = "REDIS_URL" if field.lower() == "redis_url" else f"{PREFIX}{field}".upper()
        raise SettingsError(f"{name}: {words}" if field else words) from None


def token_of(variable: str) -> str | None:
    """The bearer token in a variable, for clients, whom no other setting concerns; None where it is unset or empty."""
    return os.environ.get(variable) or None
