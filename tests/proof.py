"""How a kernel is proved: its error against float64 is at most twice that of PyTorch in the same dtype.

On a machine with a GPU the kernels run on it; elsewhere in Triton's interpreter, on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mpdit_kernels
import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NIGHT = [pytest.mark.slow] if DEVICE == "cpu" else []
"""Marks cases that the interpreter takes long for, left to `make nightly`; on a GPU they run with the others."""

DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=NIGHT)]
"""What kernels are proved in."""
MOSTLY_FP32 = [torch.float32, *(pytest.param(dtype, marks=NIGHT) for dtype in (torch.bfloat16, torch.float16))]
"""The same where another test by day proves a kernel in bf16."""

FLOOR = 8
"""Roundings of the result's own dtype that are always allowed: PyTorch can be exact by luck on small shapes."""


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Fresh normal values on DEVICE that get a gradient."""
    return torch.randn(*shape, device=DEVICE, dtype=dtype).requires_grad_()


def strided(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same with neighbouring columns apart in memory and rows with gaps between them."""
    wide = torch.randn(*shape[:-1], 2 * shape[-1] + 3, device=DEVICE, dtype=dtype)
    return wide[..., 1 : 2 * shape[-1] : 2].detach().requires_grad_()


def prove(call: Callable[..., Any], inputs: Sequence[Any], noncontiguous_gradients: bool = False) -> None:
    """Compare outputs and all gradients of call(*inputs) by the kernels with the reference and with float64.

    Memory that the kernels allocate is filled with NaN before they write it.
    """
    truth, gradients = _run(call, [_double(value) for value in inputs], "reference", None, False)
    usual, _ = _run(call, inputs, "reference", gradients, False)
    with _poisoned_memory():
        ours, _ = _run(call, inputs, "triton", gradients, noncontiguous_gradients)
    assert len(ours) == len(usual) == len(truth)
    for index, (mine, theirs, exact) in enumerate(zip(ours, usual, truth, strict=True)):
        assert (mine is None) == (exact is None), f"tensor {index}: {mine} where float64 gives {exact}"
        if mine is None or exact is None or theirs is None:
            continue
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype, f"tensor {index}"
        error, allowed = distance(mine, exact), 2 * distance(theirs, exact) + FLOOR * torch.finfo(mine.dtype).eps
        assert error <= allowed, f"tensor {index}: error {error:.3g} against float64, allowed {allowed:.3g}"


def distance(x: Tensor, exact: Tensor) -> float:
    """|x - exact| / |exact| in the Euclidean norm; a NaN in x gives NaN, which passes no comparison."""
    return float((x.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30))


def _double(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def _run(
    call: Callable[..., Any], inputs: Sequence[Any], mode: str, gradients: list[Tensor] | None, spread: bool
) -> tuple[list[Tensor | None], list[Tensor]]:
    """Outputs, then the gradients of the inputs that get one; and the outputs' gradients, drawn unless given."""
    with mpdit_kernels.use(mode):
        result = call(*inputs)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    if gradients is None:
        gradients = [torch.randn_like(out) for out in outputs]
    incoming = [g.to(out.dtype) for g, out in zip(gradients, outputs, strict=True)]
    if spread:
        incoming = [torch.stack([g, g], dim=-1)[..., 0] for g in incoming]
    wanted = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
    with mpdit_kernels.use(mode):
        found = torch.autograd.grad(outputs, wanted, incoming, allow_unused=True) if wanted else ()
    return [out.detach() for out in outputs] + list(found), gradients


class _poisoned_memory:
    """torch fills new memory with NaN while algorithms are deterministic."""

    def __enter__(self) -> None:
        self.before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(self.before)
