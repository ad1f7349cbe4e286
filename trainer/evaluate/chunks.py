"""What has been measured so far: a file a chunk of pictures, each there whole or not at all, under the digest of all
that its numbers depend on. So a killed evaluation goes on, and its ranks need no word with each other."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from trainer.evaluate.measures import Arrays
from trainer.models.checkpoints import CheckpointError, write_atomically


def digest_of(identity: Mapping[str, object]) -> str:
    """SHA-256 of plain values, in hexadecimal."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


class Chunks:
    """The chunks of one row of a table.

    Args:
        folder: of all rows.
        digest: of what the numbers of the row depend on.
        count: of its chunks.
    """

    def __init__(self, folder: Path, digest: str, count: int) -> None:
        self.folder, self._count = folder / digest[:32], count

    def missing(self) -> list[int]:
        """The chunks that are not there, or cannot be read."""
        return [index for index in range(self._count) if self._read(index) is None]

    def write(self, index: int, arrays: Arrays) -> None:
        """Keeps a chunk.

        Raises:
            CheckpointError: it cannot be written.
        """
        contiguous = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
        needed = sum(values.nbytes for values in contiguous.values())
        write_atomically(self._path(index), needed, lambda temporary: save_file(contiguous, temporary))

    def join(self, names: Sequence[str]) -> Arrays:
        """All chunks together, in their order.

        Args:
            names: of the arrays that are wanted.

        Raises:
            CheckpointError: one is not there.
        """
        parts = []
        for index in range(self._count):
            part = self._read(index)
            if part is None or not part.keys() >= set(names):
                raise CheckpointError(
                    f"{self._path(index)}: not there; ranks on several machines need one --out that all of them see"
                )
            parts.append(part)
        return {name: np.concatenate([part[name] for part in parts]) for name in names}

    def _path(self, index: int) -> Path:
        return self.folder / f"chunk_{index:06d}.safetensors"

    def _read(self, index: int) -> Arrays | None:
        with suppress(OSError, SafetensorError, ValueError):
            return dict(load_file(self._path(index)))
        return None
