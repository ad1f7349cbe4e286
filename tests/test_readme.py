"""The README's commands work as they are typed, and what it names is there."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.shellblocks import shell_lines

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
LINES = [line for line in shell_lines(ROOT / "README.md") if not line.startswith("make ")]


@pytest.mark.redis
@pytest.mark.parametrize("line", LINES)
def test_a_shell_line_of_the_readme_runs(line: str, tmp_path: Path) -> None:
    """Each line of the shell blocks exits 0, from the root of the repository."""
    assert line.startswith("python "), f"the README's shell blocks hold python commands; found {line!r}"
    command = [sys.executable, *line.split()[1:]]
    if "serve" in command:
        check_service(command)
        return
    if "--run.dir" in command:
        command[command.index("--run.dir") + 1] = str(tmp_path)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def check_service(command: list[str]) -> None:
    """It becomes ready, at any free port here, and Ctrl-C ends it."""
    command[command.index("--port") + 1] = "0"
    with subprocess.Popen([*command, "--announce"], cwd=ROOT, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            (url,) = json.loads(process.stdout.readline())["rewards"].values()
            assert httpx.get(f"{url}/readyz", trust_env=False).status_code == 200
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            process.kill()


def test_there_are_shell_lines() -> None:
    """The README shows commands at all."""
    assert len(LINES) >= 3


def test_links_and_pictures_of_the_documents_exist() -> None:
    """Every relative link in README.md and docs/ points to a file."""
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text("utf-8")):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_every_dependency_is_explained() -> None:
    """Each dependency of pyproject.toml stands in the README's table."""
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    names = re.findall(r'^ {4}"([A-Za-z0-9_-]+)', project.split("[tool.")[0], flags=re.MULTILINE)
    assert len(names) > 15
    for name in names:
        assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", README.split("## Dependencies")[1]), name
