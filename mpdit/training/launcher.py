"""The processes that have started a rank: DeepSpeed's launch.py, and the `deepspeed` command above it.

A SIGTERM to the command ends it and nothing else, a SIGKILL to launch.py too: the ranks would train on, owned by no
one. So each rank looks whether they are still there.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

_LAUNCH = "deepspeed.launcher.launch"


@dataclass(frozen=True)
class Launcher:
    """What started this rank; nothing for a command that was typed by itself."""

    parents: dict[int, int]
    """Parent of each process of the chain, from this one upwards, as it was at the beginning."""
    orphaned: bool = False
    """Whether the `deepspeed` command was gone before."""

    @classmethod
    def find(cls) -> Launcher:
        """The Python process that started this one with a RANK, and if it is DeepSpeed's launch.py, its starter.

        What is above them, a shell or a terminal, may end without the run (`nohup`), and is not looked at.
        """
        parent = os.getppid()
        if "RANK" not in os.environ or not _is_python(parent):
            return cls({})
        parents = {os.getpid(): parent}
        if _LAUNCH not in _command(parent):
            return cls(parents)
        above = _parent(parent)
        if _is_python(above):
            return cls(parents | {parent: above})
        return cls(parents, orphaned=_is_adopted(parent, above))

    def is_lost(self) -> bool:
        """Whether one of them has ended. Takes some microseconds."""
        return self.orphaned or any(_parent(child) != parent for child, parent in self.parents.items())


def _is_adopted(process: int, parent: int) -> bool:
    """Whether a process has got another parent than it had: one of another session, which it didn't leave itself."""
    try:
        return os.getsid(process) not in (process, os.getsid(parent))
    except OSError:
        return False


def _parent(process: int) -> int:
    """0 when the process is gone."""
    if process == os.getpid():
        return os.getppid()
    try:
        # "PID (COMMAND) STATE PARENT ...", where COMMAND may hold anything.
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _is_python(process: int) -> bool:
    return Path(_command(process)[0]).name.startswith("python")


def _command(process: int) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    return [""]
