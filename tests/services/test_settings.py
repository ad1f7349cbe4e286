"""The page of settings is the settings."""

import re
from pathlib import Path

import pytest

from services.settings import Settings, counting_in, load_settings, variable_of
from tests.services.conftest import ROOT


def test_the_page_lists_every_setting_with_its_default() -> None:
    """No more and no fewer."""
    page = (ROOT / "docs" / "settings.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| (.+) \|$", page, flags=re.MULTILINE)
    shown = {name: (default, meaning) for name, default, meaning in rows}
    expected = {}
    for name, setting in Settings.model_fields.items():
        expected[variable_of(name)] = ("–" if setting.default is None else str(setting.default), setting.description)
    assert shown == expected


def test_api_processes_share_the_bound_of_what_they_hold() -> None:
    """But one whole body has room in each of them."""
    of = {
        count: Settings(queue_bytes=2**26, max_body_bytes=2**25, api_processes=count).held_bytes for count in (1, 2, 4)
    }
    assert of == {1: 2**26, 2: 2**25, 4: 2**25}


def test_an_api_counts_where_it_is_told_to_and_nowhere_else() -> None:
    """prometheus-client reads its variable in small letters, too; what the user set is for others."""
    environment = {"prometheus_multiproc_dir": "/theirs", "PROMETHEUS_MULTIPROC_DIR": "/theirs", "HOME": "/home"}
    assert counting_in(None, environment) == {"HOME": "/home"}
    assert counting_in(Path("/ours"), environment) == {"HOME": "/home", "PROMETHEUS_MULTIPROC_DIR": "/ours"}


def test_the_folder_of_metrics_goes_by_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A METRICS_FOLDER is somebody else's."""
    monkeypatch.setenv("METRICS_FOLDER", "/theirs")
    assert load_settings().metrics_folder is None
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/ours")
    assert load_settings().metrics_folder == Path("/ours")
