"""Shares work in parts among any number of processes: each part is done once, and what is done stays done.

A job is a fixed list of parts, each of which leaves files of its own that appear whole or not at all. So processes
need not talk to one another: which parts are left is seen from the folder, a killed job goes on where it was, and the
result doesn't depend on how many shared it. Processes come from here (`processes`, one a GPU) or from a launcher, on
any number of nodes that see the same folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mpdit.core.cpu import settle_cpu
from mpdit.core.dist_env import DistEnv, set_threads
from mpdit.core.errors import ConfigError, DataError, UserError
from mpdit.core.files import locked, write_atomically
from mpdit.core.progress import bar
from mpdit.core.text import counted
from mpdit.data.manifest import PARTS_NAME
from mpdit.jobs.npz import disk

Report = Callable[[int], object]
"""Called with the number of images done since the last call."""

DoPart = Callable[[int, Report], None]

_POLL_SECONDS = 1.0
_LEAVE_SECONDS = 10.0
_REMIND_SECONDS = 300.0
_PATIENCE_SECONDS = 20.0
"""Seconds that rank 0 may take to begin before the others say that they wait."""


@dataclass(kw_only=True)
class Job(ABC):
    """Describes work at images in parts, in a folder; it must be picklable, as each process gets a copy."""

    out: Path
    identity: dict[str, Any]
    """What the result depends on, in JSON types: parts made with another are not this job's."""
    count: int
    """Images, all parts together."""
    part_images: int
    """Images of a part; the last one may have fewer."""
    kept: int = 0
    """Images at the start, whole parts, that lie in the folder's finished files already."""
    _sound: set[int] = field(default_factory=set, init=False)

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the identity, which every part carries."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @property
    def parts(self) -> range:
        """Return the numbers of the parts."""
        return range(self.kept // self.part_images, -(-self.count // self.part_images))

    @property
    def parts_folder(self) -> Path:
        """Return the folder of what isn't put together yet."""
        return self.out / PARTS_NAME

    def span(self, part: int) -> tuple[int, int]:
        """Return a part's first image, and the one behind its last."""
        first = part * self.part_images
        return first, min(first + self.part_images, self.count)

    def size(self, part: int) -> int:
        """Return how many images a part has."""
        first, last = self.span(part)
        return last - first

    def todo(self) -> list[int]:
        """Return the parts that are not finished, in order, by what is on the disk.

        Parts found finished are not looked at again. Those that are this rank's to do are read to the last byte.
        """
        env = DistEnv.from_environment()
        left = [part for part in self.parts if part not in self._sound]
        with bar(None if self._sound else "checking parts", len(left), "part") as progress:
            for part in left:
                if self.is_done(part, whole=part % env.size == env.rank):
                    self._sound.add(part)
                progress.update()
        return [part for part in left if part not in self._sound]

    @abstractmethod
    def is_done(self, part: int, whole: bool) -> bool:
        """Return whether a part is there and of this job; with `whole` every byte of it is checked."""

    @abstractmethod
    def open(self, device: torch.device) -> DoPart:
        """Load what a process needs; the function returned does one part and reports its images as they are done."""


@contextlib.contextmanager
def begin(job: Job, note: str, content: Mapping[str, Any], check: Callable[[], bool]) -> Iterator[None]:
    """Hold a job's folder: rank 0 locks it and writes down what its parts are of, for which the other ranks wait.

    After a failure without a finished part the folder is as it was before.

    note, content: name and contents of that file.
    check: called on the other ranks until it returns that rank 0 has begun, or finished; it raises if the folder is
    another job's.
    """
    env = DistEnv.from_environment()
    if env.rank:
        wait_while(lambda: "" if check() else f"rank 0 to begin in {job.out}", _PATIENCE_SECONDS)
        yield
        return
    made = [path for path in (job.out, *job.out.absolute().parents) if not path.exists()]
    with contextlib.ExitStack() as held:
        with disk(job.out):
            job.out.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(locked(job.out, wait=False))
            except BlockingIOError:
                raise DataError(
                    f"{job.out} is being written by another process: wait for it, or give another folder"
                ) from None
        try:
            with disk(job.out):
                job.parts_folder.mkdir(exist_ok=True)
                write_atomically(job.parts_folder / note, json.dumps(content, indent=1) + "\n")
            yield
        except BaseException:
            if env.size == 1 and not any(job.is_done(part, whole=False) for part in job.parts):
                shutil.rmtree(job.parts_folder, ignore_errors=True)
                with contextlib.suppress(OSError):
                    for path in made:
                        path.rmdir()
            raise


def run_parts(job: Job, devices: Sequence[torch.device], label: str) -> bool:
    """Do what is left of a job; returns whether this process is the one to put the parts together.

    For several devices as many processes are started here and handed one part after another. Under a launcher
    (WORLD_SIZE above 1) rank r of w does parts r, r + w, ... and rank 0, to which True is returned, shows its own
    progress and then waits for the others' parts, saying so.

    Raises any UserError of a part, after the other processes have been ended; finished parts stay. KeyboardInterrupt
    on SIGINT and SIGTERM.
    """
    env = DistEnv.from_environment()
    todo = [part for part in job.todo() if part % env.size == env.rank]
    total = sum(job.size(part) for part in job.parts if part % env.size == env.rank)
    begun = total - sum(job.size(part) for part in todo)
    shown = None if env.rank else label if env.size == 1 else f"{label}, rank 0 of {env.size}"
    with _interruptible():
        with bar(shown, total, initial=begun, leave=True) as progress:
            if len(devices) > 1 and len(todo) > 1:
                _spawn(job, todo, devices[: len(todo)], progress.update)
                return True
            set_threads(env)
            if todo:
                _settle_device(devices[0])
                do = job.open(devices[0])
                for part in todo:
                    do(part, progress.update)
        if env.rank == 0 and env.size > 1:

            def missing() -> str:
                left = job.todo()
                owners = ", ".join(map(str, sorted({part % env.size for part in left})))
                return f"{counted(len(left), 'part')} of other ranks ({owners}) in {job.out}" if left else ""

            wait_while(missing)
    return env.rank == 0


def choose_devices(device: str, processes: int) -> list[torch.device]:
    """Choose a device for each process: its own GPU where `device` is "cuda" or "auto" finds any, or the CPU for all.

    ConfigError when there are too few GPUs, or a launcher has started processes and more are asked for.
    """
    env = DistEnv.from_environment()
    if env.size > 1 and processes > 1:
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
    return [torch.device("cuda", (env.local_rank + index) % gpus) for index in range(processes)]


def _settle_device(device: torch.device) -> None:
    """Make a GPU that has a number the current one: streams, events and library handles are made on that."""
    if device.index is not None:
        torch.cuda.set_device(device)


def _spawn(job: Job, todo: Sequence[int], devices: Sequence[torch.device], advance: Report) -> None:
    # Spawned, not forked: CUDA and thread pools don't survive a fork.
    context = multiprocessing.get_context("spawn")
    try:
        tasks, reports = context.Queue(), context.Queue()
    except OSError as error:  # their semaphores lie there, and the system's error names no file
        raise ConfigError(
            f"{len(devices)} processes can't be started, for want of /dev/shm ({error.strerror}): mount it, or give it "
            "room (docker's --shm-size or --ipc=host), or ask for one process"
        ) from error
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
                if codes := [worker.exitcode for worker in workers if worker.exitcode]:
                    raise ConfigError(
                        f"a process ended with code {codes[0]} and no message (killed, or out of memory?): the "
                        "finished parts stay; give a smaller batch or fewer processes, and repeat the command"
                    ) from None
                continue
            if isinstance(report, Exception):
                raise report
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


def _work(job: Job, device: str, processes: int, tasks: Any, reports: Any, parent: int) -> None:
    """Do parts in a process of its own until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches the whole group; the parent ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    settle_cpu()

    def report(count: int) -> None:
        if os.getppid() != parent:
            os._exit(1)  # the parent was killed: nobody will end us
        reports.put(count)

    try:
        place = torch.device(device)
        set_threads(DistEnv(local_size=processes))
        _settle_device(place)
        do = job.open(place)
        while (part := tasks.get()) is not None:
            do(part, report)
        reports.put(None)
    except UserError as error:
        reports.put(error)
    except OSError as error:  # a full disk, for example: the user's to mend, so without a traceback
        reports.put(UserError(f"{error.filename or 'input or output'}: {error.strerror or error}"))
    except Exception:
        reports.put(RuntimeError(traceback.format_exc()))


def wait_while(missing: Callable[[], str], patience: float = 0) -> None:
    """Wait until nothing of other ranks is missing; what is, is said after so many seconds and every five minutes.

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


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Have SIGTERM do what SIGINT does: `finally` blocks run, and the command says that it was interrupted."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
