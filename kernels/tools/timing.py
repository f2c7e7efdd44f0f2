"""Times of calls: cold caches, contenders in turns in one process, medians with quantiles."""

from __future__ import annotations

import functools
import importlib
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from mpdit_kernels.dispatch import TRITON_INSTALLED
from torch import Tensor

Prepare = Callable[[], Sequence[Callable[[], Any]]]
"""Does what is not to be timed, such as the forward of a backward, and returns the calls to time."""


class Clock(Protocol):
    def seconds(self, name: str, prepare: Prepare) -> float:
        """Return the time of one of the prepared calls, on average."""


@dataclass(frozen=True)
class Times:
    """Seconds of a call: median and the quantiles that enclose the middle three fifths."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Times:
        """Return the median of samples and their 20 % and 80 % quantiles."""
        points = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
        return cls(*torch.tensor(samples, dtype=torch.float64).quantile(points).tolist())


class WallClock:
    """Takes the time that a caller waits: from an idle device with cold caches until the calls have ended."""

    def __init__(self, device: str = "cpu") -> None:
        self._flush = _flush if device == "cuda" else lambda: None
        self._wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def seconds(self, name: str, prepare: Prepare) -> float:
        """Return the mean seconds of a call."""
        calls = prepare()
        self._flush()
        self._wait()
        start = time.perf_counter()
        for call in calls:
            call()
        self._wait()
        return (time.perf_counter() - start) / len(calls)


class GpuClock:
    """Takes the GPU's time between two events, with the L2 filled with something else before and no launch waited for.

    The GPU sleeps while the CPU issues the calls, so what is timed is work back to back and not the CPU. A bracket
    that the GPU reached before the CPU had left it is taken again after a longer sleep.
    """

    ATTEMPTS = 5

    def __init__(self) -> None:
        self._ahead: dict[str, float] = {}

    def seconds(self, name: str, prepare: Prepare) -> float:
        """Return the mean seconds of a call; what it learns of how long to sleep is kept by `name`."""
        for _ in range(self.ATTEMPTS):
            calls = prepare()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            _flush()
            torch.cuda.synchronize()
            sleep = self._ahead.get(name, 1e-3)
            torch.cuda._sleep(int(sleep * 2e9))  # cycles; at most about two of them a nanosecond
            issued = time.perf_counter()
            start.record()
            for call in calls:
                call()
            end.record()
            late = start.query()
            issued = time.perf_counter() - issued
            torch.cuda.synchronize()
            self._ahead[name] = min(0.25, max(2 * sleep if late else 0.0, 1.5 * issued + 2e-4))
            if not late:
                break
        return start.elapsed_time(end) / 1e3 / len(calls)


@functools.cache
def _larger_than_cache() -> Tensor:
    size = torch.cuda.get_device_properties().L2_cache_size
    return torch.ones(max(size, 1 << 24), device="cuda")  # in fp32: four times the L2


def _flush() -> None:
    """Fill the L2 with something else, by a read: written lines would be written back while we time."""
    _larger_than_cache().sum()


def turns(
    clock: Clock, contenders: Mapping[str, Prepare], rounds: int = 30, seconds: float = 3.0, least: int = 5
) -> dict[str, list[float]]:
    """Return samples of all contenders, in seconds, taken in turns.

    The samples of one index were taken one after another, so that their ratio is fair.

    Args:
        clock: takes one sample.
        contenders: what prepares the calls to time, by name.
        rounds: samples of each.
        seconds: after which there are fewer.
        least: but not fewer than these.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names, start = list(contenders), time.monotonic()
    for name in names:
        clock.seconds(name, contenders[name])  # warm up
    for turn in range(rounds):
        if turn >= least and time.monotonic() - start > seconds:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(clock.seconds(name, contenders[name]))
    return samples


def compare(
    clock: Clock, contenders: Mapping[str, Prepare], rounds: int = 30, seconds: float = 3.0
) -> dict[str, Times]:
    """Return the times of all contenders; the arguments are those of `turns`, which takes them."""
    return {name: Times.of(taken) for name, taken in turns(clock, contenders, rounds, seconds).items()}


def ceilings(clock: Clock, device: str, small: bool = False) -> dict[str, float]:
    """Measure what this device does at best: copying (bytes read and written a second), bf16 and fp32 products."""
    sizes = {"cuda": (1 << 29, 8192, 4096), "cpu": (1 << 25, 512, 1536)}
    count, side, side32 = (1 << 16, 64, 64) if small else sizes[torch.device(device).type]
    source, target = torch.ones(2, count, dtype=torch.bfloat16, device=device)
    a, b = torch.randn(2, side, side, device=device).bfloat16()
    a32, b32 = torch.randn(2, side32, side32, device=device)  # multiplied without TF32, by torch's default
    out, out32 = torch.empty_like(a), torch.empty_like(a32)
    times = compare(
        clock,
        {
            "copy": lambda: [lambda: target.copy_(source)],
            "matmul": lambda: [lambda: torch.mm(a, b, out=out)],
            "matmul32": lambda: [lambda: torch.mm(a32, b32, out=out32)],
        },
    )
    return {
        "copy": 2 * source.nbytes / times["copy"].median,
        "matmul": 2 * side**3 / times["matmul"].median,
        "matmul32": 2 * side32**3 / times["matmul32"].median,
    }


def out_of_memory(error: Exception) -> bool:
    """Return whether the GPU's memory was too small, which says nothing of a kernel; libraries have their own words."""
    words = ("out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def machine(device: str) -> dict[str, Any]:
    """Return what is measured on: hardware, driver, clocks and power where they can be read, versions and the day."""
    info = Path("/proc/cpuinfo")
    cpus = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    found = {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "none",
        "cpu": cpus[0] if cpus else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__ if TRITON_INSTALLED else "none",
        "date": datetime.now(UTC).date().isoformat(),
    }
    return found | (_from_nvidia_smi() if device == "cuda" else {})


def _from_nvidia_smi() -> dict[str, str]:
    fields = {"driver": "driver_version", "sm clock": "clocks.sm", "memory clock": "clocks.mem",
              "highest sm clock": "clocks.max.sm", "power limit": "power.limit", "power": "power.draw",
              "temperature": "temperature.gpu"}  # fmt: skip
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader"]
    done = subprocess.run(
        # By UUID: CUDA's numbers are those of CUDA_VISIBLE_DEVICES.
        [*command, f"--id=GPU-{torch.cuda.get_device_properties().uuid}"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(fields, values, strict=True)) if done.returncode == 0 and len(values) == len(fields) else {}
