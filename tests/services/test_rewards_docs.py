"""docs/rewards.md shows what works: its class is served, its shell lines run, its tables are the code's."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from services.conformance import CHECKS
from services.conformance.__main__ import parse_arguments
from services.rewards import ENTRY_POINT_GROUP
from services.rewards.anyone import DEFAULTS, default_name
from tests.services.conftest import ROOT, Process
from tests.shellblocks import blocks, shell_lines
from tests.test_examples import EXAMPLES, ONE_STEP, assert_trained_on, serve_standalone
from trainer.options import load_config, parse_overrides
from trainer.shaping import Affine

PAGE = ROOT / "docs" / "rewards.md"
TEXT = PAGE.read_text("utf-8")
ADDRESS, OTHER_ADDRESS = "http://127.0.0.1:8000", "http://127.0.0.1:8001"
Start = Callable[..., Process]


def line_of(part: str) -> str:
    """The one shell line of the page that holds these words."""
    (line,) = [line for line in shell_lines(PAGE) if part in line]
    return line


def table(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    rows = [line for line in TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def shell(line: str, folder: Path, *, timeout_s: float = 60, silent: bool = True) -> str:
    """What a line prints, in a folder that stands for the root; nothing of it on the error stream, if it is silent."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", "-euo", "pipefail", "-c", line]
    done = subprocess.run(
        command,
        cwd=folder,
        env={"PATH": path, "PYTHONPATH": f"{ROOT}"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"{line}: {done.stderr[-2000:]}"
    assert not (silent and done.stderr), line
    return done.stdout


@pytest.mark.redis
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not on the PATH")
def test_the_class_of_the_page_is_served_scored_and_checked(start: Start, tmp_path: Path) -> None:
    """By the lines as they are typed; what curl prints is what the page shows."""
    (program,) = blocks(PAGE, "python")
    (shown,) = blocks(PAGE, "json")
    (tmp_path / "my_reward.py").write_text(program)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    serve = line_of("services serve").split()
    assert serve[:3] == ["python", "-m", "services"]
    serve[serve.index("--port") + 1] = "0"
    url = start(*serve[3:], "--announce", "--until-stdin-closes", PYTHONPATH=str(tmp_path)).url()
    shell(line_of("base64 -d"), tmp_path)
    given, expected = json.loads(shell(line_of("curl").replace(ADDRESS, url), tmp_path)), json.loads(shown)
    assert set(given.pop("timing_ms")) == set(expected.pop("timing_ms"))
    assert given.pop("scores") == pytest.approx(expected.pop("scores"), abs=1e-9)
    assert given == expected
    assert "0.288675" in shell(line_of("services.client").replace(ADDRESS, url), tmp_path)
    assert " 0 breach, 0 warning, " in shell(line_of(f"conformance {ADDRESS}").replace(ADDRESS, url), tmp_path)


def test_the_standalone_lines_run(tmp_path: Path) -> None:
    """The example is started as it is typed, but for the port, and passes."""
    assert line_of("standalone_service") == f"python examples/standalone_service.py {OTHER_ADDRESS[-4:]}"
    with serve_standalone() as url:
        shown = shell(line_of(f"conformance {OTHER_ADDRESS}").replace(OTHER_ADDRESS, url), tmp_path)
    assert " 0 breach, 0 warning, " in shown


def test_the_training_line_is_a_valid_run() -> None:
    """It trains against the page's service by the raw score."""
    start, recipe, *overrides = line_of("trainer.run").removeprefix("python -m ").split()
    assert start == "trainer.run"
    (reward,) = load_config(recipe, parse_overrides(overrides)).rewards
    assert (reward.name, reward.url, reward.shape) == ("contrast", ADDRESS, Affine())


@pytest.mark.slow
@pytest.mark.redis
def test_the_training_line_trains_against_the_class_of_the_page(start: Start, tmp_path: Path) -> None:
    """As it is typed, but for the port, the folder, and the number and size of its steps."""
    (program,) = blocks(PAGE, "python")
    (tmp_path / "my_reward.py").write_text(program)
    serve = ("serve", "my_reward:Contrast", "--port", "0", "--announce", "--until-stdin-closes")
    url = start(*serve, PYTHONPATH=str(tmp_path)).url()
    typed = line_of("trainer.run").replace(ADDRESS, url)
    shell(f"{typed} {shlex.join(ONE_STEP)}", tmp_path, timeout_s=200, silent=False)
    (line,) = (tmp_path / "runs" / "mini-bright" / "metrics.jsonl").read_text().splitlines()
    assert_trained_on("contrast", json.loads(line))


def test_list_and_the_entry_point_are_the_codes(tmp_path: Path) -> None:
    """The group of the page is the group that is read."""
    (text,) = blocks(PAGE, "toml")
    assert tomllib.loads(text)["project"]["entry-points"] == {
        ENTRY_POINT_GROUP: {"contrast": "my_package.my_module:Contrast"}
    }
    assert "brightness" in shell(line_of("services list"), tmp_path)


def test_every_shell_line_is_tried() -> None:
    """By one of the tests above."""
    assert len(shell_lines(PAGE)) == 9


def test_the_members_and_their_defaults_are_the_codes() -> None:
    """Each member has its row."""
    rows = {member: default for member, default, _ in table("Members of a reward")}
    shown = {
        name.strip("`"): default.strip("`")
        for member, default in rows.items()
        for name in member.split(", ")
        if default.startswith("`")
    }
    assert shown == {
        name: json.dumps(value) if isinstance(value, str) else str(value) for name, value in DEFAULTS.items()
    }
    assert {"`score(images, prompts)`", "`warmup()`", "`name`"} < set(rows)
    assert rows["`name`"] == f"the class's: `JpegSize` becomes `{default_name('JpegSize')}`"


def test_the_checks_and_options_are_the_codes() -> None:
    """A row for each, in order."""
    assert table("What is checked") == [[f"`{check.name}`", check.level, check.rule] for check in CHECKS]
    options = parse_arguments([ADDRESS])
    documented = {row[0].split()[0].strip("`").removeprefix("--").replace("-", "_") for row in table("Check it")}
    assert documented == set(vars(options)) - {"url"}
    assert f"({options.deadline:g})" in TEXT
    assert options.tolerance == 1e-5
    assert "(1e-5)" in TEXT


def test_the_length_of_the_example_is_its_length() -> None:
    """As the page says."""
    (lines,) = re.findall(r"has (\d+) lines", TEXT)
    assert len((EXAMPLES / "jpeg_compressibility.py").read_text().splitlines()) == int(lines)
