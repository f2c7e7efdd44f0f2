"""Launching a kernel: its configuration, tuned for each architecture, and the one place where launches pass.

A kernel's `Tunable` names what may be tuned. `tuned/sm_XX.json` holds what was measured best, written by
`python -m mpdit_kernels.tune`; without it, or for a shape not in it, the tunable's default is taken.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

INTERPRETING: bool = triton.knobs.runtime.interpret
"""Read once: Triton decides when a kernel is decorated."""

TUNED = Path(__file__).parent / "tuned"

Config = dict[str, Any]
"""Constants of a kernel (upper-case names) with num_warps and num_stages."""

TUNABLES: dict[str, Tunable] = {}


@dataclass(frozen=True)
class Launch:
    """One launch as recorded: what would have been run."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: Config


_records: list[Launch] | None = None
_overrides: dict[str, Config] = {}
_target: str | None = None


class Tunable:
    """A kernel's choices, registered under a name such as "adaln.forward".

    Args:
        name: key in the tuned tables.
        default: from the call's key (for example width=1152) to the configuration where nothing was measured.
        candidates: what the tuner tries, from the same key.
    """

    def __init__(self, name: str, default: Callable[..., Config], candidates: Callable[..., Sequence[Config]]) -> None:
        self.name, self.default, self.candidates = name, default, candidates
        TUNABLES[name] = self

    def pick(self, **key: Any) -> Config:
        """The configuration for this key on the current device: overridden, tuned, or by default."""
        if self.name in _overrides:
            return _overrides[self.name]
        tuned = tuned_table(_target or architecture()).get("configs", {}).get(self.name, {})
        return tuned.get(key_text(key)) or self.default(**key)

    @contextmanager
    def override(self, config: Config) -> Iterator[None]:
        """Within the block every pick is this one; for the tuner and for tests."""
        _overrides[self.name] = config
        try:
            yield
        finally:
            del _overrides[self.name]


def key_text(key: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in sorted(key.items()))


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run kernel[grid](*args, **constants); while recording, note it instead. An empty grid runs nothing."""
    if _records is not None:
        _records.append(Launch(kernel, grid, args, constants))
    elif all(grid):
        if not INTERPRETING and any(isinstance(x, torch.Tensor) and not x.is_cuda for x in args):
            raise RuntimeError("a kernel was given CPU tensors: set TRITON_INTERPRET=1 before triton is imported")
        kernel[grid](*args, **constants)


@contextmanager
def record(target: str | None = None) -> Iterator[list[Launch]]:
    """Note launches instead of running them, with the configurations of `target` ("sm_90"): tensors may be meta."""
    global _records, _target
    _records, _target = [], target
    try:
        yield _records
    finally:
        _records = _target = None


@functools.cache
def architecture() -> str:
    """ "sm_90" for an H100 or H200; "cpu" where there is no GPU."""
    if not torch.cuda.is_available():
        return "cpu"
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


@functools.cache
def tuned_table(target: str) -> dict[str, Any]:
    """The measured table of an architecture, {} when nobody measured there."""
    path = TUNED / f"{target}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def wins(operation: str, capability: tuple[int, int]) -> bool:
    """Whether `operation` is worth its kernels there: False only when it was measured to lose."""
    return bool(tuned_table(f"sm_{capability[0]}{capability[1]}").get("wins", {}).get(operation, True))


@functools.cache
def multiprocessors() -> int:
    """Of the current GPU; an H200's where there is none."""
    return torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 132
