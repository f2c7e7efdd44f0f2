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
_RUNNER = "deepspeed.launcher.runner"
_MARKS = {"RANK", "CROSS_RANK", "CROSS_SIZE"}
"""Variables that launch.py sets whatever its options (`--local_rank` it may leave out), and no other launcher does."""


@dataclass(frozen=True)
class Launcher:
    """What started this rank; nothing for a command that was typed by itself."""

    parents: dict[int, int]
    """Parent of each process of the chain, from this one upwards, as it was at the beginning."""
    orphaned: bool = False
    """Whether launch.py or the `deepspeed` command was gone before."""

    @classmethod
    def find(cls) -> Launcher:
        """The Python process that started this one with a RANK, and if DeepSpeed did, all up to the command.

        What is above them, a shell or a terminal, may end without the run (`nohup`), and is not looked at.
        """
        parent = os.getppid()
        if "RANK" not in os.environ or not _command(os.getpid())[0]:  # or there is no /proc
            return cls({})
        parents = _up_to_launch()
        if not parents:
            # A parent outside of this container, 0, can't be looked at.
            orphaned = parent != 0 and os.environ.keys() >= _MARKS
            return cls({os.getpid(): parent} if _is_python(parent) else {}, orphaned)
        launch = next(reversed(parents.values()))
        above = _parent(launch)
        if _is_started_here(launch) and not _is_runner(above):
            return cls(parents, orphaned=True)
        if _is_python(above):
            return cls(parents | {launch: above})
        return cls(parents, orphaned=_is_adopted(launch, above))

    def is_lost(self) -> bool:
        """Whether one of them has ended. Takes some microseconds."""
        return self.orphaned or any(_parent(child) != parent for child, parent in self.parents.items())


def _up_to_launch() -> dict[int, int]:
    """Parents from this process to launch.py, a wrapper's among them; empty when launch.py is not above."""
    parents: dict[int, int] = {}
    process = os.getpid()
    while (parent := _parent(process)) > 0:
        parents[process] = process = parent
        if _LAUNCH in _command(process):
            return parents
    return {}


def _is_started_here(launch: int) -> bool:
    """Whether launch.py has the arguments it gets from a `deepspeed` command on this node, which then waits for it.

    pdsh's, on any node, have a --node_rank in between and no --log_level. One that leads its process group was typed.
    """
    command = _command(launch)
    given = command[command.index(_LAUNCH) + 1 :] if _LAUNCH in command else []
    options = [argument.partition("=")[0] for argument in given]
    try:
        typed = os.getpgid(launch) == launch
    except OSError:
        return True  # gone meanwhile, and not above this process any more
    return not typed and options[:3] == ["--world_info", "--master_addr", "--master_port"] and "--log_level" in options


def _is_runner(process: int) -> bool:
    """Whether it may be the `deepspeed` command, under a profiler or a debugger too."""
    command = _command(process)
    return _is_python(process) and (
        _RUNNER in command or any(Path(argument).name in ("deepspeed", "ds") for argument in command[1:])
    )


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
