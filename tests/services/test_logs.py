"""The log: one line a record, with the fields that name a request, for people and for machines."""

import json
import logging
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from services.logs import start_logging
from services.processes import StartError

logger = logging.getLogger("services.of_a_test")


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """Logging as it was before."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json_lines_carry_the_fields(tmp_path: Path) -> None:
    """Each is an object of its own, whatever the message holds; a traceback does not break the line."""
    file = tmp_path / "log"
    start_logging(quiet=False, file=file, form="json")
    logger.info("batch %s", "scored\n", extra={"fields": {"request": 'a "b"', "images": 3}})
    try:
        raise ZeroDivisionError("of a test")
    except ZeroDivisionError:
        logger.exception("failed")
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    assert first["message"] == "batch scored\n"
    assert (first["request"], first["images"]) == ('a "b"', 3)
    assert (first["level"], first["logger"]) == ("INFO", "services.of_a_test")
    assert datetime.fromisoformat(first["time"]).tzinfo is not None
    assert "ZeroDivisionError: of a test" in second["traceback"]


def test_text_lines_carry_the_fields(tmp_path: Path) -> None:
    """As name=value, and no value forges a line or a field."""
    file = tmp_path / "log"
    start_logging(quiet=False, file=file)
    logger.info("batch scored", extra={"fields": {"request": "a\nERROR b=c", "requests": ["x", "y"]}})
    (line,) = file.read_text().splitlines()
    assert line.endswith("batch scored request=a_ERROR_b=c requests=x,y")


def test_quiet_means_warnings_alone(tmp_path: Path) -> None:
    """What is only of interest to those who look is left out."""
    file = tmp_path / "log"
    start_logging(quiet=True, file=file)
    logger.info("of interest")
    logger.warning("of importance")
    assert file.read_text().count("\n") == 1


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    """With the file and the remedy."""
    with pytest.raises(StartError, match="choose another --log-file"):
        start_logging(quiet=False, file=tmp_path / "none" / "log")
