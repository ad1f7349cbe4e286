"""checkov finds nothing in the manifests but what checkov.yaml explains, and finds what is planted.

It runs in an environment of its own, `.cache/checkov`, which `make test` makes from checkov.lock: it wants other
versions of packages that we use.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.k8s_manifests import K8S, ROOT, render
from tests.deploy.test_k8s_rules import needs_kustomize

CONFIG = Path(__file__).with_name("checkov.yaml")
OWN = ROOT / ".cache" / "checkov" / "bin" / "checkov"
PLANTED = {
    "CKV_K8S_16": {"securityContext": {"privileged": True}},
    "CKV_K8S_20": {"securityContext": {"allowPrivilegeEscalation": True}},
    "CKV_K8S_25": {"securityContext": {"capabilities": {"add": ["NET_ADMIN"]}}},
    "CKV_K8S_13": {"resources": {"limits": {"cpu": "1"}}},
}
"""Checks, and what one container has that each of them is against."""


def checkov() -> str | None:
    """The program, if it is there."""
    return str(OWN) if OWN.is_file() else shutil.which("checkov")


def explained() -> set[str]:
    """The checks that checkov.yaml skips; each has its reason above it."""
    text = CONFIG.read_text("utf-8")
    skipped = set(yaml.safe_load(text)["skip-check"])
    assert skipped == set(re.findall(r"^  # .+\n(?:  # .+\n)*  - (\w+)$", text, flags=re.MULTILINE))
    return skipped


@needs_kustomize
@pytest.mark.skipif(checkov() is None, reason="checkov is not at hand: `make test` installs it")
def test_checkov_finds_what_is_explained_and_what_is_planted(tmp_path: Path) -> None:
    """No more and no less: a skip that nothing needs any longer is a fault, too."""
    for path in (*K8S.glob("*.yaml"), *K8S.glob("tools/*.yaml")):
        shutil.copy(path, tmp_path)
    for overlay in ("h100", "own-reward"):
        (tmp_path / f"{overlay}.yaml").write_text(render(f"overlays/{overlay}"), "utf-8")
    for check, change in PLANTED.items():
        container = {"name": "planted", "image": "planted:1"} | change
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": check.lower().replace("_", "-")}}
        (tmp_path / f"planted_{check}.yaml").write_text(yaml.safe_dump(pod | {"spec": {"containers": [container]}}))
    command = [str(checkov()), "-d", str(tmp_path), "--framework", "kubernetes", "--skip-download", "--compact"]
    done = subprocess.run([*command, "-o", "json"], capture_output=True, text=True, timeout=120, check=False)
    report = json.loads(done.stdout)
    assert report["summary"]["parsing_errors"] == 0
    failed = {(Path(each["file_path"]).name, each["check_id"]) for each in report["results"]["failed_checks"]}
    assert {check for file, check in failed if not file.startswith("planted_")} == explained()
    assert {(f"planted_{check}.yaml", check) for check in PLANTED} <= failed
    assert report["summary"]["passed"] > 1000
