"""Jobs for the tests of workers.py, in a module of their own as processes that are spawned import them by name."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mpdit.core.errors import DataError
from mpdit.jobs.workers import DoPart, Job, Report


@dataclass(kw_only=True)
class Files(Job):
    """A part is a file that holds who wrote it; part `bad` can't be written, in the way `how` says."""

    identity: dict[str, Any] = field(default_factory=dict)
    count: int = 12
    part_images: int = 2
    bad: int = -1
    how: str = "user"

    def is_done(self, part: int, whole: bool) -> bool:
        return self._path(part).exists()

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
        return self.out / f"part-{part}"


@dataclass(kw_only=True)
class Slow(Job):
    """Four parts that take a minute each; who is at work leaves a file with its process id as its name."""

    identity: dict[str, Any] = field(default_factory=dict)
    count: int = 4000
    part_images: int = 1000

    def is_done(self, part: int, whole: bool) -> bool:
        return False

    def open(self, device: torch.device) -> DoPart:
        def do(part: int, report: Report) -> None:
            (self.out / str(os.getpid())).touch()
            for _ in range(1000):
                time.sleep(0.06)
                report(1)

        return do
