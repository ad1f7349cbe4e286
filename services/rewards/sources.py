"""Where weights come from, and whether they are what they should be; no torch is needed to know.

WeightsError     weights are missing, altered, cannot be had, or do not fit; one line with the remedy
"""

import hashlib
import os
import re
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

PIN = "@sha256:"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
MISSING = "missing"
TIMEOUT_S = 30.0


class WeightsError(RuntimeError):
    """Weights are missing, altered, cannot be had, or do not fit; the message is one line and says the remedy."""


@dataclass(frozen=True, slots=True)
class Published:
    """A file that its publisher serves.

    Attributes:
        url: where.
        sha256: its digest, in hexadecimal.
        size_bytes: its size.
    """

    url: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Source:
    """What a setting names: a published name, or a file.

    Attributes:
        name: the name, or None.
        path: the file, or None.
        sha256: the digest that the file is held to, or None.
    """

    name: str | None
    path: Path | None
    sha256: str | None = None

    def identity(self) -> str:
        """What tells these weights from others: the name, or the digest of the file; `MISSING` if there is none."""
        if self.name is not None:
            return self.name
        assert self.path is not None
        if self.sha256 is not None:
            return self.sha256
        try:
            return sha256_of(self.path) if self.path.is_file() else MISSING
        except OSError:  # the worker says so when it loads them
            return MISSING

    def held(self) -> "Source":
        """The same, held to what is there now: other weights would not be what the reward's version names."""
        if self.path is None or self.sha256 is not None:
            return self
        identity = self.identity()
        return self if identity == MISSING else Source(None, self.path, identity)

    def __str__(self) -> str:
        return self.name if self.name is not None else str(self.path)


def parse_source(text: str) -> Source:
    """Read a setting: a path has a slash or the suffix of a weight file, and `@sha256:HEX` may follow it.

    Raises:
        ValueError: it is empty, or its digest is none.
    """
    place, pin, digest = text.partition(PIN)
    if not place.strip():
        raise ValueError(f"{text!r} names no weights: give a name, or the path of a file")
    if pin and not re.fullmatch(r"[0-9a-f]{64}", digest.lower()):
        raise ValueError(f"{digest!r} after {PIN} is no SHA-256: give its 64 hexadecimal digits")
    if os.sep in place or place.endswith(SUFFIXES):
        try:
            return Source(None, Path(place).expanduser(), digest.lower() or None)
        except RuntimeError:
            raise ValueError(f"{place!r} names the home of nobody here: give the whole path") from None
    if pin:
        raise ValueError(f"{place!r} is a name, and its digest is known: give {PIN} with paths alone")
    return Source(place, None)


def sha256_of(path: Path) -> str:
    """Hexadecimal digest of a file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(path: Path, sha256: str | None) -> Path:
    """Make sure that a file is there, and is the one that is meant.

    Args:
        path: of the file.
        sha256: its digest, or None if any will do.

    Returns:
        The path.

    Raises:
        WeightsError: it is missing, cannot be read, or is another.
    """
    try:
        if not path.is_file():
            kind = "does not exist" if not path.exists() else "is no regular file"
            raise WeightsError(f"weights {path}: the file {kind}: give the path of a {', '.join(SUFFIXES)} file")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest() if sha256 is not None else None
    except OSError as error:
        raise WeightsError(f"weights {path}: {error.strerror}: make the file readable") from error
    if found != sha256:
        raise WeightsError(
            f"weights {path} have sha256 {found}, expected {sha256}: the file was altered or cut short; fetch it again"
        )
    return path


def fetch(published: Published, folder: Path) -> Path:
    """The file in the folder, downloaded if it is not there.

    Args:
        published: which.
        folder: where it is kept.

    Returns:
        Its path.

    Raises:
        WeightsError: it cannot be had, or is another; what was downloaded is then removed.
    """
    name = urllib.parse.unquote(published.url.rsplit("/", 1)[-1])
    target = folder / name
    partial = None
    try:
        if target.exists():
            return check_file(target, published.sha256)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{name}-", delete=False) as file:
            partial = Path(file.name)
            _download(published, file)
        check_file(partial, published.sha256)
        os.replace(partial, target)
    except urllib.error.URLError as error:
        raise WeightsError(
            f"{published.url} cannot be fetched: {error.reason}; fetch it where there is a network "
            f"and put it into {folder} as {name}, or give its path"
        ) from error
    except OSError as error:
        raise WeightsError(
            f"{published.url} cannot be kept in {folder}: {error}; make room there, or set REWARD_CACHE_DIR to another "
            "folder"
        ) from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)
    return target


def _download(published: Published, file: "tempfile._TemporaryFileWrapper[bytes]") -> None:
    """Copy the answer, but no more of it than there should be.

    Raises:
        OSError: the network or the disk failed.
        WeightsError: there is more.
    """
    with urllib.request.urlopen(published.url, timeout=TIMEOUT_S) as answer:  # noqa: S310 - a constant https address
        left = published.size_bytes
        while left and (piece := answer.read(min(left, 2**20))):
            file.write(piece)
            left -= len(piece)
        if answer.read(1):
            raise WeightsError(
                f"{published.url} answers more than the {published.size_bytes} bytes that were published: "
                "fetch the file otherwise, and give its path"
            )
