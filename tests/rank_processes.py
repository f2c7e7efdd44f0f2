"""Training ranks as processes of their own, forked from a server that has already imported what they need.

A rank's imports take ten times as long as a short run's steps. So each test process has a server (multiprocessing's
forkserver) that does them once, and ranks fork from it: real processes with their own environment, output, signals and
process group, which begin where `launch/train.py` does.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Self
from unittest import mock

TESTS = Path(__file__).parent
SCRIPT = TESTS.parent / "launch" / "train.py"


_STREAMS = ("stdout", "stderr")

Fault = Callable[[], None] | None


class Ranks:
    """`launch/train.py` as `ranks` processes of one process group, started as a launcher does it.

    `fault`, one of rank_faults with its arguments (functools.partial), is called in every rank before it begins. What
    is left of the ranks is killed at the end. `environments` are the ranks' in place of those by DeepSpeed's launcher.
    """

    def __init__(
        self,
        *arguments: str,
        ranks: int = 1,
        fault: Fault = None,
        environments: Sequence[dict[str, str]] | None = None,
    ) -> None:
        _start_server()
        self._folder = tempfile.TemporaryDirectory(prefix="mpdit-ranks-")
        self.processes: list[BaseProcess] = []
        for rank, environment in enumerate(environments or _as_deepspeed(ranks)):
            leader = self.processes[0].pid if self.processes else 0
            logs = [self._log(rank, name) for name in _STREAMS]
            for log in logs:
                log.touch()
            given = (arguments, environment, Path.cwd(), logs, leader, fault)
            process = multiprocessing.get_context("forkserver").Process(target=_run, args=given)
            process.start()
            self.processes.append(process)
            with contextlib.suppress(ProcessLookupError):  # it has ended
                while rank == 0 and os.getpgid(process.pid or 0) != process.pid:
                    time.sleep(0.001)  # until there is a group that the others can join

    def codes(self, seconds: float = 60) -> list[int]:
        """Wait for the ranks' exit codes; fail when one of them is still there after so long."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        assert None not in codes, f"exit codes after {seconds} s: {codes}"
        return [code for code in codes if code is not None]

    def stdout(self, rank: int) -> str:
        return self._log(rank, "stdout").read_text()

    def stderr(self, rank: int) -> str:
        return self._log(rank, "stderr").read_text()

    def output(self, rank: int) -> str:
        return self.stdout(rank) + self.stderr(rank)

    def _log(self, rank: int, stream: str) -> Path:
        return Path(self._folder.name, f"{stream}-{rank}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _start_server() -> None:
    """Start this process's server, unless it runs."""
    multiprocessing.set_forkserver_preload(["preloaded"])
    # Up to Python 3.13 the server doesn't get our sys.path before it imports, and passes over what it can't import.
    variables = {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "OMP_NUM_THREADS": "1"}
    # Ranks that were killed leave semaphores, which multiprocessing's tracker removes in the end: not to be told.
    variables["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"
    with mock.patch.dict(os.environ, variables):
        forkserver.ensure_running()


def _as_deepspeed(ranks: int) -> list[dict[str, str]]:
    """Environments of ranks as DeepSpeed's launcher makes them."""
    common = {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    common |= {"MASTER_PORT": str(free_port())}
    return [{**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _run(
    arguments: Sequence[str], environment: dict[str, str], folder: Path, logs: list[Path], leader: int, fault: Fault
) -> None:
    """Become a rank."""
    try:
        os.setpgid(0, leader)
    except PermissionError:  # the leader has ended, and its group with it
        os.setpgid(0, 0)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in enumerate(logs, 1):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    assert "preloaded" in sys.modules, "the server could not import it"
    if fault is not None:
        fault()
    sys.argv = [str(SCRIPT), *arguments]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def wait_for_step(out: Path, step: int, seconds: float = 60) -> None:
    """Wait until this step, logged, is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (out / "metrics.jsonl").exists() and f'"step": {step},' in (out / "metrics.jsonl").read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} did not come in {out}")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port
