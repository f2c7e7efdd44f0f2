"""Jobs for the tests of workers.py, in a module of their own as processes that are spawned import them by name."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from mpdit.core.errors import DataError
from mpdit.jobs.workers import DoPart, Report


@dataclass(frozen=True)
class Files:
    """A part is a file that holds who wrote it; part `bad` can't be written, in the way `how` says."""

    folder: Path
    parts: int = 6
    bad: int = -1
    how: str = "user"

    @property
    def out(self) -> Path:
        return self.folder

    def todo(self) -> list[int]:
        return [part for part in range(self.parts) if not self._path(part).exists()]

    def size(self, part: int) -> int:
        return part + 1

    def open(self, device: torch.device) -> DoPart:
        def do(part: int, report: Report) -> None:
            if part == self.bad:
                self._fail()
            with open(self._path(part), "x") as file:  # "x": a part done twice is an error
                file.write(f"{os.getpid()} {device} {torch.get_num_threads()}")
            report(self.size(part))

        return do

    def _fail(self) -> None:
        if self.how == "user":
            raise DataError("part is wrong: mend it")
        if self.how == "disk":
            raise OSError(28, "No space left on device", "/disk/part")
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("a bug")

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part}"


@dataclass(frozen=True)
class Slow:
    """Four parts that take a minute each; who is at work leaves a file with its process id as its name."""

    folder: Path

    @property
    def out(self) -> Path:
        return self.folder

    def todo(self) -> list[int]:
        return [0, 1, 2, 3]

    def size(self, part: int) -> int:
        return 1000

    def open(self, device: torch.device) -> DoPart:
        def do(part: int, report: Report) -> None:
            (self.folder / str(os.getpid())).touch()
            for _ in range(1000):
                time.sleep(0.06)
                report(1)

        return do
