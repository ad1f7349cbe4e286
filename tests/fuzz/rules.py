"""What the answer to a fuzzed request may be: what the decoders of the service say of its body, and nothing else."""

from dataclasses import dataclass

from pydantic import ValidationError

from services import protocol
from services.http.bodies import decoder_of
from services.http.problems import KINDS, TYPE_PREFIX, ProblemError
from services.images import BodyError, ItemInvalid
from services.protocol import Limits, Problem, ScoreAnswer
from services.rewards.brightness import Brightness
from tests.fuzz.corpus import Body
from tests.fuzz.mutations import ODD_HEADERS, Attempt, Framing
from tests.fuzz.wire import Answer, sent_length

NOT_HTTP = {Framing.NO_NUMBER, Framing.BAD_CHUNK, Framing.BOTH, Framing.GARBLED}
"""With both framings a request is refused as one that may be smuggled (RFC 9112, section 6.3)."""
"""Such a request may fail before it reaches the application: then 400 with plain text, or no answer at all."""
EARLY_BYTES = 2**16
"""Who is refused while more than this is on its way may find the connection closed before the answer is read."""


@dataclass(frozen=True)
class Verdict:
    """What a well-framed request gets.

    Attributes:
        status: its status.
        scores: if it is 200.
        index: of the image that is to blame, if one is.
        early: whether the body does not matter.
    """

    status: int
    scores: tuple[float, ...] = ()
    index: int | None = None
    early: bool = False


def verdict(attempt: Attempt, body: Body, limits: Limits) -> Verdict:
    """What the request of an attempt should get if this body arrives."""
    headers = {"content-type": body.media.strip(), **{name.lower(): value for name, value in attempt.headers}}
    try:
        decode = decoder_of(headers)
    except ProblemError as error:
        return Verdict(error.problem.status, early=True)
    for header in attempt.headers:
        if (status := ODD_HEADERS.get(header)) is not None:
            return Verdict(status, early=True)
    if len(body.data) > limits.max_body_bytes:
        return Verdict(413, early=True)
    try:
        batch = decode(body.data, limits)
    except BodyError as error:
        return Verdict(error.status, index=error.index if isinstance(error, ItemInvalid) else None)
    return Verdict(200, tuple(float(Brightness().score(image[None], None)[0]) for image in batch.images_HWC))


def check(attempt: Attempt, answer: Answer | None, limits: Limits) -> None:
    """Hold an answer to the rules.

    Args:
        attempt: what was sent.
        answer: what came back.
        limits: of the service.

    Raises:
        AssertionError: it breaks one.
    """
    framing = attempt.framing
    body = attempt.body
    if framing is Framing.SHORT:
        body = Body(body.media, body.data[: int(sent_length(attempt))])
    right = verdict(attempt, body, limits)
    if answer is None:
        refused_early = right.early and len(body.data) > EARLY_BYTES
        assert framing is Framing.CUT or framing in NOT_HTTP or refused_early, "no answer"
        return
    problem = check_form(answer, plain=framing in {*NOT_HTTP, Framing.SHORT})
    allowed = {right.status} if framing is not Framing.GARBLED else {400, 404, 405, 408, 415, 431, 505}
    if framing is Framing.GARBLED and body.media in protocol.MEDIA_PICTURES:
        allowed |= {422}  # without its length it is an empty picture
    if framing is Framing.STALLED and not right.early:
        allowed = {408, 413}
    elif framing in NOT_HTTP:
        allowed = allowed - {200} | {400, 413}
    elif framing is Framing.SHORT:  # what is left of the body is taken for another request, which ends the connection
        allowed = allowed | {400}
    names = {name for name, _ in attempt.headers}
    if protocol.HEADER_DEADLINE_MS in names:
        allowed = allowed | {504}
    is_reused = protocol.HEADER_IDEMPOTENCY_KEY in names and problem is not None
    if is_reused and problem is not None and problem.type == f"{TYPE_PREFIX}idempotency-key-reused":
        return
    assert answer.status in allowed, f"{answer.status}, expected {sorted(allowed)}: {answer.body[:500]!r}"
    if answer.status == 200:
        scores = tuple(ScoreAnswer.model_validate_json(answer.body).scores)
        assert scores == right.scores, f"{scores}, expected {right.scores}"
    elif problem is not None and problem.status == right.status:
        assert problem.index == right.index, f"index {problem.index}, expected {right.index}: {problem.detail}"


def check_form(answer: Answer, *, plain: bool) -> Problem | None:
    """Hold an answer to `docs/openapi.json`.

    Args:
        answer: of `POST /score`.
        plain: whether it may come from the HTTP server, which knows nothing of problems.

    Returns:
        The problem that it is, if it is one.
    """
    media = answer.headers.get("content-type", "")
    if answer.status == 200:
        assert media == protocol.MEDIA_JSON
        ScoreAnswer.model_validate_json(answer.body, strict=True)
        return None
    if plain and answer.status == 400 and media.startswith("text/plain"):
        return None
    assert media == protocol.MEDIA_PROBLEM, f"{answer.status} as {media!r}: {answer.body[:300]!r}"
    problem = check_problem(answer.status, answer.body)
    is_tried_again = answer.status in {429, 503}
    assert (protocol.HEADER_RETRY_AFTER.lower() in answer.headers) == is_tried_again
    return problem


def check_problem(status: int, body: bytes) -> Problem:
    """A body is a problem of a documented kind with this status, and never a bug."""
    try:
        problem = Problem.model_validate_json(body, strict=True)
    except ValidationError as error:
        raise AssertionError(f"{status} with a body that is no problem: {body[:300]!r}") from error
    assert problem.status == status
    assert problem.title
    assert problem.detail
    kind = problem.type.removeprefix(TYPE_PREFIX)
    assert kind in KINDS, f"{problem.type} is documented nowhere"
    assert KINDS[kind].status == status
    assert status < 500 or status in {503, 504}, f"{status}: {problem.detail}"
    return problem
