"""Does a reward service keep the contract? `python -m services.conformance URL` asks it, as any client may."""

import httpx

from services.conformance import refusals, scores
from services.conformance.kit import Check, Finding, run_checks
from services.conformance.probe import Breach, NoAnswer, Probe
from services.protocol import INFO_PATH, READY_PATH

CHECKS: tuple[Check, ...] = (
    scores.health,
    scores.ready,
    scores.info,
    scores.token,
    scores.answer,
    scores.numbers,
    scores.count,
    scores.score_range,
    scores.determinism,
    scores.order,
    scores.batch_invariance,
    scores.sizes,
    scores.prompts,
    scores.bodies,
    scores.formats,
    scores.full_batch,
    scores.concurrency,
    scores.deadline,
    scores.idempotency,
    refusals.unknown_path,
    refusals.method,
    refusals.max_images,
    refusals.max_pixels,
    refusals.max_prompt_chars,
    refusals.max_body_bytes,
    refusals.prompt_count,
    refusals.malformed,
    refusals.unreadable,
    refusals.media_type,
    refusals.problem_details,
)
"""In the order in which they are run; docs/rewards.md lists them."""


class NotExamined(Exception):
    """The service cannot be examined: it is not reached, not ready, or wants another token."""


async def examine(
    url: str,
    *,
    token: str | None = None,
    tolerance: float = 1e-5,
    deadline_s: float = 120.0,
    timeout_s: float = 10.0,
    transport: httpx.AsyncBaseTransport | None = None,
) -> list[Finding]:
    """Run all checks against a service.

    Args:
        url: its address.
        token: bearer token, or None.
        tolerance: by which two scores of one image may differ: absolute up to 1, relative beyond.
        deadline_s: seconds for all checks.
        timeout_s: seconds for one answer.
        transport: in place of the network, for tests.

    Returns:
        A finding for each of `CHECKS`, in order.

    Raises:
        NotExamined: nothing could be seen of it.
        ValueError: the address is none.
    """
    timeout_s = min(timeout_s, deadline_s)
    async with Probe(url, token=token, tolerance=tolerance, timeout_s=timeout_s, transport=transport) as probe:
        await _knock(probe)
        return await run_checks(CHECKS, probe, deadline_s=deadline_s)


async def _knock(probe: Probe) -> None:
    """See whether the service can be examined.

    Raises:
        NotExamined: it cannot.
    """
    try:
        info = await probe.get(INFO_PATH)
        ready = await probe.get(READY_PATH, with_token=False)
    except NoAnswer as error:
        raise NotExamined(f"{probe.url} cannot be reached: {error}: start the service, or correct the URL") from error
    except Breach as error:
        raise NotExamined(f"{probe.url} is no reward service: {error}: correct the URL") from error
    if info.status in {401, 403}:
        remedy = "is the token right?" if probe.token else "name the variable that holds its token by --token-env"
        raise NotExamined(f"{probe.url} wants a token ({info.status}): {remedy}")
    if ready.status == 503:
        raise NotExamined(f"{probe.url} is not ready ({ready}): wait until it is")
    probe.errors.clear()
