"""The modulated norms and gated residuals of one block, at each stage's number of tokens."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mpdit_kernels.adaln import adaln_modulate, gated_residual, gated_residual_adaln
from mpdit_kernels.cases import Case, Cost, Shape, random


def cases(shape: Shape) -> list[Case]:
    """The three functions at every stage."""
    found: list[Case] = []
    for tokens in shape.tokens:
        size, label = (shape.batch, tokens, shape.width), f"{shape.name}, {tokens} tokens"
        x, vector = 2 * shape.batch * tokens * shape.width, 4 * shape.batch * shape.width  # bytes of each
        adaln = partial(_inputs, size, branch=False, vectors=2)
        residual = partial(_inputs, size, branch=True, vectors=1)
        both = partial(_inputs, size, branch=True, vectors=3)
        # Backward: the norm reads x, dy and writes dx; the residual reads dresidual and branch, and writes dbranch.
        for function, inputs, launch, forward, backward in (
            (adaln_modulate, adaln, _adaln, 2 * x + 2 * vector, 3 * x + 3 * vector),
            (gated_residual, residual, _residual, 3 * x + vector, 3 * x + 2 * vector),
            (gated_residual_adaln, both, _both, 4 * x + 3 * vector, 6 * x + 5 * vector),
        ):
            name = function.__name__
            found.append(Case(name, label, inputs, function, launch, Cost(forward), Cost(backward)))
    return found


def _inputs(
    size: tuple[int, int, int], device: str | torch.device, dtype: torch.dtype, *, branch: bool, vectors: int
) -> list[Tensor]:
    """x, perhaps a branch, and vectors that are slices of one modulation [B, 6D], as in the model."""
    batch, _, width = size
    tokens = [random(*size, device=device, dtype=dtype) for _ in range(1 + branch)]
    modulation = random(batch, 6 * width, device=device, grad=False).chunk(6, dim=-1)
    return [*tokens, *(vector.requires_grad_() for vector in modulation[:vectors])]


def _adaln(x: Tensor, shift: Tensor, scale: Tensor) -> None:
    from mpdit_kernels.adaln import triton_impl

    _, y, statistics = triton_impl.forward(x, None, None, shift, scale, 1e-6, x.dtype)
    triton_impl.backward(None, y, x, None, None, scale, statistics)


def _residual(x: Tensor, branch: Tensor, gate: Tensor) -> None:
    from mpdit_kernels.adaln import triton_impl

    residual, _, _ = triton_impl.forward(x, branch, gate, None, None, 0.0, x.dtype)
    triton_impl.backward(residual, None, x, branch, gate, None, None)


def _both(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> None:
    from mpdit_kernels.adaln import triton_impl

    residual, y, statistics = triton_impl.forward(x, branch, gate, shift, scale, 1e-6, x.dtype)
    assert residual is not None
    triton_impl.backward(residual, y, residual, branch, gate, scale, statistics)
