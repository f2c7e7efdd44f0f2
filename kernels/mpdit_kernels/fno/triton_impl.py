"""Kernels of the time embedding: one launch forward, two backward. All is fp32; products on tiles are "ieee".

Forward, one program per sample: the table of the first layer (made anew by every program, from weights that the L2
cache holds), GELU, transform, the middle layer's mixing and back, GELU, mean, last layer, projection.

Backward, first one program per sample for the gradients of its signals, then programs that sum over samples, each
owning the weights' gradients it writes: no atomics, no partial sums. Without atomics one launch would need every
program that sums to repeat all samples' work, of which the product with the projection alone, 2*B*D*W FLOP, takes one
multiprocessor 21 us by count (XL, fp32 outside of tensor cores, H200).

A spectrum is 32 numbers, the real parts of modes 0 to 15 and then the imaginary ones. Mode 0 has no imaginary part; its
place holds mode 16, which only a layer's pointwise mixing passes on: so all gradients of a layer come from spectra.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpdit_kernels.fno import reference
from mpdit_kernels.launch import Config, Tunable, launch
from mpdit_kernels.rows import rows_of


def _default(channels: int) -> Config:
    return {"BLOCK": 256 // channels, "ROWS": 128, "STAGES": 3, "num_warps": 8, "num_stages": 1}


def _candidates(channels: int) -> list[Config]:
    return [
        {"BLOCK": block, "ROWS": rows, "STAGES": stages, "num_warps": warps, "num_stages": 1}
        for warps in (4, 8, 16)
        for block in (2, 4, 8, 16)
        for rows in (64, 128)
        for stages in (2, 3)
        if 16 * warps <= block * channels <= min(32 * warps, 256)
    ]


FORWARD = Tunable("fno.forward", _default, _candidates)
BACKWARD_SAMPLES = Tunable("fno.backward_samples", _default, _candidates)
BACKWARD_WEIGHTS = Tunable(
    "fno.backward_weights",
    lambda channels: {
        "BATCH": 256 // channels, "OUT": 16, "ROWS": 32, "STAGES": 3, "num_warps": 8, "num_stages": 1,
    },
    lambda channels: [
        {"BATCH": batch, "OUT": out, "ROWS": 32, "STAGES": stages, "num_warps": warps, "num_stages": 1}
        for warps in (4, 8)
        for batch in (4, 8, 16)
        for out in (16, 32, 64)
        for stages in (2, 3)
        if out <= channels and 16 * warps <= batch * channels <= 64 * warps
    ],
)  # fmt: skip


@reference.per_device
def make_tables() -> tuple[Tensor, ...]:
    """Return [34, 32]: each mode's cosines and negative sines over the grid, as in spectra; the grid; its spectrum."""
    analysis, _ = reference.fourier_matrices()
    basis = analysis.permute(1, 2, 0).reshape(32, 32).float()
    grid = torch.linspace(-1, 1, reference.GRID, dtype=torch.float32, device="cpu")
    of_grid = (basis.double() @ grid.double()).float()
    basis[reference.MODES] = 1 - 2.0 * (torch.arange(reference.GRID, device="cpu") % 2)
    return (torch.cat([basis, grid[None], of_grid[None]]),)


@triton.jit
def gelu(x):
    """The exact GELU and its derivative."""
    below = 0.5 * (1 + tl.math.erf(x * 0.7071067811865476))
    return x * below, below + x * (tl.exp(-0.5 * x * x) * 0.3989422804014327)


@triton.jit
def transform(x, tables):
    """Spectra of signals x [W, 32], mode 16 included."""
    basis = tl.load(tables + tl.arange(0, 32)[None, :] * 32 + tl.arange(0, 32)[:, None])
    return tl.dot(x, basis, input_precision="ieee")


@triton.jit
def on_grid(real, imag, tables):
    """Signals [W, 32]: the sum of cosines weighed by real and negative sines weighed by imag [W, 16], modes 0 to 15."""
    mode = tl.arange(0, 16)[:, None]
    table = tables + mode * 32 + tl.arange(0, 32)[None, :]
    signals = tl.dot(real, tl.load(table), input_precision="ieee")
    return tl.dot(imag, tl.load(table + 512, mask=mode > 0, other=0), acc=signals, input_precision="ieee")


@triton.jit
def fold(slot):
    """The weight of each of a spectrum's numbers in the inverse DFT."""
    return tl.where(slot % 16 == 0, 0.03125, 0.0625)


@triton.jit
def mix(
    spectrum, real, imag, SUMMED: tl.constexpr, KEPT: tl.constexpr, SIGN: tl.constexpr, W: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Real and imaginary parts [W, 16] of a complex W x W mixing, for each mode, of the spectrum [W, 32] in memory.

    SUMMED and KEPT are the steps in memory between channels that are summed over and between those of the result;
    SIGN = -1 takes the conjugate weights.
    """
    channel, mode = tl.arange(0, BLOCK)[:, None, None], tl.arange(0, 16)[None, None, :]
    weight = channel * SUMMED + tl.arange(0, W)[None, :, None] * KEPT + mode
    sum_real = tl.zeros([BLOCK, W, 16], tl.float32)
    sum_imag = tl.zeros([BLOCK, W, 16], tl.float32)
    for first in tl.range(0, W, BLOCK, num_stages=STAGES):
        x_real = tl.load(spectrum + (first + channel) * 32 + mode)
        x_imag = tl.where(mode == 0, 0, tl.load(spectrum + (first + channel) * 32 + 16 + mode))
        w_real = tl.load(real + first * SUMMED + weight)
        w_imag = tl.load(imag + first * SUMMED + weight) * SIGN
        sum_real += x_real * w_real - x_imag * w_imag
        sum_imag += x_real * w_imag + x_imag * w_real
    return tl.sum(sum_real, 0), tl.sum(sum_imag, 0)


@triton.jit
def first_layer(
    lift_weight, lift_bias, real, imag, point, bias, tables, W: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The first layer at t = 0, [W, 32], and what one more t adds, [W, 1]."""
    channel, mode = tl.arange(0, BLOCK)[:, None, None], tl.arange(0, 16)[None, None, :]
    weight = (channel * W + tl.arange(0, W)[None, :, None]) * 16 + mode
    sum_real = tl.zeros([BLOCK, W, 16], tl.float32)
    sum_imag = tl.zeros([BLOCK, W, 16], tl.float32)
    for first in tl.range(0, W, BLOCK, num_stages=STAGES):
        lifted = tl.load(lift_weight + first + channel)
        sum_real += lifted * tl.load(real + first * W * 16 + weight)
        sum_imag += lifted * tl.load(imag + first * W * 16 + weight)
    real_sum, imag_sum = tl.sum(sum_real, 0), tl.sum(sum_imag, 0)
    o, c = tl.arange(0, W)[:, None], tl.arange(0, W)[None, :]
    pointwise = tl.load(point + o * W + c)
    of_constant = pointwise + tl.load(real + (c * W + o) * 16)
    along = tl.sum(pointwise * tl.load(lift_weight + c), 1, keep_dims=True)
    level = tl.sum(of_constant * tl.load(lift_bias + c), 1, keep_dims=True) + tl.load(bias + o)
    m = tl.arange(0, 16)[None, :]
    grid_real, grid_imag = tl.load(tables + 33 * 32 + m) * fold(m), tl.load(tables + 33 * 32 + 16 + m) * fold(m)
    spectral = on_grid(grid_real * real_sum - grid_imag * imag_sum, grid_real * imag_sum + grid_imag * real_sum, tables)
    grid = tl.load(tables + 32 * 32 + tl.arange(0, 32)[None, :])
    slope = along + tl.sum(tl.where(m == 0, real_sum, 0), 1, keep_dims=True)
    return spectral + along * grid + level, slope


@triton.jit
def _forward(
    t, lift_weight, lift_bias, real0, imag0, point0, bias0, real1, imag1, point1, bias1, real2, point2, bias2,
    project_weight, project_bias,  # the inputs
    tables,  # [34, 32], as make_tables gives it
    out,  # [B, D]
    spectrum,  # out [B, W, 32]: of the first layer's signals after GELU
    derivative,  # out [B, W, 32]: of GELU, where the second layer's signals meet it
    means,  # out [2, B, W]: the last layer's input and output
    start,  # out [W, 32]: the first layer at t = 0, before GELU
    slope,  # out [W]: what one more t adds to it
    D: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    tl.static_assert(W % BLOCK == 0)
    b = tl.program_id(0).to(tl.int64)
    o, j = tl.arange(0, W)[:, None], tl.arange(0, 32)[None, :]
    at_zero, steep = first_layer(lift_weight, lift_bias, real0, imag0, point0, bias0, tables, W, BLOCK, STAGES)
    if tl.program_id(0) == 0:
        tl.store(start + o * 32 + j, at_zero)
        tl.store(slope + o, steep)
    x, _ = gelu(at_zero + tl.load(t + b) * steep)
    signal = (b * W + o) * 32 + j
    tl.store(spectrum + signal, transform(x, tables))
    tl.debug_barrier()  # the mixing reads what other threads of this program stored
    real, imag = mix(spectrum + b * W * 32, real1, imag1, W * 16, 16, 1, W, BLOCK, STAGES)
    folds = fold(tl.arange(0, 16)[None, :])
    x = tl.dot(tl.load(point1 + o * W + tl.arange(0, W)[None, :]), x, input_precision="ieee")
    x, slant = gelu(x + on_grid(real * folds, imag * folds, tables) + tl.load(bias1 + o))
    tl.store(derivative + signal, slant)
    mean = tl.sum(x, 1, keep_dims=True) * 0.03125
    tl.store(means + b * W + o, mean)
    p = tl.arange(0, W)[None, :]
    last = tl.load(real2 + (o * W + p) * 16) + tl.load(point2 + p * W + o)
    z = tl.sum(mean * last, 0, keep_dims=True) + tl.load(bias2 + p)
    tl.store(means + (tl.num_programs(0).to(tl.int64) + b) * W + p, z)
    for first in tl.range(0, D, ROWS, num_stages=STAGES):
        d = first + tl.arange(0, ROWS)
        weight = tl.load(project_weight + d[:, None] * W + p, mask=d[:, None] < D, other=0)
        y = tl.sum(weight * z, 1) + tl.load(project_bias + d, mask=d < D, other=0)
        tl.store(out + b * D + d, y, mask=d < D)


@triton.jit
def _backward_samples(
    d_out,  # [B, D], rows d_out_batch apart
    t, real1, imag1, point1, real2, point2, project_weight,  # inputs of the forward
    derivative, start, slope,  # outputs of the forward
    tables,
    d_t,  # out [B], where TIME
    d_z,  # out [B, W]: gradient of the last layer's output
    d_mixed,  # out [B, W, 32]: spectrum of the gradient of the second layer's output, weighed by fold
    d_lifted,  # out [B, W, 32]: gradient of the first layer's output
    d_out_batch,
    D: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    TIME: tl.constexpr,
):  # fmt: skip
    tl.static_assert(W % BLOCK == 0)
    b = tl.program_id(0).to(tl.int64)
    o, p, j = tl.arange(0, W)[:, None], tl.arange(0, W)[None, :], tl.arange(0, 32)[None, :]
    products = tl.zeros([ROWS, W], tl.float32)
    for first in tl.range(0, D, ROWS, num_stages=STAGES):
        d = first + tl.arange(0, ROWS)[:, None]
        gradient = tl.load(d_out + b * d_out_batch + d, mask=d < D, other=0)
        products += gradient * tl.load(project_weight + d * W + p, mask=d < D, other=0)
    dz = tl.sum(products, 0, keep_dims=True)
    tl.store(d_z + b * W + p, dz)
    last = tl.load(real2 + (o * W + p) * 16) + tl.load(point2 + p * W + o)
    d_mean = tl.sum(last * dz, 1, keep_dims=True)
    signal = (b * W + o) * 32 + j
    mixed = tl.load(derivative + signal) * (d_mean * 0.03125)
    tl.store(d_mixed + signal, transform(mixed, tables) * fold(j))
    tl.debug_barrier()  # the mixing reads what other threads of this program stored
    real, imag = mix(d_mixed + b * W * 32, real1, imag1, 16, W * 16, -1, W, BLOCK, STAGES)
    back = tl.dot(tl.load(point1 + p * W + o), mixed, input_precision="ieee") + on_grid(real, imag, tables)
    steep = tl.load(slope + o)
    _, slant = gelu(tl.load(start + o * 32 + j) + tl.load(t + b) * steep)
    lifted = back * slant
    tl.store(d_lifted + signal, lifted)
    if TIME:
        tl.store(d_t + b, tl.sum(tl.sum(lifted * steep, 1), 0))


# Device functions of the backward that sum over the samples, each owning the gradients that it writes. Loops run to
# LIMIT, a power of two of at least B, so that not every batch size compiles its own kernel.


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


@triton.jit
def _backward_weights(
    d_out,  # [B, D], rows d_out_batch apart
    t, lift_weight, lift_bias, real0, imag0, point0,  # inputs of the forward
    spectrum, means,  # outputs of the forward
    tables,
    d_z, d_mixed, d_lifted,  # outputs of _backward_samples
    d_lift_weight, d_lift_bias, d_real0, d_imag0, d_point0, d_bias0, d_real1, d_imag1, d_point1, d_bias1, d_real2,
    d_imag2, d_point2, d_bias2, d_project_weight, d_project_bias,  # out, each as its weight
    d_out_batch,
    B,
    LIMIT: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    BATCH: tl.constexpr,
    OUT: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    tl.static_assert(W % OUT == 0)
    program = tl.program_id(0)
    if program < W:
        outer_layers(
            t, lift_weight, lift_bias, real0, imag0, point0, tables, means, d_z, d_mixed, d_lifted, d_lift_weight,
            d_lift_bias, d_real0, d_imag0, d_point0, d_bias0, d_bias1, d_real2, d_imag2, d_point2, d_bias2, program, B,
            LIMIT, W, BATCH, STAGES,
        )  # fmt: skip
    elif program < W + W * (W // OUT):
        part = program - W
        out = part % (W // OUT) * OUT
        middle_layer(
            spectrum, d_mixed, d_real1, d_imag1, d_point1, part // (W // OUT), out, B, LIMIT, W, BATCH, OUT, STAGES
        )
    else:
        z = means + B * W
        row = (program - W - W * (W // OUT)) * ROWS
        projection(d_out, z, d_project_weight, d_project_bias, d_out_batch, row, B, LIMIT, D, W, ROWS, STAGES)


def forward(t: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (out [B, D], spectrum and derivative [B, W, 32], means [2, B, W], start [W, 32], slope [W]), all fp32."""
    t, weights = t.contiguous(), [value.contiguous() for value in weights]
    batch, channels, width = t.shape[0], weights[0].shape[0], weights[-1].shape[0]
    per_sample = (batch, channels, reference.GRID)
    shapes = ((batch, width), per_sample, per_sample, (2, batch, channels), (channels, reference.GRID), (channels,))
    allocate = torch.empty if batch else torch.zeros  # without samples nothing runs that writes start and slope
    outputs = [allocate(shape, dtype=torch.float32, device=t.device) for shape in shapes]
    config = FORWARD.pick(channels=channels)
    tables = make_tables(t.device, torch.float32)
    acting = [value for name, value in zip(reference.names(3), weights, strict=True) if name != "conv2.weights_imag"]
    launch(_forward, (batch,), t, *acting, *tables, *outputs, D=width, W=channels, **config)
    return tuple(outputs)  # type: ignore[return-value]


def backward(
    d_out: Tensor,
    t: Tensor,
    weights: Sequence[Tensor],
    spectrum: Tensor,
    derivative: Tensor,
    means: Tensor,
    start: Tensor,
    slope: Tensor,
    of_t: bool = True,
    of_weights: bool = True,
) -> list[Tensor | None]:
    """Return gradients of t and of the weights, fp32, from what the forward returned; None where not asked for."""
    d_out, t, weights = rows_of(d_out), t.contiguous(), [value.contiguous() for value in weights]
    batch, channels, width = t.shape[0], weights[0].shape[0], weights[-1].shape[0]
    d_t = torch.empty_like(t) if of_t else None
    d_z, d_mixed, d_lifted = torch.empty_like(means[0]), torch.empty_like(spectrum), torch.empty_like(spectrum)
    lift_weight, lift_bias, real0, imag0, point0, _, real1, imag1, point1, _, real2, _, point2, _, project, _ = weights
    tables = make_tables(t.device, torch.float32)
    launch(
        _backward_samples,
        (batch,),
        *(d_out, t, real1, imag1, point1, real2, point2, project, derivative, start, slope, *tables),
        *(d_t, d_z, d_mixed, d_lifted, d_out.stride(0)),
        D=width,
        W=channels,
        TIME=of_t,
        **BACKWARD_SAMPLES.pick(channels=channels),
    )
    if not of_weights:
        return [d_t, *(None for _ in weights)]
    gradients = [torch.empty_like(value) for value in weights]
    config = BACKWARD_WEIGHTS.pick(channels=channels)
    programs = channels + channels * (channels // config["OUT"]) + triton.cdiv(width, config["ROWS"])
    launch(
        _backward_weights,
        (programs,),
        *(d_out, t, lift_weight, lift_bias, real0, imag0, point0, spectrum, means, *tables, d_z, d_mixed, d_lifted),
        *(*gradients, d_out.stride(0), batch),
        LIMIT=triton.next_power_of_2(batch),
        D=width,
        W=channels,
        **config,
    )
    return [d_t, *gradients]
