"""`python -m services.conformance URL`: a table of what a reward service keeps of the contract."""

import argparse
import asyncio
import json
import math
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from services.client.__main__ import EXIT_INTERRUPTED, add_token_option, read_token
from services.conformance import NotExamined, examine
from services.conformance.kit import Finding

EXIT_BREACH = 1
EXIT_USAGE = 2
COLOURS = {"kept": "green", "breach": "bold red", "warning": "yellow", "not judged": "dim"}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; argparse prints usage and exits with 2 where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m services.conformance",
        description="Check whether a reward service keeps the contract (docs/contract.md).",
        epilog="Exit code: 0 where every MUST is kept, 1 where one is broken, 2 where nothing could be checked.",
        allow_abbrev=False,  # a --token would become --token-env
    )
    parser.add_argument("url", metavar="URL", help="of the service: http://HOST:PORT or https://HOST:PORT")
    add_token_option(parser)
    parser.add_argument(
        "--tolerance",
        type=_positive,
        default=1e-5,
        metavar="T",
        help="by which two scores of one image may differ, relative to scores beyond 1 (default: 1e-5)",
    )
    parser.add_argument("--deadline", type=_positive, default=120.0, metavar="S", help="seconds for all (default: 120)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser.parse_args(arguments)


def print_table(url: str, findings: Sequence[Finding]) -> None:
    """Print a row for each check, and a line that sums them up."""
    table = Table(title=Text(f"The contract of a reward service, at {url}"))
    table.add_column("check", no_wrap=True)
    table.add_column("level", no_wrap=True)
    table.add_column("result", no_wrap=True)
    table.add_column("what was seen", overflow="fold")
    for finding in findings:
        result = Text(finding.result, style=COLOURS[finding.result])
        table.add_row(finding.check.name, finding.check.level, result, Text(finding.seen))
    console = Console(highlight=False)
    console.print(table)
    for finding in findings:
        if finding.result in {"breach", "warning"}:
            console.print(Text(f"{finding.check.name}: {finding.check.level}: {finding.check.rule}"), soft_wrap=True)
    counts = {result: sum(finding.result == result for finding in findings) for result in COLOURS}
    console.print(", ".join(f"{count} {result}" for result, count in counts.items()))


def print_json(url: str, findings: Sequence[Finding]) -> None:
    """Print one object: the address, whether every MUST is kept, and the checks."""
    rows = [
        {
            "name": finding.check.name,
            "level": finding.check.level,
            "rule": finding.check.rule,
            "result": finding.result,
            "seen": finding.seen,
        }
        for finding in findings
    ]
    print(json.dumps({"url": url, "keeps": not has_breach(findings), "checks": rows}, indent=1))


def has_breach(findings: Sequence[Finding]) -> bool:
    """Whether a MUST is broken."""
    return any(finding.result == "breach" for finding in findings)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and turn an expected error into one line and an exit code."""
    options = parse_arguments(arguments)
    try:
        token = read_token(options.token_env)
        findings = asyncio.run(
            examine(options.url, token=token, tolerance=options.tolerance, deadline_s=options.deadline)
        )
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (ValueError, NotExamined) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USAGE
    (print_json if options.json else print_table)(options.url, findings)
    return EXIT_BREACH if has_breach(findings) else 0


def _positive(text: str) -> float:
    """Read a positive, finite number."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is out of range: give a positive number")
    return number


if __name__ == "__main__":
    sys.exit(main())
