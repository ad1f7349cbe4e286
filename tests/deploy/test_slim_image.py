"""The image without torch has what every API, the worker of brightness and the dead letters import."""

import re
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import packages_distributions

from tests.deploy.compose_files import DOCKERFILES, ROOT
from tests.deploy.image_rules import installed, normalised

PROGRAM = """
import sys
from importlib.abc import MetaPathFinder

missing = set(sys.argv[1].split())


class Refusal(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"{name} is not in the image", name=name)


sys.meta_path.insert(0, Refusal())
import services.__main__
import services.roles.api
import services.roles.dead
import services.roles.worker
from services.rewards import create_reward, known_rewards

for reward in known_rewards():  # an API makes its reward, and loads no model
    create_reward(reward.name)
import services.rewards.brightness
"""


def closure(names: Iterable[str]) -> set[str]:
    """These distributions and all that they need, by the `# via` lines of requirements.lock."""
    needed_by: dict[str, set[str]] = {}
    for part in re.split(r"\n(?=[a-z0-9])", (ROOT / "requirements.lock").read_text("utf-8")):
        if found := re.match(r"([a-z0-9._-]+)==", part):
            needed_by[found[1]] = set(re.findall(r"^ +#(?: via)? +([a-z0-9._-]+)$", part, flags=re.MULTILINE))
    needed = set(names)
    while more := {name for name, users in needed_by.items() if name not in needed and users & needed}:
        needed |= more
    return needed


def run_with(names: Iterable[str]) -> subprocess.CompletedProcess[str]:
    """Import it all where nothing is but these distributions, what they need, and the services."""
    there = closure(names)
    missing = {
        module
        for module, owners in packages_distributions().items()
        if not {normalised(owner) for owner in owners} & there
    }
    absent = " ".join((missing | {"trainer", "tests"}) - {"services"})
    command = [sys.executable, "-c", PROGRAM, absent]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_what_the_slim_image_runs_needs_nothing_that_it_lacks() -> None:
    """Every other distribution refuses to be imported, torch among them."""
    names = installed(DOCKERFILES[0])["slim-packages"]
    assert not {"torch", "jinja2", "matplotlib"} & closure(names)
    done = run_with(names)
    assert done.returncode == 0, done.stderr


def test_a_package_that_is_left_out_is_missed() -> None:
    """The services read pictures."""
    done = run_with(installed(DOCKERFILES[0])["slim-packages"] - {"pillow"})
    assert "ModuleNotFoundError: PIL" in done.stderr
