"""Files that the report reads: JSON held to a model, and errors that name the file and the remedy."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from trainer.config import ConfigError
from trainer.nearest import nearest

Model = TypeVar("Model", bound=BaseModel)


class FileError(OSError):
    """A file cannot be read; one line that names it and says what to do."""


def find_folders(texts: Sequence[str], holds: str, what: str) -> list[Path]:
    """The folders that were named, in order.

    Args:
        texts: as given on the command line.
        holds: the file that makes it such a folder.
        what: such a folder is, for an error.

    Raises:
        ConfigError: one is not there, is something else, or is named twice.
    """
    folders = [_find(Path(text), holds, what) for text in texts]
    seen: dict[Path, Path] = {}
    for folder in folders:
        if folder.resolve() in seen:
            raise ConfigError(f"{folder}: {what} is given twice, first as {seen[folder.resolve()]}; give it once")
        seen[folder.resolve()] = folder
    return folders


def _find(folder: Path, holds: str, what: str) -> Path:
    if (folder / holds).is_file():
        return folder
    if folder.is_dir():
        below = sorted(str(path.parent) for path in folder.glob(f"*/{holds}"))
        hint = f"it holds such folders: {nearest(str(folder), below)}" if below else f"give {what}"
        raise ConfigError(f"{folder}: not {what}, for it has no {holds}; {hint}")
    beside = folder.parent.glob(f"*/{holds}") if folder.parent.is_dir() else ()
    known = sorted(str(folder.parent / path.parent.name) for path in beside)
    raise ConfigError(f"{folder}: no such folder; give {what}: {nearest(str(folder), known)}")


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        FileError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror}); put it back or leave its folder out") from error
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: byte {error.start} is not UTF-8 text; put the file back or leave it out") from error


def read_json(path: Path, model: type[Model]) -> Model:
    """A JSON file as a model.

    Raises:
        FileError: it cannot be read, is not JSON, or holds something else; with the first place where it does.
    """
    text = read_text(path)
    try:
        return model.model_validate(json.loads(text))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise FileError(f"{path}: {where}: {first['msg']}; write it again or leave its folder out") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: not JSON ({error}); write it again or leave its folder out") from error
