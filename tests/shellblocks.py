"""The code blocks of a document, for tests that run what it shows."""

import re
from pathlib import Path


def blocks(document: Path, language: str) -> list[str]:
    """The text of each fenced block of one language, in order."""
    text = document.read_text("utf-8")
    return re.findall(rf"^```{re.escape(language)}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def shell_lines(document: Path) -> list[str]:
    """The lines of all its `sh` blocks, without empty ones."""
    return [line for block in blocks(document, "sh") for line in block.splitlines() if line.strip()]
