"""The page of settings is the settings."""

import re

from services.settings import Settings
from tests.services.conftest import ROOT


def test_the_page_lists_every_setting_with_its_default() -> None:
    """No more and no fewer."""
    page = (ROOT / "docs" / "settings.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| (.+) \|$", page, flags=re.MULTILINE)
    shown = {name: (default, meaning) for name, default, meaning in rows}
    expected = {}
    for name, setting in Settings.model_fields.items():
        variable = "REDIS_URL" if name == "redis_url" else f"REWARD_{name}".upper()
        expected[variable] = ("–" if setting.default is None else str(setting.default), setting.description)
    assert shown == expected
