"""What a process holds open."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def open_below(folder: Path) -> int:
    """This process's descriptors of files in the folder; all others come and go with the garbage of earlier tests."""
    count = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            count += Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_relative_to(folder.resolve())
    return count
