"""Can results be written where they are to go? Asked before the work, not after it."""

from __future__ import annotations

import os
from pathlib import Path

from mpdit.core.errors import ConfigError


def check_new_folder(out: Path, option: str = "--out") -> None:
    """ConfigError unless `out` is an empty folder, or one that can be made."""
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{option} {out} is not empty: give a new folder, nothing is overwritten")
    _check_writable(out, out, option)


def check_file(out: Path, option: str = "--out") -> None:
    """ConfigError unless the file `out` can be written or replaced, its folder made where missing."""
    if out.is_dir():
        raise ConfigError(f"{option} {out} is a folder: give a file")
    _check_writable(out.parent, out, option)


def _check_writable(folder: Path, out: Path, option: str = "--out") -> None:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        reason = "can't be written to" if existing.is_dir() else "is a file"
        raise ConfigError(f"{option} {out} can't be written, because {existing} {reason}: give another place")
