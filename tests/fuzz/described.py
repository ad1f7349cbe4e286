"""Requests that schemathesis makes from the description that the service gives of itself."""

import json
from collections import Counter

import schemathesis
from hypothesis import strategies as st
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import AcceptedNegativeData, Failure
from schemathesis.engine import Status, StopReason, events, from_schema

from services import protocol
from tests.fuzz.corpus import bodies
from tests.fuzz.mutations import mutate
from tests.fuzz.rules import check_problem
from tests.fuzz.served import Served

ALLOWED = ["2xx", "4xx", "503", "504"]
CHECKS = {
    "not_a_server_error": {"expected-statuses": ALLOWED},
    "negative_data_rejection": {"expected-statuses": ALLOWED[1:]},
    "positive_data_acceptance": {"enabled": False},  # no schema says which bytes are a picture
}


@schemathesis.check
def errors_are_problems(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    """Also where no operation describes them: 404 and 405."""
    del ctx, case
    if response.status_code >= 400:
        assert response.headers["content-type"] == [protocol.MEDIA_PROBLEM]
        check_problem(response.status_code, response.content)


@schemathesis.hook
def filter_failure(
    context: schemathesis.HookContext,
    failure: Failure,
    case: schemathesis.Case,
    response: schemathesis.Response,
) -> bool:
    """In a form every text is a string: a prompt that was meant to be a list or a number is right on the wire."""
    del context, response
    return not (isinstance(failure, AcceptedNegativeData) and case.media_type == protocol.MEDIA_MULTIPART)


for media in (protocol.MEDIA_SAFETENSORS, *protocol.MEDIA_PICTURES):
    known = [body for body in bodies() if body.media == media]
    schemathesis.openapi.media_type(
        media,
        st.one_of(
            st.sampled_from([body.data for body in known]),
            st.builds(mutate, st.sampled_from(known), st.randoms()).map(lambda body: body.data),
            st.binary(),
        ),
    )


def fuzz(served: Served, *, examples: int, seed: int) -> Counter[str]:
    """Send examples, boundary cases and random data, right and wrong, to all operations.

    Args:
        served: the service.
        examples: random requests for each operation; those without parameters need but one.
        seed: of everything random.

    Returns:
        How many were answered by which status.

    Raises:
        AssertionError: an answer is not as described; the message holds the requests.
    """
    config = SchemathesisConfig.from_dict(
        {
            "seed": seed,
            "base-url": served.url,
            "headers": served.headers,
            "request-timeout": 60,
            "continue-on-failure": True,
            "generation": {"max-examples": examples, "no-shrink": True, "database": "none"},
            "checks": CHECKS,
        }
    )
    document = json.loads(served.get("/openapi.json"))
    content = document["paths"][protocol.SCORE_PATH]["post"]["requestBody"]["content"]
    del content[protocol.MEDIA_SAFETENSORS]["examples"]  # text, where our strategy for this type promises bytes
    schema = schemathesis.openapi.from_dict(document, config=config)
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    for event in from_schema(schema).execute():
        if isinstance(event, events.NonFatalError | events.FatalError):
            failures.append(repr(event.value if isinstance(event, events.NonFatalError) else event.exception))
        elif isinstance(event, events.ScenarioFinished):
            failures += _failures(event)
            for sent in event.recorder.interactions.values():
                outcomes[str(sent.response.status_code) if sent.response else "no answer"] += 1
        elif isinstance(event, events.EngineFinished):
            assert event.stop_reason is StopReason.COMPLETED
    assert not failures, "\n\n".join(failures)
    return outcomes


def _failures(event: events.ScenarioFinished) -> list[str]:
    """What was wrong, with the requests that show it."""
    found = []
    for case, checks in event.recorder.checks.items():
        sent = event.recorder.interactions[case]
        for check in checks:
            if check.status is Status.FAILURE and check.failure_info is not None:
                body = (sent.request.body or b"")[:1000]
                request = f"{sent.request.method} {sent.request.uri} {sent.request.headers} {body!r}"
                answer = f"{sent.response.status_code} {sent.response.content[:500]!r}" if sent.response else "nothing"
                found.append(f"{check.name}: {check.failure_info.failure.message}\n{request}\n→ {answer}")
    return found
