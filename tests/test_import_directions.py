"""The arrows of import between the parts run downwards only, as the design draws them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TRAINER, SERVICES = ROOT / "trainer", ROOT / "services"
FROM_SERVICES = ("services.protocol", "services.images", "services.client")
KNOWS_RL = {"grpo", "loop", "rollout", "scoring", "shaping", "config", "session", "run", "evaluation", "local_rewards"}


def sources(folder: Path) -> list[Path]:
    """All Python files of a package."""
    found = sorted(folder.rglob("*.py"))
    assert found, folder
    return found


def imported(path: Path) -> set[str]:
    """Every name that a file imports, anywhere in it, spelt in full; `from a import b` gives `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def of_package(names: set[str], package: str) -> set[str]:
    """Those of a package."""
    return {name for name in names if name == package or name.startswith(f"{package}.")}


def beyond(names: set[str], allowed: tuple[str, ...]) -> set[str]:
    """Those outside all of the allowed modules."""
    return {name for name in names if not any(name == module or name.startswith(f"{module}.") for module in allowed)}


@pytest.mark.parametrize("path", sources(TRAINER), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_trainer_knows_the_client_side_of_the_services_alone(path: Path) -> None:
    """Protocol, images and client; the miniature also the rewards, whose weights it trains."""
    miniature = path.is_relative_to(TRAINER / "miniature")
    allowed = (*FROM_SERVICES, "services.rewards") if miniature else FROM_SERVICES
    assert not beyond(of_package(imported(path), "services"), allowed)


def test_services_never_import_the_trainer() -> None:
    """A reward service runs without it."""
    for path in sources(SERVICES):
        assert not of_package(imported(path), "trainer"), path


def test_the_models_know_nothing_of_reinforcement_learning() -> None:
    """VAR, VQVAE, quantizer and their files import one another and nothing else of ours."""
    for path in sources(TRAINER / "models"):
        names = imported(path)
        assert not beyond(of_package(names, "trainer"), ("trainer.models",)), path
        assert not of_package(names, "services"), path


def test_the_policy_knows_the_models_alone() -> None:
    """One definition of the distribution, without rewards, settings or loop."""
    names = imported(TRAINER / "policy.py")
    assert not beyond(of_package(names, "trainer"), ("trainer.models", "trainer.token_log_probs"))
    assert not of_package(names, "services")


def test_the_mathematics_are_functions_of_tensors() -> None:
    """torch and the standard library's types; no configuration, no distribution over ranks, no logging."""
    names = imported(TRAINER / "grpo.py")
    assert {name.partition(".")[0] for name in names} <= {"torch", "typing", "collections"}
    assert not of_package(names, "torch.distributed")


def test_the_miniature_knows_nothing_of_reinforcement_learning() -> None:
    """Renderer and pre-training make the world that the main job then trains in."""
    for path in sources(TRAINER / "miniature"):
        modules = {name.split(".")[1] for name in of_package(imported(path), "trainer") if "." in name}
        assert not modules & KNOWS_RL, path


def reads_environment(path: Path) -> bool:
    """Whether a file takes anything from the environment's variables."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "environb", "getenv", "getenvb"}:
            return True
        if isinstance(node, ast.ImportFrom) and any(
            alias.name in {"environ", "getenv", "BaseSettings"} for alias in node.names
        ):
            return True
    return False


def test_the_environment_is_read_in_settings_only() -> None:
    """No setting comes from a variable that its reader does not announce."""
    readers = {path for folder in (TRAINER, SERVICES) for path in sources(folder) if reads_environment(path)}
    assert readers <= {TRAINER / "settings.py", SERVICES / "settings.py"}
    assert SERVICES / "settings.py" in readers
