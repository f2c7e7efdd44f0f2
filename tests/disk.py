"""Notes what happens to files in what order, for tests of protocols."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def watch_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note what is synced and renamed in the folder from now on, as "sync A" and "A -> B" by names in it."""
    seen: list[str] = []
    fsync = os.fsync

    def named(path: str | Path) -> str:
        return str(Path(path).absolute().relative_to(folder.resolve()))

    def synced(descriptor: int) -> None:
        seen.append(f"sync {named(os.readlink(f'/proc/self/fd/{descriptor}'))}")
        fsync(descriptor)

    def telling(move: Callable[..., None]) -> Callable[..., None]:
        def moved(old: Any, new: Any) -> None:
            seen.append(f"{named(old)} -> {named(new)}")
            move(old, new)

        return moved

    monkeypatch.setattr(os, "fsync", synced)
    for move in ("replace", "rename"):
        monkeypatch.setattr(os, move, telling(getattr(os, move)))
    return seen
