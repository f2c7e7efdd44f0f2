"""The Upsample block between the two stages, with the skip and the positions as in the model."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mpdit_kernels.cases import Case, Cost, Shape, random
from mpdit_kernels.upsample.op import upsample_tokens


def cases(shape: Shape) -> list[Case]:
    """One call a step."""
    width, values = shape.width, shape.channels * shape.patch**2
    coarse, fine = (grid * grid for grid in shape.grids)
    factor = shape.grids[1] // shape.grids[0]
    # Elements of x, of tokens before GELU (class tokens are in x), and of tokens of the result.
    x = shape.batch * (shape.prefix + coarse) * width
    image = shape.batch * fine * width
    tokens = shape.batch * (shape.prefix + fine) * width
    patches = shape.batch * fine * values
    expand, refine = factor**2 * width * width, width * (width + values)
    weights, table = 2 * (expand + refine), 4 * fine * width
    # Every tensor once where it is an argument or a result, and twice (written, read) where it has to be in memory
    # between the products: before and after the kernel, here and on the way back. bf16, the result and positions fp32.
    #
    # What the implementation moves beyond that, at XL: the kernel writes the whole result, biases and positions, and
    # the product reads and writes it again, 8 * tokens = 321 MB over the 511 of `forward`. This is because cuBLAS adds
    # a product to a matrix in memory, and has no epilogue for positions. The alternative is a product in bf16 and a
    # kernel that adds: 4 * tokens = 160 MB over (as much as now where the result is bf16), and one more rounding. To be
    # decided by measurement. Smaller: image tokens of x copied (38 MB), and weights laid out again (27 MB). On the way
    # back, over the 783 of `backward`: d_out written as bf16 and read so by both products, 6 * tokens = 241 MB.
    forward = 2 * x + 4 * image + 4 * tokens + 2 * patches + 4 * tokens + weights + table
    # d_out, tokens before GELU and normalised again, the gradients of both, x and its gradient, weights and theirs.
    backward = 4 * tokens + 2 * image + 4 * tokens + 4 * tokens + 4 * image + 4 * x + 2 * patches + 2 * weights
    product = 2 * shape.batch * (coarse * expand + (shape.prefix + fine) * width * width)
    skip = 2 * shape.batch * fine * values * width
    return [
        Case(
            "upsample_tokens",
            f"{shape.name}, {shape.tokens[0]} to {shape.tokens[1]} tokens",
            partial(_inputs, shape, factor, values),
            partial(_call, shape.prefix, factor),
            partial(_launch, shape.prefix, factor),
            Cost(forward, product + skip),
            Cost(backward, 2 * product + skip),
        )
    ]


def _inputs(shape: Shape, factor: int, values: int, device: str | torch.device, dtype: torch.dtype) -> list[Tensor]:
    """x, weights and biases, patches, the skip's weight and bias, and a position table without gradient."""
    width, (coarse, fine) = shape.width, shape.grids
    make = partial(random, device=device, dtype=dtype)

    def matrix(rows: int, *columns: int) -> Tensor:
        return (make(rows, *columns, grad=False) * width**-0.5).requires_grad_()

    return [
        make(shape.batch, shape.prefix + coarse**2, width),
        matrix(width * factor**2, width),
        matrix(width * factor**2),
        matrix(width, width),
        matrix(width),
        make(shape.batch, fine**2, values, grad=False),
        matrix(width, values),
        matrix(width),
        random(fine**2, width, device=device, grad=False),
    ]


def _call(prefix: int, factor: int, *inputs: Any) -> Tensor:
    x, expand_weight, expand_bias, refine_weight, refine_bias, *skip, position = inputs
    weights = (expand_weight, expand_bias, refine_weight, refine_bias)
    return upsample_tokens(x, *weights, prefix, factor, tuple(skip), position)


def _launch(prefix: int, factor: int, *inputs: Any) -> None:
    from mpdit_kernels.upsample import triton_impl

    x, expand_weight, expand_bias, refine_weight, refine_bias, patches, skip_weight, skip_bias, position = inputs
    sizes = [prefix, factor, *[int((x.shape[1] - prefix) ** 0.5)] * 2]
    refine = torch.cat([refine_weight, skip_weight], dim=1).detach()  # of a multiple of 8 columns
    expand = expand_weight.detach()  # its rows' order makes no difference to a launch
    arguments = (x.detach(), expand, expand_bias.detach(), refine, refine_bias, patches, skip_bias, position)
    out, before, image = triton_impl.forward(*arguments, sizes, 1e-6, torch.float32)
    asked = [True] * 5 + [False, True, False]
    triton_impl.backward(out, before, image, expand, refine, patches, sizes, 1e-6, x.dtype, asked)
