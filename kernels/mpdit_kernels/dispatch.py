"""Which implementation an operation takes: its Triton kernels, or its reference in plain PyTorch.

"auto" takes Triton for CUDA tensors, except where it was measured to lose or is wrong on this very GPU (`proof`), and
the reference for the rest. "triton" takes Triton wherever it can run, "reference" never. Set by `use`, or for the whole
process by MPDIT_KERNELS. Where Triton is refused, the reason is logged once under "mpdit_kernels".
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mpdit_kernels import operators, proof
from mpdit_kernels.proof import Trial

F = TypeVar("F", bound=Callable[..., Any])

MODES = ("auto", "triton", "reference")
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
MAX_WIDTH = 4096
"""Widest row that kernels hold in registers."""
SHARED_LIMITS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
"""Bytes of shared memory that one program can have."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that every kernel takes."""

TUNED = Path(__file__).parent / "tuned"
"""Measured tables, as `python -m tools.tune` writes them: "sm_90" of kernels, "attention_sm_90" of attention."""

_log = logging.getLogger("mpdit_kernels")
_told: set[tuple[str, str]] = set()
_tables: dict[str, dict[str, Any]] = {}
_mode = os.environ.get("MPDIT_KERNELS") or "auto"


def mode() -> str:
    """Return the mode in force. Raises ValueError when MPDIT_KERNELS names no mode."""
    return _checked(_mode, "MPDIT_KERNELS")


@contextmanager
def use(kernels: str) -> Iterator[None]:
    """Have operations take "auto", "triton" or "reference" within the block; holds for all threads of the process.

    On CPU tensors "triton" needs Triton's interpreter: TRITON_INTERPRET=1 set before triton is imported.

    Raises:
        ValueError: another mode.
    """
    global _mode
    before, _mode = _mode, _checked(kernels, "kernels")
    try:
        yield
    finally:
        _mode = before


def _checked(name: str, source: str) -> str:
    if name not in MODES:
        raise ValueError(f"{source} is {name!r}: choose one of {', '.join(MODES)}")
    return name


def interpreting() -> bool:
    """Return whether Triton's kernels run in its interpreter, on CPU tensors."""
    if not TRITON_INSTALLED:
        return False
    import triton

    return triton.knobs.runtime.interpret


def takes_triton(
    operation: str,
    *tensors: Tensor | None,
    refusal: str | None = None,
    trial: Trial | None = None,
    variant: object = "",
) -> bool:
    """Decide for one call and, when Triton is refused, log why, once.

    Args:
        operation: name of the public function, which is also its name in the measured tables.
        *tensors: those whose device and dtype matter; the first one's device is the call's.
        refusal: why the operation itself can't serve these shapes, if so.
        trial: by which "auto" proves the kernels on a GPU before it takes them for such tensors, see `proof`.
        variant: what else decides what runs: each is proved by itself.
    """
    if mode() == "reference":
        return False
    given = [x for x in tensors if x is not None]
    device, compiling = given[0].device, torch.compiler.is_compiling()
    if not _decide(operation, _mode, device, tuple(x.dtype for x in given), refusal, compiling):
        return False
    if trial is None or _mode != "auto" or operators.recording or compiling:
        return True
    reason = proof.problem(operation, given, variant, trial, use)
    if reason:
        _tell(operation, f"on this GPU its kernels did not pass their proof: {reason}", logging.WARNING)
    return not reason


def too_wide(x: Tensor) -> str | None:
    """Return a refusal when x's rows don't fit into registers."""
    width = x.shape[-1]
    return f"rows are {width} wide, and the kernels hold {MAX_WIDTH} at most" if width > MAX_WIDTH else None


def architecture_of(device: torch.device) -> str:
    """Return what tuned tables call a device: "sm_90" for an H100 or H200, else its type."""
    if device.type != "cuda":
        return device.type
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def shared_limit(architecture: str) -> int:
    """Return a program's bytes of shared memory; on an architecture not listed, the least of any since sm_80."""
    return SHARED_LIMITS.get(architecture, 99 * 1024)


def constant_to_compiler(function: F) -> F:
    """Have torch.compile take the function's result as a constant, as it reads what can't be traced.

    This is torch.compiler.assume_constant_result, whose call would import the whole compiler, and triton, at once.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_to_compiler  # files, the driver and the log; run where it is traced
def _decide(
    operation: str,
    mode: str,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    refusal: str | None,
    compiling: bool,
) -> bool:
    reason = no_kernels(mode, device, dtypes) or _loss(operation, mode, device, compiling) or refusal
    if reason:
        # On the CPU the reference is what "auto" means: worth a line for those who ask, no more.
        _tell(operation, reason, logging.INFO if mode == "auto" and device.type == "cpu" else logging.WARNING)
    return not reason


def _tell(operation: str, reason: str, level: int) -> None:
    if (operation, reason) not in _told:
        _told.add((operation, reason))
        _log.log(level, "%s takes its reference: %s", operation, reason)


def no_kernels(mode: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Return why no kernel runs on tensors like these in this mode, "auto" or "triton"; None if kernels do."""
    if not TRITON_INSTALLED:
        return "triton is not installed"
    if device.type == "meta" and operators.recording:
        return None
    if device.type == "cpu" and mode == "auto":
        return "the tensors are on the CPU"
    if device.type == "cpu" and not interpreting():
        return "the tensors are on the CPU and TRITON_INTERPRET=1 was not set before triton was imported"
    if device.type not in ("cpu", "cuda"):
        return f"the tensors are on {device.type}, and the kernels are for CUDA"
    for dtype in dtypes:
        if dtype not in FLOATS:
            return f"a tensor is {dtype}, and the kernels take {', '.join(map(str, FLOATS))}"
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"the GPU is of compute capability {capability[0]}.{capability[1]}, and the kernels need 8.0"
    return None


def _loss(operation: str, mode: str, device: torch.device, compiling: bool) -> str | None:
    """Return why "auto" leaves the kernels out: None unless they were measured to lose on this GPU.

    To what would run in their place, that is: the reference as it is or, under torch.compile, compiled.
    """
    if device.type != "cuda" or mode != "auto":
        return None
    target = architecture_of(device)
    table = tuned_table(target)
    if compiling:
        table = table.get("compiled", {})
    if table.get("wins", {}).get(operation, True):
        return None
    why = table.get("losses", {}).get(operation, "it was measured slower")
    return f"on {target}, {why}; use('triton') takes its kernels all the same"


def tuned_table(name: str) -> dict[str, Any]:
    """Return a measured table, {} when nobody measured; read once."""
    if name not in _tables:
        path = TUNED / f"{name}.json"
        _tables[name] = json.loads(path.read_text()) if path.exists() else {}
    return _tables[name]


def set_tuned_table(name: str, table: dict[str, Any] | None) -> None:
    """Take this table from now on; None reads the file again. For the tuner and for tests."""
    _tables.pop(name, None)
    if table is not None:
        _tables[name] = table
