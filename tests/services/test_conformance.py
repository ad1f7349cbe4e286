"""The conformance kit finds each broken rule by its own check, and finds none where there is none."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import httpx
import numpy as np
import pytest

from services import protocol
from services.client.exchange import ANSWER_LIMIT_BYTES
from services.conformance import CHECKS, NotExamined, examine
from services.conformance.kit import Finding
from services.conformance.pictures import make_images
from services.images import encode_batch
from tests.services import broken_answers, broken_refusals
from tests.services.broken_answers import Noisy
from tests.services.conftest import ROOT, Process
from tests.services.fake_service import socket_service
from tests.services.keeper import LIMITS, Images, Keeper, Prompts, Refusal
from tests.services.test_imports import imported
from tests.test_examples import serve_standalone

BREAKERS = [*broken_answers.BREAKERS, *broken_refusals.BREAKERS]
OURS = ("brightness", "mini-clip", "mini-aesthetic")
TOKEN = "of-a-test"
URL = "http://keeper.test"
LONGEST_S = 15.0


async def findings_of(service: Keeper, **options: Any) -> dict[str, Finding]:
    """What the kit finds of a service, by check."""
    transport = httpx.MockTransport(service)
    options = {"token": service.token, **options}
    return {finding.check.name: finding for finding in await examine(URL, transport=transport, **options)}


def broken(findings: dict[str, Finding]) -> dict[str, str]:
    """What was seen of each rule that is not kept."""
    return {name: finding.seen for name, finding in findings.items() if finding.result in {"breach", "warning"}}


def unjudged(findings: dict[str, Finding]) -> set[str]:
    """The checks that came to no result."""
    return {name for name, finding in findings.items() if finding.result == "not judged"}


@pytest.mark.anyio
async def test_a_service_that_keeps_the_contract_passes() -> None:
    """Every check comes to a result but the one that needs a token; each says what it saw."""
    findings = await findings_of(Keeper())
    assert broken(findings) == {}
    assert unjudged(findings) == {"token"}
    assert all(finding.seen for finding in findings.values())


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("members", "not_judged"),
    [
        ({"token": TOKEN}, set()),
        ({"uses_prompts": True}, {"token"}),
        ({"bodies": (protocol.MEDIA_JSON,)}, {"token"}),
        (
            {"bodies": (protocol.MEDIA_SAFETENSORS, "application/cbor")},
            {"token", "sizes", "formats", "prompt-count", "unreadable"},
        ),
        ({"limits": LIMITS.model_copy(update={"max_images": 1})}, {"token", "order", "batch-invariance", "unreadable"}),
        ({"limits": LIMITS.model_copy(update={"max_pixels": 1, "max_prompt_chars": 1})}, {"token"}),
        ({"low": None, "high": None}, {"token", "score-range"}),
        (
            {
                "limits": protocol.Limits(
                    max_images=10**9, max_body_bytes=10**9, max_pixels=10**9, max_prompt_chars=10**9
                )
            },
            {"token", "full-batch", "max-images", "max-body-bytes", "max-pixels", "max-prompt-chars"},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
async def test_services_of_all_kinds_pass(members: dict[str, Any], not_judged: set[str]) -> None:
    """With a token, with prompts, with one body only, with small limits or huge ones."""
    findings = await findings_of(type("Other", (Keeper,), members)())
    assert broken(findings) == {}
    assert unjudged(findings) == not_judged


@pytest.mark.anyio
@pytest.mark.parametrize(("name", "kind"), BREAKERS, ids=[f"{name}-{kind.__name__}" for name, kind in BREAKERS])
async def test_each_broken_rule_is_found_by_its_check_and_no_other(name: str, kind: type[Keeper]) -> None:
    """A MUST as a breach, a SHOULD as a warning; what rests on the broken rule is not judged."""
    findings = await findings_of(kind())
    assert set(broken(findings)) == {name}, broken(findings)
    finding = findings[name]
    assert finding.result == ("breach" if finding.check.level == "MUST" else "warning")
    for other in findings.values():
        if name in other.check.after:
            assert (other.result, other.seen) == ("not judged", f"rests on {name}: mend that first")


@pytest.mark.anyio
async def test_prompts_that_go_with_another_image_are_found() -> None:
    """Where the reward reads them, every batch has them, so that more than one check may see it first."""

    class Shifted(Keeper):
        uses_prompts = True

        async def score(self, images_HWC: Images, prompts: Prompts) -> list[Any]:
            return await super().score(images_HWC, [*(prompts or [])[1:], *(prompts or [])[:1]])

    assert set(broken(await findings_of(Shifted()))) & {"order", "batch-invariance", "prompts"}


def test_there_is_a_broken_service_for_each_check() -> None:
    """No check that has never been seen to fail."""
    assert {name for name, _ in BREAKERS} == {check.name for check in CHECKS}


def test_a_check_comes_after_those_that_it_rests_on() -> None:
    """Otherwise its prerequisites would not have been run."""
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    for position, check in enumerate(CHECKS):
        assert set(check.after) <= set(names[:position]), check.name
        assert check.rule.endswith("."), check.name


@pytest.mark.anyio
async def test_the_tolerance_is_the_callers() -> None:
    """Scores that differ by less are the same."""
    assert "determinism" in broken(await findings_of(Noisy(), tolerance=1e-3))
    assert broken(await findings_of(Noisy(), tolerance=1.0)) == {}


@pytest.mark.anyio
async def test_a_constant_reward_is_no_breach() -> None:
    """But its order cannot be seen."""

    class Constant(Keeper):
        async def score(self, images_HWC: Images, prompts: Prompts) -> list[Any]:
            return [0.5] * len(images_HWC)

    findings = await findings_of(Constant())
    assert broken(findings) == {}
    assert unjudged(findings) == {"token", "order"}


@pytest.mark.anyio
async def test_a_busy_service_is_asked_again() -> None:
    """429 with Retry-After is no breach; without, it is."""

    class Busy(Keeper):
        posts = 0
        headers: ClassVar = {"Retry-After": "0"}

        async def answer(self, request: httpx.Request) -> httpx.Response:
            self.posts += 1
            if self.posts % 10 == 0:
                given = self.problem(429, "full", None)
                given.headers.update(self.headers)
                return given
            return await super().answer(request)

    class Rude(Busy):
        headers: ClassVar = {}

    assert broken(await findings_of(Busy())) == {}
    assert broken(await findings_of(Rude()))


@pytest.mark.anyio
async def test_a_service_that_never_answers_is_a_breach_within_the_deadline() -> None:
    """Each request has its time and all checks together have theirs; what there was no time for is not kept."""

    class Silent(Keeper):
        async def answer(self, request: httpx.Request) -> httpx.Response:
            raise httpx.ReadTimeout("nothing came")

    seen = broken(await findings_of(Silent()))
    assert "no answer (ReadTimeout: nothing came)" in seen["answer"]

    class Sleepy(Keeper):
        async def answer(self, request: httpx.Request) -> httpx.Response:
            await asyncio.sleep(60)
            raise AssertionError("unreachable")

    began_s = time.monotonic()
    seen = broken(await findings_of(Sleepy(), timeout_s=0.05))
    assert "no answer within 0.05 s" in seen["answer"]
    seen = broken(await findings_of(Sleepy(), deadline_s=0.2))
    assert "--deadline" in seen["answer"]
    assert "--deadline" in seen["malformed"]
    assert time.monotonic() - began_s < LONGEST_S


@pytest.mark.anyio
@pytest.mark.parametrize(
    "content", [b"", b"null", b"[1]", b"<html>", b"\xff", b"[" * 10**5, b"x" * (ANSWER_LIMIT_BYTES + 1)]
)
async def test_no_answer_upsets_the_kit(content: bytes) -> None:
    """Whatever stands in the place of scores, or of /info."""

    class Garbled(Keeper):
        async def answer(self, request: httpx.Request) -> httpx.Response:
            return httpx.Response(200, content=content)

    class Stranger(Keeper):
        async def route(self, request: httpx.Request) -> httpx.Response:
            return httpx.Response(200, content=content)

    assert "answer" in broken(await findings_of(Garbled()))
    if len(content) <= ANSWER_LIMIT_BYTES:
        assert "info" in broken(await findings_of(Stranger()))
    else:
        with pytest.raises(NotExamined, match="no reward service"):
            await findings_of(Stranger())


@pytest.mark.anyio
async def test_what_cannot_be_examined_is_said_at_once() -> None:
    """Not reached, not ready, another token: no table of breaches that are none."""

    class Down(Keeper):
        async def route(self, request: httpx.Request) -> httpx.Response:
            raise httpx.ConnectError("refused")

    class Loading(Keeper):
        async def route(self, request: httpx.Request) -> httpx.Response:
            if request.url.path == protocol.READY_PATH:
                raise Refusal(503, "no worker yet")
            return await super().route(request)

    with pytest.raises(NotExamined, match=r"cannot be reached.*start the service"):
        await findings_of(Down())
    with pytest.raises(NotExamined, match=r"not ready.*no worker yet"):
        await findings_of(Loading())
    locked = type("Locked", (Keeper,), {"token": TOKEN})()
    with pytest.raises(NotExamined, match="--token-env"):
        await findings_of(locked, token=None)
    with pytest.raises(NotExamined, match="is the token right"):
        await findings_of(locked, token="other")


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("REWARD_")}
    return subprocess.run(
        [sys.executable, "-m", "services.conformance", *map(str, arguments)],
        cwd=ROOT,
        env={**clean, "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The addresses of our own services, which want a token and have no network, by name."""
    with (tmp_path_factory.mktemp("service") / "stderr").open("w+b") as stderr:
        arguments = ("serve", *OURS, "--port", "0", "--announce", "--until-stdin-closes")
        nowhere = "http://127.0.0.1:9"
        offline = {"HF_HUB_OFFLINE": "1", "HTTPS_PROXY": nowhere, "HTTP_PROXY": nowhere, "ALL_PROXY": nowhere}
        process = Process(arguments, {"REWARD_TOKEN": TOKEN, **offline}, stderr)
        try:
            yield dict(process.announced()["rewards"])
        finally:
            process.close_stdin()
            process.wait()
            process.close()


@pytest.fixture(scope="module")
def brightness(ours: dict[str, str]) -> str:
    """The address of the first of them."""
    return ours["brightness"]


@pytest.mark.redis
@pytest.mark.parametrize("name", ["mini-clip", "mini-aesthetic"])
def test_the_miniatures_rewards_pass(name: str, ours: dict[str, str]) -> None:
    """On their own weights, without a network; an aesthetic score has no bounds to be judged by."""
    done = run(ours[name], "--json", REWARD_TOKEN=TOKEN)
    assert (done.returncode, done.stderr) == (0, "")
    results = {row["name"]: row["result"] for row in json.loads(done.stdout)["checks"]}
    unbounded = {"score-range"} if name == "mini-aesthetic" else set()
    assert results == {check.name: "not judged" if check.name in unbounded else "kept" for check in CHECKS}


@pytest.mark.redis
def test_our_own_service_passes(brightness: str) -> None:
    """Every check comes to a result, in a few seconds; the table has a row for each."""
    began_s = time.monotonic()
    done = run(brightness, "--token-env", "MINE", MINE=TOKEN)
    taken_s = time.monotonic() - began_s
    assert (done.returncode, done.stderr) == (0, "")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    table = {name: (level, result) for name, level, result, _ in rows if name}
    assert table == {check.name: (check.level, "kept") for check in CHECKS}
    assert f"{len(CHECKS)} kept, 0 breach, 0 warning, 0 not judged" in done.stdout
    assert taken_s < LONGEST_S


@pytest.mark.redis
def test_json_has_what_the_table_has(brightness: str) -> None:
    """And the rule of each check."""
    done = run(brightness, "--json", REWARD_TOKEN=TOKEN)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert (report["url"], report["keeps"]) == (brightness, True)
    assert [(row["name"], row["level"], row["rule"]) for row in report["checks"]] == [
        (check.name, check.level, check.rule) for check in CHECKS
    ]
    assert {row["result"] for row in report["checks"]} == {"kept"}


@pytest.mark.redis
def test_without_its_token_nothing_is_examined(brightness: str) -> None:
    """Exit 2, with one line that says what is missing, and not the token."""
    for environment in ({}, {"REWARD_TOKEN": "hidden"}):
        done = run(brightness, **environment)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert "401" in line
        assert "hidden" not in line


def test_the_standalone_example_passes() -> None:
    """Written by the contract alone."""
    with serve_standalone() as url:
        done = run(url)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{len(CHECKS) - 1} kept, 0 breach, 0 warning, 1 not judged" in done.stdout


@pytest.mark.anyio
async def test_a_breach_exits_1_and_says_the_rule() -> None:
    """The table names the check, what was seen, and below it the rule."""
    async with socket_service() as service:
        done = await asyncio.to_thread(run, service.url)
        report = await asyncio.to_thread(run, service.url, "--json")
    assert (done.returncode, done.stderr) == (1, "")
    assert "breach" in done.stdout
    assert "unknown-path: MUST: a path that is not served is 404." in done.stdout.splitlines()
    assert report.returncode == 1
    assert json.loads(report.stdout)["keeps"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "required: URL"),
        (("http://127.0.0.1:9",), "cannot be reached"),
        (("reward:80",), "give http://HOST:PORT"),
        (("http://127.0.0.1:9", "--tolerance", "0"), "positive number"),
        (("http://127.0.0.1:9", "--tolerance", "nan"), "positive number"),
        (("http://127.0.0.1:9", "--deadline", "-1"), "positive number"),
        (("http://127.0.0.1:9", "--token", "hidden"), "unrecognized arguments"),
        (("http://127.0.0.1:9", "--token-env", "hid-den"), "no name of an environment variable"),
        (("http://127.0.0.1:9", "--token-env", "ABSENT"), "ABSENT: the variable is not set"),
    ],
)
def test_what_cannot_be_run_exits_2(arguments: tuple[str, ...], message: str) -> None:
    """Nothing on stdout; a token that was given by mistake is not repeated."""
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "hid-den" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_without_a_service_is_one_line() -> None:
    """Silence is no reward service either."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = run(f"http://127.0.0.1:{listener.getsockname()[1]}", "--deadline", "0.5")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "no answer within" in line


def test_the_kit_knows_the_client_side_alone() -> None:
    """It judges by what travels: it imports no server, queue or reward."""
    for path in (ROOT / "services" / "conformance").glob("*.py"):
        allowed = ("services.protocol", "services.images", "services.client", "services.conformance")
        ours = {module for module in imported(path) if module.startswith("services.")}
        assert all(module.startswith(allowed) for module in ours), path


def test_the_usual_pictures_fit_any_limits() -> None:
    """They differ, and have one size, which is within the limit."""
    for most in (1, 2, 100, 10**6):
        images_HWC = make_images(protocol.Limits(max_pixels=most))
        assert len({image_HWC.shape for image_HWC in images_HWC}) == 1
        assert images_HWC[0].shape[0] * images_HWC[0].shape[1] <= most
        assert len({image_HWC.tobytes() for image_HWC in images_HWC}) == len(images_HWC)
        encode_batch(np.stack(images_HWC))
