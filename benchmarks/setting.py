"""What the command line and the machine say about a run, as the bench files read it."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import PEERS, check_checkout
from tools import timing

from mpdit.model.presets import PRESETS


@dataclass(frozen=True)
class Setting:
    """Device and sizes of a run.

    Attributes:
        device: "cuda" or "cpu"; sizes on a CPU are small.
        checkouts: folders of other projects' code by their option's name ("official", "dit", "fast-dit").
        models: presets to time, None for each part's own choice.
        batches: images of a call, largest first, None for each part's own choice.
        largest: of several batches only the largest that fits, for each variant.
        memory_limit: GB that the process may allocate on the GPU.
    """

    device: str
    checkouts: dict[str, Path]
    models: tuple[str, ...] | None = None
    batches: tuple[int, ...] | None = None
    largest: bool = False
    memory_limit: float | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def dtype(self) -> str:
        """What products take where a run may choose: bf16 on a GPU, fp32 on a CPU."""
        return "bf16" if self.on_gpu else "fp32"

    def describe(self) -> str:
        """Return a line for the head of the session."""
        if not self.on_gpu:
            return (
                'no CUDA GPU here, so small sizes on the CPU in fp32; the kernels are for GPUs, and "ours" runs their '
                f"references, {torch.get_num_threads()} threads"
            )
        limit = "" if self.memory_limit is None else f", limited to {self.memory_limit:g} GB"
        return f"{torch.cuda.get_device_name()}{limit}"

    def models_of(self, on_gpu: Sequence[str], on_cpu: Sequence[str]) -> Sequence[str]:
        return self.models or (on_gpu if self.on_gpu else on_cpu)

    def batches_of(self, on_gpu: Sequence[int], on_cpu: Sequence[int]) -> Sequence[int]:
        return self.batches or (on_gpu if self.on_gpu else on_cpu)

    @contextmanager
    def autocast(self, dtype: str | None = None) -> Iterator[None]:
        """Run products in this dtype, by default the run's."""
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype or self.dtype)
        with torch.autocast(self.device, kind or torch.bfloat16, enabled=kind is not None):
            yield


def add_options(group: Any) -> None:
    for name, peer in PEERS.items():
        group.addoption(f"--{name}", metavar="PATH", help=f"checkout of {peer.source}, to be timed beside ours")
    group.addoption("--models", nargs="+", metavar="MODEL", help="presets to time, instead of each part's own choice")
    group.addoption("--batches", nargs="+", type=int, metavar="N", help="images of a call, instead of each part's own")
    group.addoption("--largest", action="store_true", help="of these batches only the largest that fits")
    group.addoption("--memory-limit", type=float, metavar="GB", help="let the process allocate no more on the GPU")
    group.addoption("--rounds", type=int, metavar="N", help="turns of a case at most (30; 5 on a CPU)")
    group.addoption("--seconds", type=float, metavar="S", help="time for a case's turns (20; 6 on a CPU)")
    group.addoption("--minutes", type=float, metavar="M", help="begin no case later than this")
    group.addoption("--results", metavar="DIR", help="merge each figure into a dated file there as soon as it is there")


def from_options(option: Any) -> Setting:
    """Read the options; raises pytest.UsageError for what can't be."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    limit = option("--memory-limit")
    if limit is not None and device == "cpu":
        raise pytest.UsageError(f"--memory-limit {limit:g} needs a CUDA GPU, and there is none: leave it out")
    if limit is not None and not limit > 0:
        raise pytest.UsageError(f"--memory-limit is {limit:g}: give GB above 0")
    for name in option("--models") or ():
        if name not in PRESETS:
            raise pytest.UsageError(f"--models {name} is unknown: choose from {', '.join(PRESETS)}")
    for name in ("--batches", "--rounds", "--seconds", "--minutes"):
        value = option(name)
        if value is not None and min(value if isinstance(value, list) else [value]) <= 0:
            raise pytest.UsageError(f"{name} is {value}: give more than 0")
    paths = {name: option(f"--{name}") for name in PEERS}
    checkouts = {name: check_checkout(name, Path(path)) for name, path in paths.items() if path is not None}
    models, batches = option("--models"), option("--batches")
    return Setting(
        device,
        checkouts,
        tuple(models) if models else None,
        tuple(sorted(batches, reverse=True)) if batches else None,
        option("--largest"),
        limit,
    )


def limit_memory(gb: float) -> None:
    """Cap what this process may allocate, in GB of 1e9 bytes. Raises pytest.UsageError when the GPU has less."""
    total = torch.cuda.get_device_properties().total_memory
    if gb * 1e9 > total:
        raise pytest.UsageError(f"--memory-limit is {gb:g} GB, and this GPU has {total / 1e9:.1f}: give less")
    torch.cuda.set_per_process_memory_fraction(gb * 1e9 / total)


def machine(device: str) -> dict[str, Any]:
    """Return hardware, versions, clocks and power."""
    return timing.machine(device) | {"python": platform.python_version()}
