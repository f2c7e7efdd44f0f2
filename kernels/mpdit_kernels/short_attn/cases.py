"""Attention of one block at each stage's number of tokens, and of the last block, whose class tokens ask nothing."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mpdit_kernels.backends import attention
from mpdit_kernels.cases import Case, Cost, Shape, random


def cases(shape: Shape) -> list[Case]:
    """At every stage, and once more at the last.

    The call is `attention`, whose choice without our kernels is the opponent: the fastest library where a table says,
    else the first in the default order. `python -m mpdit_kernels.backends --measure` has all of them.
    """
    found = []
    for tokens, first_query in [*((tokens, 0) for tokens in shape.tokens), (shape.tokens[-1], shape.prefix)]:
        size = (shape.batch, tokens, 3, shape.heads, shape.width // shape.heads)
        asked = tokens - first_query
        row = 2 * shape.batch * shape.width  # bytes of one token of all sequences in bf16
        product = 2 * shape.batch * tokens * asked * shape.width
        # Forward reads queries, keys and values, and writes the result; backward reads these and a gradient, and writes
        # the whole gradient.
        forward = Cost(row * (2 * tokens + 2 * asked), 2 * product)
        backward = Cost(row * (2 * tokens + 2 * asked + 3 * tokens), 5 * product)
        label = f"{shape.name}, {tokens} tokens" + (f", queries from {first_query}" if first_query else "")
        inputs = partial(_inputs, size)
        call, launch = partial(attention, first_query=first_query), partial(_launch, first_query=first_query)
        found.append(Case("short_attention", label, inputs, call, launch, forward, backward))
    return found


def _inputs(size: tuple[int, ...], device: str | torch.device, dtype: torch.dtype) -> list[Tensor]:
    return [random(*size, device=device, dtype=dtype)]


@torch.no_grad()
def _launch(qkv: Tensor, first_query: int) -> None:
    from mpdit_kernels.short_attn import triton_impl

    scale = qkv.shape[-1] ** -0.5
    out, logs = triton_impl.forward(qkv, None, [], scale, first_query)
    triton_impl.backward(out, qkv, out, logs, None, [], scale, first_query)
