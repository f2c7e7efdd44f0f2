"""Device functions of the backward that sum over the samples, each owning the gradients that it writes.

Loops run to LIMIT, a power of two of at least B, so that not every batch size compiles its own kernel.
"""

# Kernels are Triton's language, not Python's.
# mypy: disable-error-code="assignment, no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from mpdit_kernels.fno.fourier import fold


@triton.jit
def middle_layer(
    spectrum, d_mixed, d_real1, d_imag1, d_point1, c, o, B, LIMIT: tl.constexpr, W: tl.constexpr,
    BATCH: tl.constexpr, OUT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of the second layer's mixings, from input channel c to OUT output channels from o on."""
    mode, outs = tl.arange(0, 16)[None, None, :], o + tl.arange(0, OUT)
    sum_real = tl.zeros([BATCH, OUT, 16], tl.float32)
    sum_imag = tl.zeros([BATCH, OUT, 16], tl.float32)
    for first in tl.range(0, LIMIT, BATCH, num_stages=STAGES):
        n = (first + tl.arange(0, BATCH)).to(tl.int64)[:, None, None]
        x = spectrum + (n * W + c) * 32 + mode
        y = d_mixed + (n * W + outs[None, :, None]) * 32 + mode
        x_real, x_imag = tl.load(x, mask=n < B, other=0), tl.load(x + 16, mask=n < B, other=0)
        y_real, y_imag = tl.load(y, mask=n < B, other=0), tl.load(y + 16, mask=n < B, other=0)
        # At mode 0 the real part is mode 0's, and the imaginary part sums mode 16.
        crossed = tl.where(mode == 0, 0, x_imag)
        sum_real += x_real * y_real + crossed * y_imag
        sum_imag += tl.where(mode == 0, x_imag, x_real) * y_imag - crossed * y_real
    real, imag = tl.sum(sum_real, 0), tl.sum(sum_imag, 0)
    m = tl.arange(0, 16)[None, :]
    target = (c * W + outs[:, None]) * 16 + m
    tl.store(d_real1 + target, real)
    tl.store(d_imag1 + target, tl.where(m == 0, 0, imag))
    tl.store(d_point1 + outs * W + c, tl.sum(real + tl.where(m == 0, imag, 0), 1))


@triton.jit
def outer_layers(
    t, lift_weight, lift_bias, real0, imag0, point0, tables, means, d_z, d_mixed, d_lifted, d_lift_weight, d_lift_bias,
    d_real0, d_imag0, d_point0, d_bias0, d_bias1, d_real2, d_imag2, d_point2, d_bias2, c, B, LIMIT: tl.constexpr,
    W: tl.constexpr, BATCH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of the first and last layer's mixings from input channel c, of its lift and of every bias's c."""
    o, j, m = tl.arange(0, W)[:, None], tl.arange(0, 32)[None, :], tl.arange(0, 16)[None, :]
    outs = tl.arange(0, W)[None, :]
    sums = tl.zeros([BATCH, W, 32], tl.float32)
    timed = tl.zeros([BATCH, W, 32], tl.float32)
    last = tl.zeros([BATCH, W], tl.float32)
    last_bias = tl.zeros([BATCH, W], tl.float32)
    middle_bias = tl.zeros([BATCH, 1], tl.float32)
    for first in tl.range(0, LIMIT, BATCH, num_stages=STAGES):
        n = (first + tl.arange(0, BATCH)).to(tl.int64)[:, None]
        deep, rows = n[:, :, None], n < B
        lifted = tl.load(d_lifted + (deep * W + o[None]) * 32 + j[None], mask=deep < B, other=0)
        sums += lifted
        timed += tl.load(t + deep, mask=deep < B, other=0) * lifted
        dz = tl.load(d_z + n * W + outs, mask=rows, other=0)
        last += tl.load(means + n * W + c, mask=rows, other=0) * dz
        last_bias += dz
        middle_bias += tl.load(d_mixed + (n * W + c) * 32, mask=rows, other=0)
    d_start, d_slope = tl.sum(sums, 0), tl.sum(tl.sum(timed, 0), 1, keep_dims=True)

    total = tl.sum(d_start, 1, keep_dims=True)
    along = tl.sum(d_start * tl.load(tables + 32 * 32 + j), 1, keep_dims=True) + d_slope
    weight, bias = tl.load(lift_weight + c), tl.load(lift_bias + c)
    mode = tables + tl.arange(0, 32)[:, None] + m * 32
    y_real = tl.dot(d_start, tl.load(mode), input_precision="ieee") * fold(m)
    y_imag = tl.where(m == 0, 0, tl.dot(d_start, tl.load(mode + 512), input_precision="ieee") * fold(m))
    x_real, x_imag = tl.load(tables + 33 * 32 + m), tl.load(tables + 33 * 32 + 16 + m)
    real = x_real * y_real + x_imag * y_imag + tl.where(m == 0, d_slope, 0)
    imag = x_real * y_imag - x_imag * y_real
    target = (c * W + o) * 16 + m
    tl.store(d_real0 + target, weight * real + tl.where(m == 0, bias * total, 0))
    tl.store(d_imag0 + target, weight * tl.where(m == 0, 0, imag))
    tl.store(d_point0 + o * W + c, weight * along + bias * total)
    of_line = tl.sum(tl.load(real0 + target) * real + tl.load(imag0 + target) * imag, 1, keep_dims=True)
    pointwise = tl.load(point0 + o * W + c)
    tl.store(d_lift_weight + c, tl.sum(tl.sum(of_line + pointwise * along, 1), 0))
    of_constant = pointwise + tl.load(real0 + (c * W + o) * 16)
    tl.store(d_lift_bias + c, tl.sum(tl.sum(of_constant * total, 1), 0))

    d_last = tl.sum(last, 0)
    row = c * W + tl.arange(0, W)[:, None]
    tl.store(d_real2 + row * 16 + m, tl.where(m == 0, d_last[:, None], 0))
    tl.store(d_imag2 + row * 16 + m, tl.zeros([W, 16], tl.float32))
    tl.store(d_point2 + tl.arange(0, W) * W + c, d_last)
    tl.store(d_bias0 + o, total, mask=o == c)
    tl.store(d_bias1 + c, tl.sum(tl.sum(middle_bias, 1), 0) * 32)
    tl.store(d_bias2 + outs, tl.sum(last_bias, 0, keep_dims=True), mask=outs == c)


@triton.jit
def projection(
    d_out, z, d_project_weight, d_project_bias, d_out_batch, first, B, LIMIT: tl.constexpr, D: tl.constexpr,
    W: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of ROWS rows of the projection, from row `first` on."""
    d, p = first + tl.arange(0, ROWS)[:, None], tl.arange(0, W)[None, :]
    weight = tl.zeros([ROWS, W], tl.float32)
    bias = tl.zeros([ROWS, 32], tl.float32)
    for start in tl.range(0, LIMIT, 32, num_stages=STAGES):
        samples = (start + tl.arange(0, 32)).to(tl.int64)
        n, across = samples[:, None], samples[None, :]
        gradient = tl.load(d_out + across * d_out_batch + d, mask=(d < D) & (across < B), other=0)
        weight = tl.dot(gradient, tl.load(z + n * W + p, mask=n < B, other=0), acc=weight, input_precision="ieee")
        bias += gradient
    tl.store(d_project_weight + d * W + p, weight, mask=d < D)
    tl.store(d_project_bias + d, tl.sum(bias, 1, keep_dims=True), mask=d < D)
