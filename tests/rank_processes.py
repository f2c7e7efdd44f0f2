"""The ranks of a run as processes that a test can send signals to, and ask what became of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from training_runs import REPOSITORY, TINY, ds_config, free_port

PATCHED = """
import os, signal, sys, time
from mpdit.training import loop
from mpdit.training.main import main
real, rank, step = loop.flow_loss, int(os.environ.get("RANK", "0")), 0
def flow_loss(*args, **kwargs):
    global step
    step += 1
    {body}
    return real(*args, **kwargs)
loop.flow_loss = flow_loss
sys.exit(main())
"""
"""launch/train.py, but that `body` is done before the forward pass of `step` on `rank`."""


class Ranks:
    """A run of `ranks` processes, started as a launcher does it; what is left of it is killed at the end."""

    def __init__(self, out: Path, *arguments: str, ranks: int = 2, body: str = "") -> None:
        script = ["-c", PATCHED.format(body=body)] if body else [str(REPOSITORY / "launch" / "train.py")]
        command = [sys.executable, *script, "--ds_config", ds_config(2), *TINY, *arguments, "--out", str(out)]
        common = {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        environment = os.environ | common | {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
        self.out = out
        self._logs = [out.with_name(f"rank-{rank}.log") for rank in range(ranks)]
        self.processes = []
        for rank, log in enumerate(self._logs):
            with log.open("w") as file:
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                self.processes.append(subprocess.Popen(command, env=environment | place, stdout=file, stderr=file))

    def wait_for_step(self, step: int) -> None:
        wait_for_step(self.out, step)

    def codes(self, seconds: float = 60) -> list[int]:
        """Exit codes, by rank; fails when one of them is still there after so long."""
        end = time.monotonic() + seconds
        return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]

    def output(self, rank: int) -> str:
        return self._logs[rank].read_text()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def wait_for_step(out: Path, step: int, seconds: float = 60) -> None:
    """Until this step, logged, is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (out / "metrics.jsonl").exists() and f'"step": {step},' in (out / "metrics.jsonl").read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} did not come in {out}")
