"""The log of every process: one line a record, for people or as JSON, with the fields that name a request."""

import json
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from services.processes import StartError


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """The fields that a record was given as `extra={"fields": {…}}`."""
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields


class TextFormatter(logging.Formatter):
    """Time, level, module, process, message, and the fields as `name=value`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s[%(process)d] %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        """The line, before a traceback is added."""
        pairs = [f"{name}={_plain(value)}" for name, value in fields_of(record).items()]
        return " ".join([super().formatMessage(record), *pairs])


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (RFC 3339, UTC), level, logger, pid, message, the fields, and any traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def start_logging(*, quiet: bool, file: Path | None, form: Literal["text", "json"] = "text") -> None:
    """Send the log to stderr or to a file.

    Args:
        quiet: warnings only.
        file: in place of stderr; it is appended to.
        form: for people, or for machines.

    Raises:
        StartError: the file cannot be written.
    """
    try:
        handler = logging.StreamHandler() if file is None else logging.FileHandler(file, encoding="utf-8")
    except OSError as error:
        raise StartError(f"log file {file} cannot be written ({error.strerror}): choose another --log-file") from error
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, handlers=[handler], force=True)


def _plain(value: object) -> str:
    """A value without line breaks or other characters that would forge a line."""
    text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return "".join(character if character.isprintable() and character != " " else "_" for character in text)
