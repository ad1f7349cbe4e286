"""docs/operations.md promises nothing that no test holds."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_row_names_tests_that_are_there() -> None:
    """Each row of the long table ends in one at least, and each is a test of this repository."""
    page = (ROOT / "docs" / "operations.md").read_text("utf-8")
    rows = page.partition("| what happens |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(rows) > 15
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", path.read_text("utf-8"), flags=re.MULTILINE)
    }
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        assert set(named) <= defined, row
