"""Which implementation an operation takes: its Triton kernels, or its reference in plain PyTorch.

"auto" takes Triton for CUDA tensors, except where it was measured to lose, and the reference for the rest. "triton"
takes Triton wherever it can run, "reference" never. Set by `use`, or for the whole process by MPDIT_KERNELS. Where
Triton is refused, the reason is logged once under "mpdit_kernels".
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

MODES = ("auto", "triton", "reference")
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
MAX_WIDTH = 8192
"""Widest row that kernels hold in registers."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What every kernel takes."""

_log = logging.getLogger("mpdit_kernels")
_told: set[tuple[str, str]] = set()


def _checked(mode: str, source: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{source} is {mode!r}: choose one of {', '.join(MODES)}")
    return mode


_mode = _checked(os.environ.get("MPDIT_KERNELS") or "auto", "MPDIT_KERNELS")


@contextmanager
def use(mode: str) -> Iterator[None]:
    """Within the block, operations take "auto", "triton" or "reference"; holds for all threads of the process.

    On CPU tensors "triton" needs Triton's interpreter: TRITON_INTERPRET=1 set before triton is imported.

    Raises:
        ValueError: another mode.
    """
    global _mode
    before, _mode = _mode, _checked(mode, "mode")
    try:
        yield
    finally:
        _mode = before


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors."""
    if not TRITON_INSTALLED:
        return False
    from mpdit_kernels import launch

    return launch.INTERPRETING


def takes_triton(operation: str, *tensors: Tensor | None, refusal: str | None = None) -> bool:
    """Decide for one call and, when Triton is refused, log why, once.

    Args:
        operation: name of the public function, which is also its name in the measured tables.
        *tensors: those whose device and dtype matter; the first one's device is the call's.
        refusal: why the operation itself can't serve these shapes, if so.
    """
    if _mode == "reference":
        return False
    reason = _refusal(operation, [x for x in tensors if x is not None]) or refusal
    if reason and not torch.compiler.is_compiling() and (operation, reason) not in _told:
        _told.add((operation, reason))
        # On the CPU the reference is what "auto" means: worth a line for those who ask, no more.
        expected = _mode == "auto" and tensors[0] is not None and tensors[0].device.type == "cpu"
        _log.log(logging.INFO if expected else logging.WARNING, "%s takes its reference: %s", operation, reason)
    return not reason


def _refusal(operation: str, tensors: list[Tensor]) -> str | None:
    device = tensors[0].device
    if not TRITON_INSTALLED:
        return "triton is not installed"
    if device.type == "cpu" and _mode == "auto":
        return "the tensors are on the CPU"
    if device.type == "cpu" and not interpreting():
        return "the tensors are on the CPU and TRITON_INTERPRET=1 was not set before triton was imported"
    if device.type not in ("cpu", "cuda"):
        return f"the tensors are on {device.type}, and the kernels are for CUDA"
    for x in tensors:
        if x.dtype not in FLOATS:
            return f"a tensor is {x.dtype}, and the kernels take {', '.join(map(str, FLOATS))}"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"the GPU is of compute capability {capability[0]}.{capability[1]}, and the kernels need 8.0"
        from mpdit_kernels import launch

        if _mode == "auto" and not launch.wins(operation, capability):
            return f"measured slower on sm_{capability[0]}{capability[1]}, where use('triton') takes it all the same"
    return None
