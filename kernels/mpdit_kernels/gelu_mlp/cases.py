"""The MLP of one block at each stage's number of tokens."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mpdit_kernels.cases import Case, Cost, Shape, random
from mpdit_kernels.gelu_mlp import gelu_linear

RATIO = 4
"""Hidden width in widths of the block."""


def cases(shape: Shape) -> list[Case]:
    """The MLP at every stage."""
    found = []
    for tokens in shape.tokens:
        rows, width, hidden = shape.batch * tokens, shape.width, RATIO * shape.width
        outer, inner = 2 * rows * width, 2 * rows * hidden  # bytes of [tokens, D] and [tokens, H] in bf16
        weights = 2 * (2 * width * hidden + width + hidden)
        product = 2 * rows * width * hidden
        # Forward: x and weights read; h written; a, which two products pass on, written and read; y written.
        # Backward: dy, x, h and weights read; dh and a written and read; dx and the weights' gradients written.
        forward = Cost(2 * outer + weights + 3 * inner, 2 * product)
        backward = Cost(3 * outer + 2 * weights + 5 * inner, 4 * product)
        inputs = partial(_inputs, shape.batch, tokens, width)
        label = f"{shape.name}, {tokens} tokens"
        found.append(Case("gelu_linear", label, inputs, gelu_linear, _launch, forward, backward))
    return found


def _inputs(batch: int, tokens: int, width: int, device: str | torch.device, dtype: torch.dtype) -> list[Tensor]:
    """x, and weights that keep the sizes of values, as trained ones roughly do."""
    hidden = RATIO * width
    x = random(batch, tokens, width, device=device, dtype=dtype)
    shapes = ((hidden, width), (hidden,), (width, hidden), (width,))
    weights = [random(*shape, device=device, dtype=dtype, grad=False) * shape[-1] ** -0.5 for shape in shapes]
    return [x, *(weight.requires_grad_() for weight in weights)]


@torch.no_grad()
def _launch(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> None:
    """Both methods, so that both are compiled and tuned; the one asked for where a method is overridden."""
    from mpdit_kernels.gelu_mlp import triton_impl

    choices = (triton_impl.FORWARD_METHOD, triton_impl.BACKWARD_METHOD)
    one = any(choice.overridden for choice in choices)
    for method in (None,) if one else triton_impl.METHODS:
        y, hidden = triton_impl.forward(x, weight1, bias1, weight2, bias2, True, method)
        assert hidden is not None
        triton_impl.backward(y, x, weight1, weight2, hidden, [True] * 5, method)
    for choice in choices:  # asked for last: the tuner turns to the methods when their kernels are tuned
        choice.pick(width=x.shape[-1], hidden=weight1.shape[0])
