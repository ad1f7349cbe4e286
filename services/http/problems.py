"""Every way in which a request can fail, as problem details (RFC 9457)."""

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from services import protocol
from services.protocol import Problem

TYPE_PREFIX = "urn:reward:"
CLIENT_GONE_STATUS = 499
"""Nobody reads it; it stands in the log and in the metrics."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of problem.

    Attributes:
        status: its HTTP status.
        example: a detail as it may read.
    """

    status: int
    example: str


KINDS: dict[str, Kind] = {
    "malformed-request": Kind(400, "X-Deadline-Ms is '-1', must be whole milliseconds from 1 to 1000000000000000"),
    "malformed-body": Kind(400, "2 prompts for 3 images: give one for each, or none"),
    "unauthorized": Kind(401, "the bearer token is missing or wrong: send 'Authorization: Bearer TOKEN'"),
    "not-found": Kind(404, "GET /nowhere: Not Found; see /docs for what is served"),
    "method-not-allowed": Kind(405, "GET /score: Method Not Allowed; see /docs for what is served"),
    "upload-stalled": Kind(408, "no byte came for 10 s after 4096 bytes: send the body without pauses"),
    "body-too-large": Kind(413, "the body has 70000000 bytes, limit 67108864: split the batch"),
    "batch-too-large": Kind(413, "300 images in one request, limit 256: split the batch"),
    "unsupported-media-type": Kind(415, "the body is 'text/plain', must be one of …: set Content-Type"),
    "unreadable-item": Kind(422, "image 1 cannot be read as PNG, JPEG, WEBP (OSError): send a whole file"),
    "prompts-missing": Kind(422, "clip compares with a prompt, and the request has none: send one for each image"),
    "idempotency-key-reused": Kind(
        422, "this Idempotency-Key was used for other images or prompts: make a new key for them"
    ),
    "queue-full": Kind(429, "2048 images are queued, limit 2048: try again later"),
    "client-gone": Kind(CLIENT_GONE_STATUS, "the client left"),
    "scoring-failed": Kind(500, "the reward gave nan for image 17"),
    "internal-error": Kind(500, "TypeError: see the service's log"),
    "not-ready": Kind(503, "no worker for brightness 1 is ready: start one, or wait"),
    "deadline-passed": Kind(504, "no score within the deadline of 60 s: allow more time"),
}
"""By the last part of the problem's `type`; docs/contract.md says what each means and what to do."""


class ProblemError(Exception):
    """An answer that is a problem."""

    def __init__(
        self, kind: str, detail: str, *, index: int | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        """Describe it.

        Args:
            kind: a key of `KINDS`.
            detail: value, limit and remedy, in one line.
            index: position in the request of the image or prompt that caused it.
            headers: to send with it.
        """
        super().__init__(detail)
        self.problem = problem_of(kind, KINDS[kind].status, detail, index=index)
        self.headers = dict(headers or {})


def problem_of(kind: str, status: int, detail: str, *, index: int | None = None) -> Problem:
    """The problem of one kind."""
    title = kind.replace("-", " ").capitalize()
    printable = detail.encode("utf-8", "replace").decode()  # a reward's error may hold half a surrogate pair
    return Problem(type=TYPE_PREFIX + kind, title=title, status=status, detail=printable, index=index)


def answer_errors_as_problems(app: FastAPI) -> None:
    """Give every error of the application the form of a problem, with the request's id where it has one."""

    @app.exception_handler(ProblemError)
    async def on_problem(request: Request, error: ProblemError) -> Response:
        return _response(request, error.problem, error.headers)

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        detail = f"{request.method} {request.url.path[:100]}: {error.detail}; see /docs for what is served"
        kind = HTTPStatus(error.status_code).phrase.lower().replace(" ", "-")
        return _response(request, problem_of(kind, error.status_code, detail), error.headers or {})

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        detail = str(error.errors()[0].get("msg", "invalid"))
        return _response(request, ProblemError("malformed-request", detail).problem, {})

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        detail = f"{type(error).__name__}: see the service's log"
        return _response(request, ProblemError("internal-error", detail).problem, {})


def _response(request: Request, problem: Problem, headers: Mapping[str, str]) -> Response:
    named = {protocol.HEADER_REQUEST_ID: request.state.request_id} if hasattr(request.state, "request_id") else {}
    return Response(
        problem.model_dump_json(exclude_none=True), problem.status, {**headers, **named}, protocol.MEDIA_PROBLEM
    )
