"""The matrix products, left to cuBLAS. They write into tensors given to them, which autocast leaves alone."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in their own dtype."""
    return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))


def accumulate(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, summed in fp32, out being read and written whole; it has the operands' dtype or is fp32."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out)
    elif not out.is_cuda:  # the interpreter's tensors: no such product on the CPU
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), out=out)
    elif _adds_to_fp32(out.device, a.dtype):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:  # one more pass, and the product is rounded
        out += a @ b


@functools.cache
def _adds_to_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a product of narrow matrices to an fp32 one in place."""
    out, a = torch.zeros(16, 16, device=device), torch.ones(16, 16, dtype=dtype, device=device)
    try:
        torch.addmm(out, a, a, out_dtype=out.dtype, out=out)
    except (RuntimeError, TypeError):
        return False
    return True
