"""What a check is, and how all of them are run: in order, within a time, none after one that it rests on has failed."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from services.conformance.probe import Breach, NotJudged, Probe

Level = Literal["MUST", "SHOULD"]
Result = Literal["kept", "breach", "warning", "not judged"]
Body = Callable[[Probe], Awaitable[str]]

MUST: Level = "MUST"


@dataclass(frozen=True, slots=True)
class Check:
    """One rule of the contract, and the code that judges it.

    Attributes:
        name: as it stands in the table.
        level: MUST, whose breach fails the service, or SHOULD, whose breach is a warning.
        rule: in one sentence.
        after: names of the checks that this one rests on; where one of them is broken, it is not judged.
        body: returns what was seen, or raises `Breach` or `NotJudged`.
    """

    name: str
    level: Level
    rule: str
    after: tuple[str, ...]
    body: Body


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of a check: the result, and what was seen."""

    check: Check
    result: Result
    seen: str


def check(*after: str) -> Callable[[Body], Check]:
    """Make a check of a function: the name is the function's, level and rule are its docstring, as `MUST: the rule.`.

    Args:
        after: names of the checks that it rests on.
    """

    def decorate(body: Body) -> Check:
        level, _, rule = " ".join((inspect.getdoc(body) or "").split()).partition(": ")
        assert level in get_args(Level), body
        name = getattr(body, "__name__", "").replace("_", "-")
        return Check(name, "MUST" if level == MUST else "SHOULD", rule, after, body)

    return decorate


async def run_checks(checks: Sequence[Check], probe: Probe, *, deadline_s: float) -> list[Finding]:
    """Run checks one after the other.

    Args:
        checks: each after those that it rests on.
        probe: open.
        deadline_s: seconds for all; a check that has not ended by then counts as broken, and so do those after it.

    Returns:
        A finding for each, in order.
    """
    ends_s = time.monotonic() + deadline_s
    findings: list[Finding] = []
    broken: set[str] = set()
    for each in checks:
        finding = await _run(each, probe, broken, ends_s, deadline_s)
        findings.append(finding)
        if finding.result == "breach" or broken & set(each.after):
            broken.add(each.name)
    return findings


async def _run(each: Check, probe: Probe, broken: set[str], ends_s: float, deadline_s: float) -> Finding:
    roots = [name for name in each.after if name in broken]
    if roots:
        return Finding(each, "not judged", f"rests on {roots[0]}: mend that first")
    left_s = max(0.0, ends_s - time.monotonic())
    try:
        async with asyncio.timeout(left_s):
            return Finding(each, "kept", await each.body(probe))
    except NotJudged as reason:
        return Finding(each, "not judged", str(reason))
    except Breach as breach:
        seen = str(breach)
    except TimeoutError:
        seen = f"not ended when the {deadline_s:g} s for all checks were over: allow more by --deadline"
    return Finding(each, "breach" if each.level == MUST else "warning", seen)
