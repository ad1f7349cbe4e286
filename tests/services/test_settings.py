"""The page of settings is the settings."""

import os
import re
from pathlib import Path

import pytest

from services.settings import Settings, SettingsError, count_in, load_settings, variables
from tests.services.conftest import ROOT


def test_the_page_lists_every_setting_with_its_default() -> None:
    """No more and no fewer."""
    page = (ROOT / "docs" / "settings.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| (.+) \|$", page, flags=re.MULTILINE)
    shown = {name: (default, meaning) for name, default, meaning in rows}
    settings = zip(variables(), Settings.model_fields.values(), strict=True)
    expected = {
        variable: ("–" if setting.default is None else str(setting.default), setting.description)
        for variable, setting in settings
    }
    assert shown == expected


FLOATS = [name for name, setting in Settings.model_fields.items() if setting.annotation is float]


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
@pytest.mark.parametrize("name", FLOATS)
def test_what_is_no_finite_number_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a timer nor Redis can wait for ever: it would be an error of every request."""
    monkeypatch.setenv(f"REWARD_{name.upper()}", value)
    with pytest.raises(SettingsError, match=f"REWARD_{name.upper()}: Input should be a finite number"):
        load_settings()


def test_api_processes_share_the_bound_of_what_they_hold() -> None:
    """But one whole body has room in each of them."""
    settings = Settings(queue_bytes=2**26, max_body_bytes=2**25)
    assert [settings.held_bytes(count) for count in (1, 2, 4)] == [2**26, 2**25, 2**25]


def test_shared_memory_leaves_jobs_to_the_bound_of_a_forward_pass() -> None:
    """Small jobs are for the sake of Redis, through which no pixels go there."""
    bounds = {"job_images": 2, "job_bytes": 100, "max_batch": 32}
    through_redis, shared = Settings(**bounds), Settings(**bounds, shared_memory=True)
    assert (through_redis.images_per_job, through_redis.bytes_per_job) == (2, 100)
    assert (shared.images_per_job, shared.bytes_per_job) == (32, shared.max_body_bytes)


def test_an_api_counts_where_it_is_told_to_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """prometheus-client reads its variable in small letters, too, and an empty one; what the user set is for others."""
    monkeypatch.setattr(os, "environ", {"prometheus_multiproc_dir": "", "PROMETHEUS_MULTIPROC_DIR": "/theirs"})
    count_in(None)
    assert os.environ == {}
    count_in(tmp_path / "ours")
    assert os.environ == {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "ours")}
    assert (tmp_path / "ours").is_dir()
