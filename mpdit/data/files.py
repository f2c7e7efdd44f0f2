"""Files that get their names last, so that a data set is there whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdit.core.errors import DataError
from mpdit.core.locks import locked
from mpdit.data.manifest import MANIFEST_NAME, StoredFile


class PartialFile:
    """A file under a temporary name, hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._stream = open(self._partial, "wb")  # noqa: SIM115 (written to until finish)
        self._hash = hashlib.sha256()
        self._bytes = 0
        self.records = 0

    def write(self, records: NDArray[Any]) -> None:
        data = records.reshape(-1).view(np.uint8).data
        self._stream.write(data)
        self._hash.update(data)
        self._bytes += len(data)
        self.records += len(records)

    def finish(self) -> StoredFile:
        """Bring the contents to the disk; the name stays temporary. Finishing again changes nothing."""
        if not self._stream.closed:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
        return StoredFile(self._path.name, self.records, self._bytes, self._hash.hexdigest())

    def publish(self) -> None:
        os.replace(self._partial, self._path)

    def discard(self) -> None:
        """Remove the file unless it was published."""
        with contextlib.suppress(OSError):  # closing flushes, which a full disk refuses once more
            self._stream.close()
        self._partial.unlink(missing_ok=True)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold a folder, made if need be, to write a data set into. DataError when it holds one or is being written."""
    with contextlib.ExitStack() as held:
        problem = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder, wait=False))
        except BlockingIOError:
            problem = "is being written by another process"
        except OSError as error:
            raise DataError(f"can't write a data set to {folder} ({error.strerror}): give another folder") from error
        if (folder / MANIFEST_NAME).exists():
            problem = "already holds a data set"
        if problem:
            raise DataError(f"{folder} {problem}: give another folder, or delete this one first")
        yield


def close_all(descriptors: list[int]) -> None:
    """Close file descriptors, and forget them."""
    while descriptors:
        os.close(descriptors.pop())
