"""Files that get their names last, so that a data set is there whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdit.core.errors import DataError
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


def lock_folder(folder: Path) -> int:
    """Make the folder ours to write a data set into, until the descriptor returned is closed or the process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"can't write a data set to {folder} ({error.strerror}): give another folder") from error
    problem = None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        problem = "is being written by another process"
    except OSError:
        pass  # a file system without locks: two writers in one folder are then the user's to avoid
    if (folder / MANIFEST_NAME).exists():
        problem = "already holds a data set"
    if problem:
        os.close(lock)
        raise DataError(f"{folder} {problem}: give another folder, or delete this one first")
    return lock


def close_all(descriptors: list[int]) -> None:
    """Close file descriptors, and forget them."""
    while descriptors:
        os.close(descriptors.pop())
