"""The description of the service: complete, committed, and true."""

import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
import safetensors.numpy
from starlette.routing import Route

from services import protocol
from services.app import create_app
from services.batching.errors import KeyReused, QueueFull
from services.http.openapi import describe
from services.http.problems import KINDS
from services.protocol import Info, Problem, Readiness, ScoreAnswer
from services.rewards.brightness import Brightness
from services.settings import Settings
from tests.services.conftest import ROOT
from tests.services.serving import FakeQueue, serving

COMMITTED = ROOT / "docs" / "openapi.json"
DOCUMENT: dict[str, Any] = json.loads(COMMITTED.read_text("utf-8"))
POST = DOCUMENT["paths"]["/score"]["post"]
PLAIN = Settings.model_construct()


@contextlib.asynccontextmanager
async def no_queue() -> AsyncIterator[FakeQueue]:
    yield FakeQueue()


def examples(media: str) -> list[Any]:
    """The examples of one body of `POST /score`."""
    found = POST["requestBody"]["content"][media]["examples"]
    return [example["value"] for example in found.values()]


def operations() -> dict[tuple[str, str], Any]:
    return {(path, method): it for path, item in DOCUMENT["paths"].items() for method, it in item.items()}


def test_the_committed_document_is_the_services() -> None:
    """Renew it with `python -m services.http.openapi > docs/openapi.json`."""
    assert create_app(Brightness(), PLAIN, no_queue).openapi() == DOCUMENT


def test_the_command_writes_the_committed_document() -> None:
    """To the last byte, whatever the environment says."""
    run = subprocess.run(
        [sys.executable, "-m", "services.http.openapi"],
        cwd=ROOT,
        env={"REWARD_MAX_IMAGES": "3", "REWARD_TOKEN": "x"},
        capture_output=True,
        check=True,
    )
    assert run.stdout == COMMITTED.read_bytes()


def test_what_is_served_is_described_and_what_is_described_is_served() -> None:
    """The same paths and methods."""
    app = create_app(Brightness(), PLAIN, no_queue)
    pages = {app.openapi_url, app.docs_url, app.redoc_url, app.swagger_ui_oauth2_redirect_url}
    routes = [route for route in app.routes if isinstance(route, Route) and route.path not in pages]
    served = {(route.path, method.lower()) for route in routes for method in route.methods or ()}
    assert served == set(operations())


def test_references_lead_somewhere() -> None:
    """No `$ref` is broken, and no schema is there for nothing."""
    text = json.dumps(DOCUMENT)
    referred = {part.split('"')[0] for part in text.split('"$ref": "#/components/schemas/')[1:]}
    assert referred == set(DOCUMENT["components"]["schemas"])


def test_limits_and_token_are_those_of_the_settings() -> None:
    """The document of a service describes that service."""
    settings = Settings.model_construct(max_images=3, max_prompt_chars=5, token=Settings(token="x").token)
    document = describe(Brightness(), settings)
    schema = document["components"]["schemas"]["ScoreRequest"]["properties"]
    assert schema["images"]["maxItems"] == 3
    assert schema["prompts"]["anyOf"][0]["items"]["maxLength"] == 5
    post = document["paths"]["/score"]["post"]
    assert post["security"] == [{"bearer": []}]
    assert POST["security"] == [{"bearer": []}, {}]
    form = post["requestBody"]["content"][protocol.MEDIA_MULTIPART]["schema"]["properties"]
    assert form["images"]["maxItems"] == 3
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"


def test_headers_are_described() -> None:
    """Those that are read and those that are sent."""
    names = {parameter["name"] for parameter in POST["parameters"]}
    assert names == {protocol.HEADER_DEADLINE_MS, protocol.HEADER_IDEMPOTENCY_KEY, protocol.HEADER_REQUEST_ID}
    answers = POST["responses"]
    assert set(answers["200"]["headers"]) == {protocol.HEADER_REQUEST_ID, protocol.HEADER_IDEMPOTENCY_REPLAYED}
    for status, answer in answers.items():
        assert protocol.HEADER_REQUEST_ID in answer["headers"]
        assert (protocol.HEADER_RETRY_AFTER in answer["headers"]) == (status in {"429", "503"})
    assert protocol.HEADER_RETRY_AFTER in DOCUMENT["paths"]["/readyz"]["get"]["responses"]["503"]["headers"]


def test_every_problem_of_a_score_has_an_example_that_is_one() -> None:
    """Each kind stands under its status, as the wire type has it."""
    seen = set()
    for status, answer in POST["responses"].items():
        if status != "200":
            for name, example in answer["content"][protocol.MEDIA_PROBLEM]["examples"].items():
                problem = Problem.model_validate(example["value"], strict=True)
                assert (problem.type, problem.status) == (f"urn:reward:{name}", int(status))
                seen.add(name)
    assert seen == set(KINDS) - {"not-found", "method-not-allowed", "client-gone"}


def test_the_other_examples_are_what_they_show() -> None:
    """They validate as the wire types."""
    shown = {
        ("/score", "post"): ScoreAnswer,
        ("/info", "get"): Info,
        ("/healthz", "get"): Readiness,
        ("/readyz", "get"): Readiness,
    }
    for operation, model in shown.items():
        content = operations()[operation]["responses"]["200"]["content"][protocol.MEDIA_JSON]
        assert content["schema"]["$ref"].endswith(f"/{model.__name__}")
        model.model_validate(content["example"])


@pytest.mark.anyio
async def test_the_examples_of_the_bodies_score() -> None:
    """JSON and safetensors as they stand; the form with files in the place of their names."""
    async with serving(FakeQueue(), PLAIN) as client:
        for example in examples(protocol.MEDIA_JSON):
            scores = (await client.post("/score", json=example)).json()["scores"]
            assert scores == pytest.approx([0.5] * len(example["images"]), abs=1e-4)  # red, green, blue, white
        (letters,) = examples(protocol.MEDIA_SAFETENSORS)
        body = letters.encode("ascii")
        headers = {"Content-Type": protocol.MEDIA_SAFETENSORS}
        expected = Brightness().score(safetensors.numpy.load(body)["images"], None).tolist()
        assert (await client.post("/score", content=body, headers=headers)).json()["scores"] == expected
        (form,) = examples(protocol.MEDIA_MULTIPART)
        picture = ROOT / "docs" / "pictures" / "reconstructions.png"
        files = [("images", (name, picture.read_bytes())) for name in form["images"]]
        answer = await client.post("/score", files=files, data={"prompts": form["prompts"]})
        assert len(answer.json()["scores"]) == 2


@pytest.mark.anyio
async def test_answers_are_as_described() -> None:
    """Status, media type, headers and kind of what the service sends stand in the document."""
    queue = FakeQueue()
    async with serving(queue, PLAIN) as client:
        body = examples(protocol.MEDIA_JSON)[0]
        key = {protocol.HEADER_IDEMPOTENCY_KEY: "k"}
        answers = [await client.post("/score", json=body, headers=key) for _ in range(2)]
        answers.append(await client.post("/score", json={"images": ["AA=="]}))
        answers.append(await client.post("/score", content=b""))
        for error in (QueueFull("full"), KeyReused("reused")):
            queue.error = error
            answers.append(await client.post("/score", json=body))
    assert [answer.status_code for answer in answers] == [200, 200, 422, 415, 429, 422]
    framework = {"content-length", "content-type"}
    for answer in answers:
        described = POST["responses"][str(answer.status_code)]
        assert set(answer.headers) - framework <= {name.lower() for name in described["headers"]}
        (media,) = described["content"]
        assert answer.headers["content-type"] == media
        if answer.status_code != 200:
            assert answer.json()["type"].removeprefix("urn:reward:") in described["content"][media]["examples"]
