"""Writes files and folders so that they are on the disk whole or not at all, locks them, and reads at positions."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mpdit.core.errors import DataError
from mpdit.core.text import readable_bytes


def sync_to_disk(path: Path) -> None:
    """fsync a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, also after a crash."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write a file under: it replaces `path` if the block succeeds, or is removed."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        sync_to_disk(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_to_disk(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Do as `new_file` for a folder that does not exist or is empty; what a killed attempt left is cleared first."""
    path = path.resolve()
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for written in (*partial.rglob("*"), partial):
            sync_to_disk(written)
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_to_disk(path.parent)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a folder that exists, or of a file, which is made if need be, until the block or process ends.

    Raises BlockingIOError when another process holds it and `wait` is False. On a file system without locks (some NFS)
    nobody is kept out.
    """
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


class OpenFile:
    """A file open for positioned reads by any thread, which is closed when it is no longer used. Raises OSError."""

    def __init__(self, path: str | Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def close(self) -> None:
        """Close the file; closing again changes nothing, and reading after that is an OSError."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            self.close()


def check_room(out: Path, needed: int, what: str) -> None:
    """Raise DataError when the disk of a folder, made or not, has no room for so many bytes."""
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DataError(
            f"{out} needs {readable_bytes(needed)} for {what}, and {readable_bytes(free)} are free: make room, or give "
            "a folder on another disk"
        )
