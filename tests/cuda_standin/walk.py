"""Runs a module of this project on the stand-in as it would run on a GPU, as far as values don't matter.

    python tests/cuda_standin/standin.py tests/cuda_standin/walk.py mpdit train --ds_config launch/zero2.json ...
    python tests/cuda_standin/standin.py tests/cuda_standin/walk.py SCRIPT.py ...

What no kernel computed can't be judged: kernels and backends of attention serve without their proofs, and every step of
training counts as sound. The trace's phases are the steps and the ranges of mpdit.training.profiling.
"""

from __future__ import annotations

import atexit
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import standin


def patch() -> None:
    """Have values count as right, and the trace say where in a step it is."""
    import torch
    from mpdit_kernels import proof
    from mpdit_kernels.backends import probe

    from mpdit.jobs.sample import drawing
    from mpdit.training import profiling
    from mpdit.training.safety import guard

    # cuDNN looks for its kernels in ways that no stub answers: convolutions go through cuBLAS, attention elsewhere.
    torch.backends.cudnn.enabled = False
    torch._C._set_cudnn_enabled = lambda on: None

    def refusal(name: str, call: Any) -> str | None:
        return "there is no cuDNN here" if name == "sdpa_cudnn" else probe.BACKENDS[name].unfit(call)

    probe.refusal = refusal
    proof.problem = lambda *_: None
    drawing.check_finite = lambda *_: None

    read = guard.Guard._read

    def sound(self: Any, verdict: Any) -> Iterator[Any]:
        if verdict.arrived is not None:
            verdict.arrived.synchronize()
        return read(self, replace(verdict, arrived=None, values=torch.tensor([1.0, 1.0, 0.0])))

    guard.Guard._read = sound
    steps, ranges = profiling.Profiler.steps, profiling.Profiler.range
    now = "start"

    def told_steps(self: Any, numbers: range) -> Iterator[int]:
        nonlocal now
        for step in steps(self, numbers):
            now = f"step {step}"
            standin.phase(now)
            yield step
        standin.phase("end")

    @contextmanager
    def told_range(self: Any, name: str) -> Iterator[None]:
        standin.phase(name if name.startswith("step ") else f"{now} {name}")
        with ranges(self, name):
            yield
        standin.phase(now)

    @atexit.register
    def tell_peak() -> None:
        for device in range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ():
            allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
            if reserved:
                print(f"standin: peak of device {device}: {allocated} bytes, {reserved} reserved", file=sys.stderr)

    profiling.Profiler.steps = told_steps
    profiling.Profiler.range = told_range


if __name__ in ("__main__", "__mp_main__"):  # also in processes that it spawns
    patch()
if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    if sys.argv[0].endswith(".py"):
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(sys.argv[0], run_name="__main__")
