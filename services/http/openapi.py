"""The service's own description (OpenAPI 3.1): `python -m services.http.openapi > docs/openapi.json`.

It is built from the wire types and from the kinds of problems, not from the framework's routes, whose description
differs between versions.
"""

import json
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from pydantic.json_schema import models_json_schema

from services import protocol
from services.http.bodies import MEDIA_TYPES
from services.http.problems import CLIENT_GONE_STATUS, KINDS, problem_of
from services.protocol import Info, Limits, Problem, Readiness, ScoreAnswer, ScoreRequest, Timing
from services.rewards.base import Reward
from services.rewards.brightness import Brightness
from services.settings import Settings

Json = dict[str, Any]

LONGEST_MS = 10**15
"""The largest deadline that a request may name, in milliseconds; the service's own limit holds all the same."""
EXAMPLE_PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAFklEQVR4nGP4z8DA8J+BkYHh////DAAe9gT9Ce00PgAAAABJRU5ErkJggg=="
)
"""A picture of 2×2 pixels."""
EXAMPLE_SAFETENSORS_HEADER = (
    '{"images":{"dtype":"U8","shape":[1,2,2,3],"data_offsets":[0,12]},"__metadata__":{"prompts":"[\\"letters\\"]"}}'
)
EXAMPLE_SAFETENSORS = chr(len(EXAMPLE_SAFETENSORS_HEADER)) + 7 * "\0" + EXAMPLE_SAFETENSORS_HEADER + "abcdefghijkl"
"""One image of 2×2 pixels, each value of them a letter, so that the whole file is ASCII."""
EXAMPLE_ANSWER = ScoreAnswer(
    scores=[0.5, 0.25], reward="brightness", version="1", timing_ms=Timing(queue=1.5, score=0.25)
)
INDEXED = {"unreadable-item": 1, "scoring-failed": 17}
EXAMPLE_METRICS = """# HELP reward_requests_total Requests by status
# TYPE reward_requests_total counter
reward_requests_total{reward="brightness",status="200",version="1"} 1.0
"""


def describe(reward: Reward, settings: Settings) -> Json:
    """Describe the service of one reward.

    Args:
        reward: whose service.
        settings: its limits, and whether it wants a token.

    Returns:
        An OpenAPI 3.1 document as plain JSON values.
    """
    _, definitions = models_json_schema(
        [(model, "serialization") for model in (ScoreAnswer, Info, Problem, Readiness)],
        ref_template="#/components/schemas/{model}",
    )
    security: list[Json] = [{"bearer": []}] if settings.token else [{"bearer": []}, {}]
    info = info_of(reward, settings.limits).model_dump()
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"Reward service: {reward.name}",
            "version": reward.version,
            "description": "Scores batches of images: one finite number for each image, in order. "
            "Every error is a problem (RFC 9457) whose `detail` says value, limit and remedy.",
        },
        "paths": {
            protocol.SCORE_PATH: {"post": _score(settings.limits, security)},
            protocol.INFO_PATH: {
                "get": {
                    "operationId": "info",
                    "summary": "Which reward this is and what may be sent to it.",
                    "security": security,
                    "responses": {"200": _json("What it is.", "Info", info), **_problems(401)},
                }
            },
            protocol.HEALTH_PATH: {
                "get": {
                    "operationId": "healthz",
                    "summary": "Whether the process lives.",
                    "security": [],
                    "responses": {"200": _json("It does.", "Readiness", Readiness().model_dump())},
                }
            },
            protocol.READY_PATH: {
                "get": {
                    "operationId": "readyz",
                    "summary": "Whether requests will be scored now.",
                    "security": [],
                    "responses": {"200": _json("They will.", "Readiness", Readiness().model_dump()), **_problems(503)},
                }
            },
            protocol.METRICS_PATH: {
                "get": {
                    "operationId": "metrics",
                    "summary": "Metrics in the text format of Prometheus.",
                    "security": [],
                    "responses": {
                        "200": {
                            "description": "The metrics; those of the queue are missing while Redis is away.",
                            "content": {"text/plain": {"schema": {"type": "string"}, "example": EXAMPLE_METRICS}},
                        }
                    },
                }
            },
        },
        "components": {
            "schemas": {**definitions["$defs"], "ScoreRequest": _score_request(settings.limits)},
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "Asked for where the service was started with REWARD_TOKEN.",
                }
            },
        },
    }


def _score(limits: Limits, security: Sequence[Json]) -> Json:
    statuses = sorted(
        {kind.status for kind in KINDS.values()}
        - {HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED, CLIENT_GONE_STATUS}
    )
    answer = _json("One score for each image, in order.", "ScoreAnswer", EXAMPLE_ANSWER.model_dump())
    answer["headers"] = {
        protocol.HEADER_REQUEST_ID: _request_id_header(),
        protocol.HEADER_IDEMPOTENCY_REPLAYED: {
            "description": "Present where the answer is that of an earlier request with the same Idempotency-Key.",
            "schema": {"type": "string", "const": "true"},
        },
    }
    return {
        "operationId": "score",
        "summary": "Score a batch of images.",
        "security": security,
        "parameters": [
            _header(
                protocol.HEADER_DEADLINE_MS,
                "Milliseconds from the arrival of the request after which its answer is of no use; more than the "
                "service's own limit means that limit.",
                {"type": "integer", "minimum": 1, "maximum": LONGEST_MS},
                30000,
            ),
            _header(
                protocol.HEADER_IDEMPOTENCY_KEY,
                "Names what is asked for. A repeat with the same images and prompts brings back the first answer; "
                "with others it is refused.",
                {"type": "string", "pattern": protocol.IDEMPOTENCY_KEY_PATTERN},
                "5f0c7a52-6a0e-4f0b-8b0a-0d4c1a1f8f3e",
            ),
            _header(
                protocol.HEADER_REQUEST_ID,
                "A name for the request in the logs and in the answer: printable ASCII without spaces, of which the "
                "first 64 characters count. Without one, a name is made.",
                {"type": "string"},
                "run-7-step-12",
            ),
        ],
        "requestBody": {"required": True, "content": _bodies(limits)},
        "responses": {"200": answer, **_problems(*statuses, request_id=True)},
    }


def _bodies(limits: Limits) -> Json:
    prompts = _prompts(limits)
    files = {
        "type": "array",
        "minItems": 1,
        "maxItems": limits.max_images,
        "items": {"type": "string", "format": "binary"},
        "description": "PNG, JPEG or WebP files, one part each.",
    }
    contents = {
        protocol.MEDIA_SAFETENSORS: {
            "schema": {
                "type": "string",
                "format": "binary",
                "description": "A safetensors file with one tensor `images`, U8 (B, H, W, 3), RGB; prompts, if any, as "
                "a JSON list of strings in the metadata `prompts`.",
            },
            "examples": {
                "letters": {"summary": "One image of 2×2 pixels; this file is ASCII.", "value": EXAMPLE_SAFETENSORS}
            },
        },
        protocol.MEDIA_JSON: {
            "schema": {"$ref": "#/components/schemas/ScoreRequest"},
            "examples": {
                "one": {
                    "summary": "One PNG of 2×2 pixels, with its prompt.",
                    "value": {"images": [EXAMPLE_PNG], "prompts": ["four pixels"]},
                },
                "two": {"summary": "Two PNGs, no prompts.", "value": {"images": [EXAMPLE_PNG, EXAMPLE_PNG]}},
            },
        },
        protocol.MEDIA_MULTIPART: {
            "schema": {
                "type": "object",
                "properties": {"images": files, "prompts": prompts},
                "required": ["images"],
                "additionalProperties": False,
            },
            "encoding": {
                "images": {"contentType": "image/png, image/jpeg, image/webp"},
                "prompts": {"contentType": "text/plain"},
            },
            "examples": {
                "curl": {
                    "summary": "curl -F images=@a.png -F images=@b.png -F 'prompts=a cat' -F 'prompts=a dog'",
                    "value": {"images": ["bytes of a.png", "bytes of b.png"], "prompts": ["a cat", "a dog"]},
                }
            },
        },
    }
    one = {"type": "string", "format": "binary", "description": "One picture, without a prompt."}
    contents |= {media: {"schema": one} for media in protocol.MEDIA_PICTURES}
    assert tuple(contents) == MEDIA_TYPES
    return contents


def _score_request(limits: Limits) -> Json:
    """The schema of the JSON body, with the limits of this service."""
    schema = ScoreRequest.model_json_schema()
    images = schema["properties"]["images"]
    images["maxItems"] = limits.max_images
    images["items"] = {"type": "string", "contentEncoding": "base64"}
    schema["properties"]["prompts"] = {"anyOf": [_prompts(limits), {"type": "null"}], "default": None}
    return schema


def _prompts(limits: Limits) -> Json:
    return {
        "type": "array",
        "maxItems": limits.max_images,
        "items": {"type": "string", "maxLength": limits.max_prompt_chars},
        "description": "One for each image, or none at all.",
    }


def info_of(reward: Reward, limits: Limits) -> Info:
    """What `GET /info` says of a reward."""
    return Info(
        name=reward.name,
        version=reward.version,
        low=reward.low,
        high=reward.high,
        higher_is_better=reward.higher_is_better,
        uses_prompts=reward.uses_prompts,
        needs_prompts=reward.needs_prompts,
        scale=reward.scale,
        bodies=list(MEDIA_TYPES),
        limits=limits,
    )


def _json(description: str, schema: str, example: Json) -> Json:
    content = {"schema": {"$ref": f"#/components/schemas/{schema}"}, "example": example}
    return {"description": description, "content": {protocol.MEDIA_JSON: content}}


def _problems(*statuses: int, request_id: bool = False) -> Json:
    """The responses that are problems, each with an example of every kind."""
    responses: Json = {}
    for status in statuses:
        kinds = {name: kind for name, kind in KINDS.items() if kind.status == status}
        examples = {
            name: {
                "value": problem_of(name, status, kind.example, index=INDEXED.get(name)).model_dump(exclude_none=True)
            }
            for name, kind in kinds.items()
        }
        headers: Json = {}
        if request_id:
            headers[protocol.HEADER_REQUEST_ID] = _request_id_header()
        if status in {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE}:
            headers[protocol.HEADER_RETRY_AFTER] = {
                "description": "Seconds to wait before the next attempt.",
                "schema": {"type": "integer", "minimum": 1},
            }
        if status == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = {"schema": {"type": "string", "const": "Bearer"}}
        content = {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": examples}
        responses[str(status)] = {
            "description": HTTPStatus(status).phrase,
            **({"headers": headers} if headers else {}),
            "content": {protocol.MEDIA_PROBLEM: content},
        }
    return responses


def _header(name: str, description: str, schema: Json, example: object) -> Json:
    return {
        "name": name,
        "in": "header",
        "required": False,
        "description": description,
        "schema": schema,
        "example": example,
    }


def _request_id_header() -> Json:
    return {"description": "The name of the request in the logs.", "schema": {"type": "string"}}


def main() -> None:
    """Print the description of the brightness service with default settings."""
    settings = Settings.model_construct()  # the environment is not asked: the file is the same everywhere
    print(json.dumps(describe(Brightness(), settings), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
