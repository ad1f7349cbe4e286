"""What travels between a reward service and its clients: wire types, header names, media types, limits.

This module imports neither FastAPI, Redis nor torch, so that a client needs none of them.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

SCORE_PATH = "/score"
INFO_PATH = "/info"
HEALTH_PATH = "/healthz"
READY_PATH = "/readyz"
METRICS_PATH = "/metrics"

MEDIA_SAFETENSORS = "application/x-safetensors"
MEDIA_JSON = "application/json"
MEDIA_MULTIPART = "multipart/form-data"
MEDIA_PICTURES = ("image/png", "image/jpeg", "image/webp")
MEDIA_PROBLEM = "application/problem+json"

HEADER_DEADLINE_MS = "X-Deadline-Ms"
"""Milliseconds, counted from the arrival of the request, after which its caller no longer wants the answer; more than
the service's own limit means that limit."""
HEADER_REQUEST_ID = "X-Request-Id"
"""A name for the request that appears in the service's log and in its answer."""
HEADER_IDEMPOTENCY_KEY = "Idempotency-Key"
"""Names what is asked for, so that a repeat brings the first answer back; see `IDEMPOTENCY_KEY_PATTERN`."""
HEADER_IDEMPOTENCY_REPLAYED = "Idempotency-Replayed"
"""`true` with an answer that was found for an earlier request of the same key."""
HEADER_RETRY_AFTER = "Retry-After"
"""Seconds to wait before the next attempt, with 429 and 503."""

IDENTIFIER_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""What the name and the version of a reward look like."""

IDEMPOTENCY_KEY_PATTERN = r"^[!-~]{1,128}$"
"""Printable ASCII without spaces."""

FiniteFloat = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Identifier = Annotated[str, Field(strict=True, pattern=IDENTIFIER_PATTERN)]


class Limits(BaseModel):
    """The bounds that a service sets to one request."""

    model_config = ConfigDict(frozen=True)

    max_images: int = Field(default=256, ge=1, description="images in one request")
    max_body_bytes: int = Field(default=64 * 2**20, ge=1, description="bytes of a body, and of its images once decoded")
    max_pixels: int = Field(default=2048 * 2048, ge=1, description="width times height of one image")
    max_prompt_chars: int = Field(default=1000, ge=1, description="characters of one prompt")


class Info(BaseModel):
    """The answer of `GET /info`: which reward this is and what may be sent to it."""

    name: Identifier
    version: Identifier
    low: FiniteFloat | None = Field(default=None, description="smallest possible score, where there is one")
    high: FiniteFloat | None = Field(default=None, description="largest possible score, where there is one")
    higher_is_better: bool = True
    uses_prompts: bool = False
    needs_prompts: bool = Field(default=False, description="whether a request without prompts is refused")
    scale: str = Field(default="", description="what the numbers are, in a few words")
    bodies: list[str] = Field(min_length=1, description="media types that `POST /score` accepts")
    limits: Limits


class ScoreRequest(BaseModel):
    """The JSON body of `POST /score`."""

    model_config = ConfigDict(extra="forbid")

    # Stopping at the first wrong item: an error for each of millions would take a thousand times the body's memory.
    images: list[str] = Field(min_length=1, fail_fast=True, description="base64 of PNG, JPEG or WebP files")
    prompts: list[str] | None = Field(default=None, fail_fast=True, description="one prompt for each image")


class Timing(BaseModel):
    """Where the time of a request went, in milliseconds."""

    queue: FiniteFloat = Field(ge=0, description="from submission until a worker took the last of its jobs")
    score: FiniteFloat = Field(ge=0, description="the longest forward pass that scored one of its images")


class ScoreAnswer(BaseModel):
    """The answer of `POST /score`: one finite score for each image, in the order of the request."""

    scores: list[FiniteFloat]
    reward: Identifier
    version: Identifier
    timing_ms: Timing


class Readiness(BaseModel):
    """The answer of `GET /readyz` and `GET /healthz` when all is well."""

    status: Literal["ok"] = "ok"


class Problem(BaseModel):
    """An error as RFC 9457 describes it; `detail` says the value, the limit and the remedy."""

    type: str = "about:blank"
    title: str = ""
    status: int = Field(default=0, ge=0, le=599)
    detail: str = ""
    index: int | None = Field(default=None, ge=0, description="position of the image that caused it")
