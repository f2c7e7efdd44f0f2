"""Launching a kernel: its configuration, tuned for each architecture, and the one place where launches pass.

A kernel's `Tunable` names what may be tuned. `tuned/sm_XX.json` holds what was measured best, written by
`python -m tools.tune`; without it, or for a shape not in it, the tunable's default is taken.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton

from mpdit_kernels import operators
from mpdit_kernels.dispatch import architecture_of, tuned_table

operators.register_flops()  # no operator runs uncounted

INTERPRETING: bool = triton.knobs.runtime.interpret
"""Read once: Triton decides when a kernel is decorated."""

if INTERPRETING and triton.__version__.startswith("3.6."):
    # Loops to a loaded bound call int() of an array [1], which numpy 2.5 refuses; mended in Triton 3.7.
    from triton.runtime import interpreter

    _replace_methods = interpreter._patch_lang_tensor

    def _with_index(tensor: Any, scope: Any) -> None:
        _replace_methods(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _with_index

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
_picked: list[tuple[Tunable, dict[str, Any]]] | None = None
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
        """Return the configuration for this key on the current device: overridden, tuned, or by default."""
        if _picked is not None:
            _picked.append((self, key))
        if self.name in _overrides:
            return _overrides[self.name]
        tuned = tuned_table(target()).get("configs", {}).get(self.name, {})
        return tuned.get(key_text(key)) or self.default(**key)

    @contextmanager
    def override(self, config: Config) -> Iterator[None]:
        """Make every pick within the block this one; for the tuner and for tests."""
        global _overrides
        before, _overrides = _overrides, {**_overrides, self.name: config}
        try:
            yield
        finally:
            _overrides = before


def key_text(key: dict[str, Any]) -> str:
    """Return a key as tuned tables name it: "tokens=80 width=72"."""
    return " ".join(f"{name}={value}" for name, value in sorted(key.items()))


def element_sizes(*tensors: torch.Tensor | None) -> str:
    """Return what a key says of dtypes, bytes of an element of each tensor: "4+2"."""
    return "+".join(str(x.element_size()) for x in tensors if x is not None)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run kernel[grid](*args, **constants); while recording, note it instead. An empty grid runs nothing."""
    if _records is not None:
        _records.append(Launch(kernel, grid, args, constants))
    elif all(grid) and INTERPRETING:
        kernel[grid](*args, **constants)
    elif all(grid):
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if any(not x.is_cuda for x in tensors):
            raise RuntimeError("a kernel was given CPU tensors: set TRITON_INTERPRET=1 before triton is imported")
        # Triton launches on the current GPU, wherever the tensors are.
        with torch.cuda.device(tensors[0].device if tensors else None):
            kernel[grid](*args, **constants)


@contextmanager
def record(target: str | None = None) -> Iterator[list[Launch]]:
    """Note launches instead of running them, with the configurations of `target` ("sm_90"): tensors may be meta."""
    global _records, _target
    _records, _target, operators.recording = [], target, True
    try:
        yield _records
    finally:
        _records, _target, operators.recording = None, None, False


@contextmanager
def picks() -> Iterator[list[tuple[Tunable, dict[str, Any]]]]:
    """Note which tunables are asked for a configuration, and for which keys."""
    global _picked
    _picked = []
    try:
        yield _picked
    finally:
        _picked = None


def target() -> str:
    """Return the architecture that launches are made for: the one recorded for, or this machine's."""
    return _target or architecture()


@functools.cache
def architecture() -> str:
    """Return "sm_90" for an H100 or H200; "cpu" where there is no GPU."""
    return architecture_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
