"""A block's elementwise work as one case: what lies between its products, for the tuner to time as a whole.

Two residuals with their modulated norms, and GELU. Each starts from given tensors, as a product or attention lies
between any two of them: nothing can be fused across. Bias gradients are left to the products on all sides.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu

from mpdit_kernels.adaln import gated_residual_adaln
from mpdit_kernels.cases import Case, Cost, Shape, random
from mpdit_kernels.dispatch import takes_triton
from mpdit_kernels.gelu_mlp.cases import RATIO


def cases(shape: Shape) -> list[Case]:
    """One at every stage."""
    found = []
    for tokens in shape.tokens:
        x, vector = 2 * shape.batch * tokens * shape.width, 4 * shape.batch * shape.width  # bytes of each
        hidden = RATIO * x
        # Backward of GELU reads its argument and a gradient, and writes one and, not having been kept, the activation.
        forward, backward = 2 * (4 * x + 3 * vector) + 2 * hidden, 2 * (6 * x + 5 * vector) + 4 * hidden
        inputs = partial(_inputs, shape.batch, tokens, shape.width)
        label = f"{shape.name}, {tokens} tokens"
        found.append(Case("block", label, inputs, _call, _launch, Cost(forward), Cost(backward), composed=True))
    return found


def _inputs(batch: int, tokens: int, width: int, device: str | torch.device, dtype: torch.dtype) -> list[Tensor]:
    """(x, branch) before attention and before the MLP, GELU's argument, and six slices of one modulation [B, 6D]."""
    wide = [random(batch, tokens, width, device=device, dtype=dtype) for _ in range(4)]
    hidden = random(batch, tokens, RATIO * width, device=device, dtype=dtype)
    modulation = random(batch, 6 * width, device=device, grad=False).chunk(6, dim=-1)
    return [*wide, hidden, *(vector.requires_grad_() for vector in modulation)]


def _call(x1: Tensor, branch1: Tensor, x2: Tensor, branch2: Tensor, hidden: Tensor, *modulation: Tensor) -> Any:
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation
    attention = gated_residual_adaln(x1, branch1, gate2, shift1, scale1)
    mlp = gated_residual_adaln(x2, branch2, gate1, shift2, scale2)
    if takes_triton("gelu_linear", hidden):
        return *attention, *mlp, _Activation.apply(hidden)
    return *attention, *mlp, gelu(hidden, approximate="tanh")


class _Activation(torch.autograd.Function):
    """The passes of gelu_linear without its products."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        from mpdit_kernels.gelu_mlp import triton_impl

        ctx.save_for_backward(hidden)
        return triton_impl._activation(hidden, torch.empty_like(hidden))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (hidden,) = ctx.saved_tensors
        return _gradient(gradients[0], hidden).view(hidden.shape)


def _gradient(gradient: Tensor, hidden: Tensor) -> Tensor:
    from mpdit_kernels.gelu_mlp import triton_impl

    rows = hidden.view(-1, hidden.shape[-1])
    return triton_impl._gradient(gradient.reshape(rows.shape), None, rows, True, False, None)[0]


@torch.no_grad()
def _launch(x1: Tensor, branch1: Tensor, x2: Tensor, branch2: Tensor, hidden: Tensor, *modulation: Tensor) -> None:
    from mpdit_kernels.adaln import triton_impl as adaln
    from mpdit_kernels.gelu_mlp import triton_impl as gelu_mlp

    shift1, scale1, gate1, shift2, scale2, gate2 = modulation
    for x, branch, gate, shift, scale in ((x1, branch1, gate2, shift1, scale1), (x2, branch2, gate1, shift2, scale2)):
        residual, y, statistics = adaln.forward(x, branch, gate, shift, scale, 1e-6, x.dtype)
        assert residual is not None
        adaln.backward(residual, y, residual, branch, gate, scale, statistics)
    activation = gelu_mlp._activation(hidden, torch.empty_like(hidden))
    _gradient(activation, hidden)
