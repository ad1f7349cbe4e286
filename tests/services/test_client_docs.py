"""docs/client.md shows what works: its Python and its shell lines run against a real service."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from services.client.__main__ import ATTEMPTS, parse_arguments
from services.client.exchange import ANSWER_LIMIT_BYTES
from services.client.retry import (
    BACKOFF_FIRST_S,
    BACKOFF_LIMIT_S,
    JITTER_LEAST_S,
    JITTER_SHARE,
    RETRIED_STATUSES,
)
from tests.services.conftest import ROOT, Process
from tests.shellblocks import blocks, shell_lines

PAGE = ROOT / "docs" / "client.md"
ADDRESS = "http://127.0.0.1:8000"


@pytest.mark.redis
def test_the_code_of_the_page_runs(start: Callable[..., Process], tmp_path: Path) -> None:
    """Its first shell line serves; the Python and the other shell lines succeed with that service."""
    serve, *commands = [shlex.split(line) for line in shell_lines(PAGE)]
    (program,) = blocks(PAGE, "python")
    assert serve[:3] == ["python", "-m", "services"]
    assert len(commands) >= 2
    assert program.count(ADDRESS) == 1
    serve[serve.index("--port") + 1] = "0"
    url = start(*serve[3:], "--announce", "--until-stdin-closes").url()
    script = tmp_path / "example.py"
    script.write_text(program.replace(ADDRESS, url))
    for command in (["python", str(script)], *commands):
        assert command[0] == "python"
        arguments = [argument.replace(ADDRESS, url) for argument in command[1:]]
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), command
        assert "brightness" in done.stdout


def test_the_numbers_of_the_page_are_the_codes() -> None:
    """Statuses, waits and bounds; every option of the command has its row."""
    text = PAGE.read_text("utf-8")
    retried = set(re.findall(r"\b[45]\d\d\b", "".join(re.findall(r"^\|.*\| yes \|.*$", text, flags=re.MULTILINE))))
    assert retried == {str(status) for status in RETRIED_STATUSES}
    assert f"doubles from {BACKOFF_FIRST_S:g} s to {BACKOFF_LIMIT_S:g} s" in text
    assert JITTER_SHARE == 0.25
    assert f"at least up to {JITTER_LEAST_S:g} s" in text
    assert f"more than {ANSWER_LIMIT_BYTES // 2**20} MiB" in text
    assert "Three failures to connect are repeated" in text
    assert ATTEMPTS == 4
    options = parse_arguments([ADDRESS, "a.png"])
    assert f"({options.deadline:g})" in text
    documented = set(re.findall(r"^\| `(--[a-z-]+)", text, flags=re.MULTILINE))
    assert {name.removeprefix("--").replace("-", "_") for name in documented} == set(vars(options)) - {"url", "files"}
