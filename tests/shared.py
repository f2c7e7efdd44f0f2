"""Makes what several test files need once per session, whichever xdist worker comes to it first."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from functools import cache
from pathlib import Path

# xdist tells its workers the session's id; without it this process is the session.
_SESSION = os.environ.get("PYTEST_XDIST_TESTRUNUID") or uuid.uuid4().hex


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """Return the session's folder of this name; the first to ask has `make` fill it, empty and at its final path.

    Folders belong to every test of the session: copy what a test changes.
    """
    folder, done = _session_folder() / name, _session_folder() / f"{name}.done"
    lock = os.open(_session_folder() / f"{name}.lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # whoever began it has failed or was killed
            folder.mkdir()
            make(folder)
            done.touch()
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)  # closing isn't enough: a process that `make` forked may live on
        os.close(lock)
    return folder


@cache
def _session_folder() -> Path:
    """Return the folder of all workers of this session; the last of them to exit removes it."""
    folder = Path(tempfile.gettempdir(), f"mpdit-tests-{_SESSION}")
    folder.mkdir(mode=0o700, exist_ok=True)
    users = os.open(folder / "users.lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(users, fcntl.LOCK_SH)
    process = os.getpid()

    def leave() -> None:
        if os.getpid() != process:  # a fork, which shares the lock
            return
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(leave)
    return folder
