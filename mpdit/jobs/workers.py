"""Work in parts that any number of processes share: each part is done once, and what is done stays done.

A job is a fixed list of parts, each of which leaves files of its own that appear whole or not at all. So processes
need not talk to one another: which parts are left is seen from the folder, a killed job goes on where it was, and the
result doesn't depend on how many shared it. Processes come from here (`processes`, one a GPU) or from a launcher, on
any number of nodes that see the same folder.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from mpdit.core.cpu import settle_cpu
from mpdit.core.dist_env import DistEnv
from mpdit.core.errors import ConfigError, UserError
from mpdit.core.files import counted
from mpdit.core.progress import bar

Report = Callable[[int], object]
"""Called with the number of items done since the last call."""

DoPart = Callable[[int, Report], None]

_POLL_SECONDS = 1.0
_LEAVE_SECONDS = 10.0
_REMIND_SECONDS = 300.0


class Job(Protocol):
    """What is shared out; it must be picklable, as each process gets a copy."""

    @property
    def out(self) -> Path:
        """The folder that the parts lie in."""

    def todo(self) -> list[int]:
        """The parts that are not finished, in order, by what is on the disk."""

    def size(self, part: int) -> int:
        """Items of a part, for the progress bar."""

    def open(self, device: torch.device) -> DoPart:
        """Load what a process needs; the function returned does one part and reports its items as they are done."""


def run_parts(job: Job, parts: int, *, processes: int = 1, device: str = "auto", label: str, unit: str = "img") -> bool:
    """Do what is left of a job of `parts` parts; returns whether this process is the one to put them together.

    With `processes` above 1 that many are started here, each on a GPU of its own where `device` is "cuda" or "auto"
    finds any, and handed one part after another. Under a launcher (WORLD_SIZE above 1) rank r of w does parts r, r + w,
    ... and rank 0, to which True is returned, shows its own progress and then waits for the others' parts, saying so.

    Raises ConfigError for more processes than GPUs or both ways at once, and any UserError of a part, after the other
    processes have been ended; finished parts stay. KeyboardInterrupt on SIGINT and SIGTERM.
    """
    env = DistEnv.from_environment()
    devices = choose_devices(device, processes, env)
    todo = [part for part in job.todo() if part % env.size == env.rank]
    total = sum(job.size(part) for part in range(env.rank, parts, env.size))
    begun = total - sum(job.size(part) for part in todo)
    shown = None if env.rank else label if env.size == 1 else f"{label}, rank 0 of {env.size}"
    with _interruptible():
        with bar(shown, total, unit, initial=begun, leave=True) as progress:
            if processes > 1 and len(todo) > 1:
                _spawn(job, todo, devices[: len(todo)], progress.update)
                return True
            _share_threads(env.local_size)
            if todo:
                do = job.open(devices[0])
                for part in todo:
                    do(part, progress.update)
        if env.rank == 0 and env.size > 1:
            _await(job, env.size)
    return env.rank == 0


def choose_devices(device: str, processes: int, env: DistEnv | None = None) -> list[torch.device]:
    """A device for each process: its own GPU, or the CPU for all.

    ConfigError when there are too few GPUs, or a launcher has started processes and more are asked for.
    """
    if env and env.size > 1 and processes > 1:
        raise ConfigError(
            f"{processes} processes are asked for in each of a launcher's {env.size} ranks: ask for one, or start "
            "without the launcher"
        )
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and not gpus):
        return [torch.device("cpu")] * processes
    if device not in ("auto", "cuda"):
        if processes > 1:
            raise ConfigError(f"device {device} is one device, and {processes} processes are asked for: give cuda")
        return [torch.device(device)]
    if processes > gpus:
        raise ConfigError(f"{processes} GPUs are asked for and this machine has {gpus}: ask for at most {gpus}")
    first = env.local_rank if env and env.size > 1 else 0
    return [torch.device("cuda", (first + index) % gpus) for index in range(processes)]


@dataclass(frozen=True)
class _Failure:
    """Why a process gave up: the message of a user's mistake, or a traceback."""

    message: str
    kind: type[UserError] | None


def _spawn(job: Job, todo: Sequence[int], devices: Sequence[torch.device], advance: Report) -> None:
    # Spawned, not forked: CUDA and thread pools don't survive a fork.
    context = multiprocessing.get_context("spawn")
    tasks, reports = context.Queue(), context.Queue()
    for part in (*todo, *[None] * len(devices)):
        tasks.put(part)
    workers: list[Any] = [
        context.Process(target=_work, args=(job, str(device), len(devices), tasks, reports, os.getpid()), daemon=True)
        for device in devices
    ]
    try:
        for worker in workers:
            worker.start()
        left = len(workers)
        while left:
            try:
                report = reports.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                _check_alive(workers)
                continue
            if isinstance(report, _Failure):
                raise (report.kind or RuntimeError)(report.message)
            if report is None:
                left -= 1
            else:
                advance(report)
        for worker in workers:
            worker.join()
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.terminate()
                worker.join(_LEAVE_SECONDS)


def _check_alive(workers: Sequence[Any]) -> None:
    for worker in workers:
        if worker.exitcode not in (None, 0):
            raise ConfigError(
                f"a process ended with code {worker.exitcode} and no message (killed, or out of memory?): the finished "
                "parts stay; give a smaller batch or fewer processes, and repeat the command"
            )


def _work(job: Job, device: str, processes: int, tasks: Any, reports: Any, parent: int) -> None:
    """One process: parts until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches the whole group; the parent ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    settle_cpu()

    def report(count: int) -> None:
        if os.getppid() != parent:
            os._exit(1)  # the parent was killed: nobody will end us
        reports.put(count)

    try:
        place = torch.device(device)
        _share_threads(processes)
        if place.type == "cuda":
            torch.cuda.set_device(place)
        do = job.open(place)
        while (part := tasks.get()) is not None:
            do(part, report)
        reports.put(None)
    except UserError as error:
        reports.put(_Failure(str(error), type(error)))
    except OSError as error:  # a full disk, for example: the user's to mend, so without a traceback
        reports.put(_Failure(f"{error.filename or 'input or output'}: {error.strerror or error}", UserError))
    except Exception:
        reports.put(_Failure(traceback.format_exc(), None))


def _await(job: Job, ranks: int) -> None:
    def missing() -> str:
        todo = job.todo()
        owners = ", ".join(map(str, sorted({part % ranks for part in todo})))
        return f"{counted(len(todo), 'part')} of other ranks ({owners}) in {job.out}" if todo else ""

    wait_while(missing)


def wait_while(missing: Callable[[], str], patience: float = 0) -> None:
    """Until nothing of other ranks is missing; what is, is said after so many seconds and then every five minutes.

    Most launchers end us if one of the others fails.
    """
    told = time.monotonic() + patience - _REMIND_SECONDS
    while what := missing():
        if time.monotonic() - told >= _REMIND_SECONDS:
            told = time.monotonic()
            print(
                f"waiting for {what}: if what it waits for has ended, end this command and repeat it",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(_POLL_SECONDS)


def _share_threads(processes: int) -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM as SIGINT: `finally` blocks run, and the command says that it was interrupted."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread, which has no say in signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
