"""The time embedding of one batch."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from mpdit_kernels.cases import Case, Cost, Shape, random
from mpdit_kernels.fno import fno_time_embedding
from mpdit_kernels.fno.reference import GRID, MODES, names

CHANNELS = 32
"""W, as in the presets."""


def shapes(channels: int, width: int, layers: int = 3) -> list[tuple[int, ...]]:
    """Of the weights, in the order of `names`."""
    mixing, point = (channels, channels, MODES), (channels, channels, 1)
    between = [mixing, mixing, point, (channels,)] * layers
    return [(channels, 1), (channels,), *between, (width, channels), (width,)]


def cases(shape: Shape) -> list[Case]:
    """One: it is called once a step."""
    batch, width, sizes = shape.batch, shape.width, shapes(CHANNELS, shape.width)
    every = 4 * sum(math.prod(size) for size in sizes)
    # Bytes of what a pass takes and gives, of what forward keeps for backward, and of what backward's two launches pass
    # on, written and read; not of the tables of cosines, which never change.
    acting = every - 4 * CHANNELS**2 * (2 * MODES - 1)  # of the last layer's frequencies only zero
    biases = 4 * (3 * CHANNELS + width)  # of the layers and of the projection: backward needs none
    ends = 4 * batch * (1 + width)  # t and the result, or its gradient
    kept = 4 * CHANNELS * (batch * (2 * GRID + 2) + GRID + 1)
    passed = 4 * CHANNELS * batch * (2 * GRID + 1)  # d_mixed, d_lifted and d_z
    # Of a sample: two transforms, the middle layer's complex and pointwise mixings, the last layer, the projection.
    # Backward has no product for the pointwise weights' gradients: they are sums of the complex ones'.
    transform, mixing, pointwise = 2 * CHANNELS * GRID * GRID, 8 * MODES * CHANNELS**2, 2 * CHANNELS**2 * GRID
    once, twice = 2 * transform + pointwise, mixing + 2 * CHANNELS**2 + 2 * CHANNELS * width
    table = mixing // 2 + transform  # the first layer's, of the weights alone
    return [
        Case(
            "fno_time_embedding",
            f"{shape.name}, {batch} samples",
            partial(_inputs, batch, sizes),
            _call,
            _launch,
            Cost(ends + acting + kept, flops32=batch * (once + twice) + table),
            Cost(
                ends + acting - biases + kept + 2 * passed + every,
                flops32=batch * (once + 2 * twice) + 2 * table,
            ),
        )
    ]


def _inputs(batch: int, sizes: list[tuple[int, ...]], device: str | torch.device, dtype: torch.dtype) -> list[Tensor]:
    """t, which gets no gradient, and the weights; fp32 whatever the dtype."""
    t = torch.rand(batch, device=device)
    return [t, *((0.2 * random(*size, device=device, grad=False)).requires_grad_() for size in sizes)]


def _call(t: Tensor, *weights: Tensor) -> Tensor:
    return fno_time_embedding(t, dict(zip(names((len(weights) - 4) // 4), weights, strict=True)))


def _launch(t: Tensor, *weights: Tensor) -> None:
    from mpdit_kernels.fno import triton_impl

    out, spectrum, derivative, means, start, slope = triton_impl.forward(t, weights)
    triton_impl.backward(out, t, weights, spectrum, derivative, means, start, slope, of_t=False)
