"""Reads what the command line and the machine say about a run of the suite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import PEERS, check_checkout

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
    models: Sequence[str] | None = None
    batches: Sequence[int] | None = None
    largest: bool = False
    memory_limit: float | None = None

    @property
    def on_gpu(self) -> bool:
        """Tell whether it is a GPU that is measured."""
        return self.device == "cuda"

    @property
    def dtype(self) -> str:
        """Return what products take where a run may choose: bf16 on a GPU, fp32 on a CPU."""
        return "bf16" if self.on_gpu else "fp32"

    def models_of(self, on_gpu: Sequence[str], on_cpu: Sequence[str]) -> Sequence[str]:
        """Return the presets to measure: those asked for, or else the part's own."""
        return self.models or (on_gpu if self.on_gpu else on_cpu)

    def batches_of(self, on_gpu: Sequence[int], on_cpu: Sequence[int]) -> Sequence[int]:
        """Return the batches to measure: those asked for, or else the part's own."""
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
    group.addoption("--models", nargs="+", choices=[*PRESETS], metavar="MODEL", help="presets, instead of each part's")
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
    for name in ("--batches", "--memory-limit", "--rounds", "--seconds", "--minutes"):
        value = option(name)
        if value is not None and min(value if isinstance(value, list) else [value]) <= 0:
            raise pytest.UsageError(f"{name} is {value}: give more than 0")
    checkouts = {name: check_checkout(name, Path(path)) for name in PEERS if (path := option(f"--{name}")) is not None}
    batches = sorted(option("--batches") or (), reverse=True)
    return Setting(device, checkouts, option("--models"), batches, option("--largest"), limit)
