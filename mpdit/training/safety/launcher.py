"""Notices that the processes that started a rank are gone: DeepSpeed's launch.py, and the `deepspeed` command above it.

A SIGTERM to the command ends it and nothing else, a SIGKILL to launch.py too: the ranks would train on, owned by no
one. So each rank looks whether they are still there.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

_LAUNCH = "deepspeed.launcher.launch"
_RUNNER = "deepspeed.launcher.runner"
_MARKS = {"RANK", "CROSS_RANK", "CROSS_SIZE"}
"""Variables that launch.py sets whatever its options (`--local_rank` it may leave out), and no other launcher does."""


@dataclass(frozen=True)
class Launcher:
    """Knows what started this rank: nothing, for a command that was typed by itself."""

    parents: dict[int, int]
    """Parent of each process of the chain, from this one upwards, as it was at the beginning."""
    orphaned: bool = False
    """True when launch.py or the `deepspeed` command was gone before."""

    @classmethod
    def find(cls) -> Launcher:
        """Find the Python process that started this one with a RANK, and if DeepSpeed did, all up to the command.

        What is above them, a shell or a terminal, may end without the run (`nohup`), and is not looked at.
        """
        parent = os.getppid()
        if "RANK" not in os.environ or not _command(os.getpid()):  # or there is no /proc
            return cls({})
        parents, process = {}, os.getpid()
        while _LAUNCH not in _command(process):  # a wrapper's may be between
            above = _parent(process)
            if above <= 0:  # launch.py is not above. A parent outside of this container, 0, can't be looked at.
                orphaned = parent != 0 and os.environ.keys() >= _MARKS
                return cls({os.getpid(): parent} if _is_python(parent) else {}, orphaned)
            parents[process] = process = above
        above = _parent(process)
        return cls(
            parents | ({process: above} if _is_python(above) else {}),
            orphaned=_is_started_by_command(process) and not _is_runner(above),
        )

    def is_lost(self) -> bool:
        """Return whether one of them has ended. Takes some microseconds."""
        return self.orphaned or any(_parent(child) != parent for child, parent in self.parents.items())


def missing_hostfile() -> str:
    """Return the --hostfile of the `deepspeed` command above if it is no file: then one machine trains."""
    process = os.getpid()
    while process > 0 and not _is_runner(process):
        process = _parent(process)
    # DeepSpeed's is argparse's too: -HFILE, abbreviations, the last of several.
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-H", "--hostfile", default="")
    file: str = parser.parse_known_args(_command(process)[1:] if process > 0 else [])[0].hostfile
    return "" if Path(file).is_file() else file


def _is_started_by_command(launch: int) -> bool:
    """Return whether launch.py was started by a `deepspeed` command on this node, which then waits for it.

    That one gives a --log_level, which pdsh's have not. One that leads its process group was typed.
    """
    try:
        typed = os.getpgid(launch) == launch
    except OSError:
        return True  # gone meanwhile, and not above this process any more
    return not typed and any(word.startswith("--log_level") for word in _command(launch))


def _is_runner(process: int) -> bool:
    """Return whether it may be the `deepspeed` command, under a profiler or a debugger too."""
    words = _command(process)
    return _is_python(process) and any(w == _RUNNER or Path(w).name in ("deepspeed", "ds") for w in words[1:])


def _is_python(process: int) -> bool:
    return Path(*_command(process)[:1]).name.startswith("python")


def _parent(process: int) -> int:
    """Return 0 when the process is gone."""
    if process == os.getpid():
        return os.getppid()
    try:
        # "PID (COMMAND) STATE PARENT ...", where COMMAND may hold anything.
        return int(Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _command(process: int) -> list[str]:
    """Return the words of its command line, none when it is gone."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
