"""Temporary folders that go with the process that made them, even one that is killed."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

LOCK_NAME = "owner.lock"
ORPHAN_AGE_S = 60.0
"""Younger folders are left alone: their owner may be about to take its lock."""


class OwnFolder:
    """A folder for its owner alone (0700); use as `with`. What killed owners left, the next of its kind removes."""

    def __init__(self, prefix: str, root: Path) -> None:
        """Make it.

        Args:
            prefix: how the names of its kind begin.
            root: where it is made.

        Raises:
            OSError: it cannot be made there.
        """
        _remove_orphans(prefix, root)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
        try:
            self._lock = (self.path / LOCK_NAME).open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        except BaseException:
            shutil.rmtree(self.path, ignore_errors=True)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove it; a second call does nothing."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _remove_orphans(prefix: str, root: Path) -> None:
    """Remove the folders of owners that were killed: those whose lock nobody holds any more."""
    for lock in root.glob(f"{prefix}*/{LOCK_NAME}"):
        with contextlib.suppress(OSError):
            _remove_if_orphan(lock)


def _remove_if_orphan(lock: Path) -> None:
    if lock.parent.lstat().st_uid != os.getuid():
        return
    descriptor = os.open(lock, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        if time.time() - os.fstat(descriptor).st_mtime >= ORPHAN_AGE_S:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
    finally:
        os.close(descriptor)
