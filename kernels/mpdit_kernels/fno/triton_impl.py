"""Kernels of the time embedding: one launch forward, two backward. All is fp32; products on tiles are "ieee".

Of one sample t, with W channels on GRID points, MODES frequencies m and complex weights R = real + i * imag:

    x0[c, j] = lift_weight[c] * (grid[j] + t) + lift_bias[c]
    u1[o, j] = irfft(sum_c rfft(x0)[c, m] * R0[c, o, m])[j] + sum_c point0[o, c] * x0[c, j] + bias0[o]
    u2[o, j] = irfft(sum_c rfft(x1)[c, m] * R1[c, o, m])[j] + sum_c point1[o, c] * x1[c, j] + bias1[o], x1 = GELU(u1)
    mean[o]  = sum_j GELU(u2[o, j]) / GRID
    z[p]     = sum_o mean[o] * (real2[o, p, 0] + point2[p, o]) + bias2[p]
    out[d]   = sum_p project_weight[d, p] * z[p] + project_bias[d]

What comes before the first GELU is affine in t: u1 = start[o, j] + t * slope[o]. The last layer meets a mean over the
grid, which is frequency zero.

Forward, one program per sample does it all; each makes start and slope anew, from weights that the L2 cache holds.

Backward, first one program per sample for the gradients of its signals, then programs that sum over samples, each
owning the weights' gradients it writes: no atomics, no partial sums. Without atomics one launch would need every
program that sums to repeat all samples' work, of which the product with the projection alone, 2*B*D*W FLOP, takes one
multiprocessor 21 us by count (XL, fp32 outside of tensor cores, H200).

A spectrum of GRID real points is GRID numbers, the real parts of modes 0 to 15 and then the imaginary ones. Mode 0 has
no imaginary part; its place holds mode 16, which only a layer's pointwise mixing passes on: so all gradients of a layer
come from spectra.
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


GRID = tl.constexpr(reference.GRID)
MODES = tl.constexpr(reference.MODES)

# Rows of the tables, GRID numbers each: cosines of modes 0 to 15 from row 0 on, then
NEGATIVE_SINE_ROW = tl.constexpr(reference.MODES)
"""Negative sines of modes 0 to 15; that of mode 0 would be zero, and its row has mode 16's cosine."""
GRID_ROW = tl.constexpr(2 * reference.MODES)
"""The grid."""
GRID_SPECTRUM_ROW = tl.constexpr(2 * reference.MODES + 1)
"""The grid's spectrum, with mode 0's imaginary part, zero, in its place and not mode 16."""

SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@reference.per_device
def make_tables() -> tuple[Tensor, ...]:
    """Return the tables, fp32 [34, GRID]."""
    analysis, _ = reference.fourier_matrices()
    basis = analysis.permute(1, 2, 0).reshape(2 * reference.MODES, reference.GRID).float()
    grid = torch.linspace(-1, 1, reference.GRID, dtype=torch.float32, device="cpu")
    of_grid = (basis.double() @ grid.double()).float()
    # In the place of mode 0's sines, which are zero: mode 16's cosines, (-1)^j
    basis[reference.MODES] = 1 - 2.0 * (torch.arange(reference.GRID, device="cpu") % 2)
    return (torch.cat([basis, grid[None], of_grid[None]]),)


@triton.jit
def gelu(x):
    """Return the exact GELU and its derivative: x * cdf(x), and cdf(x) + x * pdf(x) of the normal distribution."""
    cdf = 0.5 * (1 + tl.math.erf(x * SQRT_HALF))
    pdf = tl.exp(-0.5 * x * x) * INV_SQRT_2PI
    return x * cdf, cdf + x * pdf


@triton.jit
def rfft(x, tables):
    """Return spectra [W, GRID] of signals x [W, GRID], mode 16 included."""
    point = tl.arange(0, GRID)[:, None]
    number = tl.arange(0, GRID)[None, :]
    return tl.dot(x, tl.load(tables + number * GRID + point), input_precision="ieee")


@triton.jit
def synthesis(real, imag, tables):
    """Return signals [W, GRID]: sum_m real[:, m] * cos(m, j) - imag[:, m] * sin(m, j) of real and imag [W, MODES].

    It is irfft of spectra that `irfft_weight` has weighed, and of itself the transpose of rfft.
    """
    mode = tl.arange(0, MODES)[:, None]
    cosines = tables + mode * GRID + tl.arange(0, GRID)[None, :]
    signals = tl.dot(real, tl.load(cosines), input_precision="ieee")
    negative_sines = tl.load(cosines + NEGATIVE_SINE_ROW * GRID, mask=mode > 0, other=0)
    return tl.dot(imag, negative_sines, acc=signals, input_precision="ieee")


@triton.jit
def irfft_weight(number):
    """Return the weight of each of a spectrum's numbers in irfft: modes 0 and 16 occur once, the others twice."""
    return tl.where(number % MODES == 0, 1 / GRID, 2 / GRID)


@triton.jit
def mix(
    spectrum, real, imag, SUMMED: tl.constexpr, KEPT: tl.constexpr, SIGN: tl.constexpr, W: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Return real and imaginary part [W, MODES] of sum_c X[c, m] * R[c, o, m]; X is the spectrum [W, GRID] in memory.

    SUMMED and KEPT are the weights' strides of the channels that are summed over (c) and of those of the result (o);
    SIGN = -1 takes the conjugate weights.
    """
    c = tl.arange(0, BLOCK)[:, None, None]
    o = tl.arange(0, W)[None, :, None]
    mode = tl.arange(0, MODES)[None, None, :]
    weight = c * SUMMED + o * KEPT + mode  # [BLOCK, W, MODES]
    sum_real = tl.zeros([BLOCK, W, MODES], tl.float32)
    sum_imag = tl.zeros([BLOCK, W, MODES], tl.float32)
    for first in tl.range(0, W, BLOCK, num_stages=STAGES):
        x_real = tl.load(spectrum + (first + c) * GRID + mode)
        x_imag = tl.load(spectrum + (first + c) * GRID + MODES + mode)
        x_imag = tl.where(mode == 0, 0, x_imag)  # not mode 16
        w_real = tl.load(real + first * SUMMED + weight)
        w_imag = tl.load(imag + first * SUMMED + weight) * SIGN
        sum_real += x_real * w_real - x_imag * w_imag
        sum_imag += x_real * w_imag + x_imag * w_real
    return tl.sum(sum_real, 0), tl.sum(sum_imag, 0)


@triton.jit
def first_layer(
    lift_weight, lift_bias, real0, imag0, point0, bias0, tables, W: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Return u1 at t = 0, start [W, GRID], and what one more t adds to it, slope [W, 1]."""
    # S[o, m] = sum_c lift_weight[c] * R0[c, o, m]: [W, MODES], from blocks [BLOCK, W, MODES]
    block_c = tl.arange(0, BLOCK)[:, None, None]
    block_o = tl.arange(0, W)[None, :, None]
    block_mode = tl.arange(0, MODES)[None, None, :]
    weight = (block_c * W + block_o) * MODES + block_mode
    sum_real = tl.zeros([BLOCK, W, MODES], tl.float32)
    sum_imag = tl.zeros([BLOCK, W, MODES], tl.float32)
    for first in tl.range(0, W, BLOCK, num_stages=STAGES):
        lift = tl.load(lift_weight + first + block_c)
        sum_real += lift * tl.load(real0 + first * W * MODES + weight)
        sum_imag += lift * tl.load(imag0 + first * W * MODES + weight)
    s_real = tl.sum(sum_real, 0)
    s_imag = tl.sum(sum_imag, 0)

    # point_slope[o] = sum_c point0[o, c] * lift_weight[c]: [W, 1]
    o = tl.arange(0, W)[:, None]
    c = tl.arange(0, W)[None, :]
    pointwise = tl.load(point0 + o * W + c)
    point_slope = tl.sum(pointwise * tl.load(lift_weight + c), 1, keep_dims=True)

    # A constant signal is frequency zero: level[o] = sum_c (point0[o, c] + real0[c, o, 0]) * lift_bias[c] + bias0[o]
    of_constant = pointwise + tl.load(real0 + (c * W + o) * MODES)
    level = tl.sum(of_constant * tl.load(lift_bias + c), 1, keep_dims=True) + tl.load(bias0 + o)

    # start[o, j] = irfft(rfft(grid)[m] * S[o, m])[j] + point_slope[o] * grid[j] + level[o]
    m = tl.arange(0, MODES)[None, :]
    grid_spectrum = tables + GRID_SPECTRUM_ROW * GRID
    g_real = tl.load(grid_spectrum + m) * irfft_weight(m)
    g_imag = tl.load(grid_spectrum + MODES + m) * irfft_weight(m)
    spectral = synthesis(g_real * s_real - g_imag * s_imag, g_real * s_imag + g_imag * s_real, tables)
    grid = tl.load(tables + GRID_ROW * GRID + tl.arange(0, GRID)[None, :])
    start = spectral + point_slope * grid + level

    # slope[o] = point_slope[o] + real S[o, 0], t being a constant signal
    slope = point_slope + tl.sum(tl.where(m == 0, s_real, 0), 1, keep_dims=True)
    return start, slope


@triton.jit
def _forward(
    t, lift_weight, lift_bias, real0, imag0, point0, bias0, real1, imag1, point1, bias1, real2, point2, bias2,
    project_weight, project_bias,  # the inputs
    tables,  # [34, GRID], as make_tables gives it
    out,  # [B, D]
    spectrum,  # out [B, W, GRID]: rfft(x1)
    derivative,  # out [B, W, GRID]: GELU'(u2)
    means,  # out [2, B, W]: mean, z
    start,  # out [W, GRID]: u1 at t = 0
    slope,  # out [W]: what one more t adds to u1
    D: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    tl.static_assert(W % BLOCK == 0)
    b = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, W)[None, :]
    o = tl.arange(0, W)[:, None]
    j = tl.arange(0, GRID)[None, :]
    m = tl.arange(0, MODES)[None, :]
    signal = (b * W + o) * GRID + j  # [W, GRID]

    # u1 = start + t * slope, x1 = GELU(u1): [W, GRID]
    u1_start, u1_slope = first_layer(lift_weight, lift_bias, real0, imag0, point0, bias0, tables, W, BLOCK, STAGES)
    if tl.program_id(0) == 0:
        tl.store(start + o * GRID + j, u1_start)
        tl.store(slope + o, u1_slope)
    x1, _ = gelu(u1_start + tl.load(t + b) * u1_slope)

    # u2 = irfft(sum_c rfft(x1)[c, m] * R1[c, o, m]) + point1 @ x1 + bias1: [W, GRID]
    tl.store(spectrum + signal, rfft(x1, tables))
    tl.debug_barrier()  # the mixing reads what other threads of this program stored
    real, imag = mix(spectrum + b * W * GRID, real1, imag1, W * MODES, MODES, 1, W, BLOCK, STAGES)
    pointwise = tl.dot(tl.load(point1 + o * W + c), x1, input_precision="ieee")
    u2 = pointwise + synthesis(real * irfft_weight(m), imag * irfft_weight(m), tables) + tl.load(bias1 + o)

    # mean[o] = sum_j GELU(u2[o, j]) / GRID: [W, 1]
    x2, d_gelu = gelu(u2)
    tl.store(derivative + signal, d_gelu)
    mean = tl.sum(x2, 1, keep_dims=True) * (1 / GRID)
    tl.store(means + b * W + o, mean)

    # z[p] = sum_o mean[o] * (real2[o, p, 0] + point2[p, o]) + bias2[p]: [1, W]
    p = tl.arange(0, W)[None, :]
    last = tl.load(real2 + (o * W + p) * MODES) + tl.load(point2 + p * W + o)
    z = tl.sum(mean * last, 0, keep_dims=True) + tl.load(bias2 + p)
    tl.store(means + (tl.num_programs(0).to(tl.int64) + b) * W + p, z)

    # out[d] = sum_p project_weight[d, p] * z[p] + project_bias[d], ROWS rows at a time
    for first in tl.range(0, D, ROWS, num_stages=STAGES):
        d = first + tl.arange(0, ROWS)
        weight = tl.load(project_weight + d[:, None] * W + p, mask=d[:, None] < D, other=0)
        y = tl.sum(weight * z, 1) + tl.load(project_bias + d, mask=d < D, other=0)
        tl.store(out + b * D + d, y, mask=d < D)


@triton.jit
def _backward_samples(
    d_out,  # [B, D], rows d_out_stride apart
    t, real1, imag1, point1, real2, point2, project_weight,  # inputs of the forward
    derivative, start, slope,  # outputs of the forward
    tables,
    d_t,  # out [B], where TIME
    d_z,  # out [B, W]
    d_mixed,  # out [B, W, GRID]: gradient of sum_c rfft(x1) * R1, the mixed spectrum
    d_u1,  # out [B, W, GRID]
    d_out_stride,
    D: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    TIME: tl.constexpr,
):  # fmt: skip
    tl.static_assert(W % BLOCK == 0)
    b = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, W)[:, None]
    p = tl.arange(0, W)[None, :]
    j = tl.arange(0, GRID)[None, :]
    signal = (b * W + o) * GRID + j  # [W, GRID]

    # d_z[p] = sum_d d_out[d] * project_weight[d, p]: [1, W]
    products = tl.zeros([ROWS, W], tl.float32)
    for first in tl.range(0, D, ROWS, num_stages=STAGES):
        d = first + tl.arange(0, ROWS)[:, None]
        d_out_d = tl.load(d_out + b * d_out_stride + d, mask=d < D, other=0)
        products += d_out_d * tl.load(project_weight + d * W + p, mask=d < D, other=0)
    dz = tl.sum(products, 0, keep_dims=True)
    tl.store(d_z + b * W + p, dz)

    # d_mean[o] = sum_p (real2[o, p, 0] + point2[p, o]) * d_z[p]: [W, 1]
    last = tl.load(real2 + (o * W + p) * MODES) + tl.load(point2 + p * W + o)
    d_mean = tl.sum(last * dz, 1, keep_dims=True)

    # d_u2[o, j] = GELU'(u2[o, j]) * d_mean[o] / GRID, d_mixed = irfft_weight * rfft(d_u2): [W, GRID]
    d_u2 = tl.load(derivative + signal) * (d_mean * (1 / GRID))
    tl.store(d_mixed + signal, rfft(d_u2, tables) * irfft_weight(j))

    # d_x1[c, j] = synthesis(sum_o d_mixed[o, m] * conj(R1[c, o, m]))[j] + sum_o point1[o, c] * d_u2[o, j]: [W, GRID]
    tl.debug_barrier()  # the mixing reads what other threads of this program stored
    real, imag = mix(d_mixed + b * W * GRID, real1, imag1, MODES, W * MODES, -1, W, BLOCK, STAGES)
    d_x1 = tl.dot(tl.load(point1 + p * W + o), d_u2, input_precision="ieee") + synthesis(real, imag, tables)

    # d_u1 = GELU'(u1) * d_x1: [W, GRID]
    u1_slope = tl.load(slope + o)
    _, d_gelu = gelu(tl.load(start + o * GRID + j) + tl.load(t + b) * u1_slope)
    du1 = d_x1 * d_gelu
    tl.store(d_u1 + signal, du1)

    # d_t = sum_oj d_u1[o, j] * slope[o]
    if TIME:
        tl.store(d_t + b, tl.sum(tl.sum(du1 * u1_slope, 1), 0))


# Device functions of the backward that sum over the samples, each owning the gradients that it writes. Loops run to
# LIMIT, a power of two of at least B, so that not every batch size compiles its own kernel.


@triton.jit
def middle_layer(
    spectrum, d_mixed, d_real1, d_imag1, d_point1, c, first_o, B, LIMIT: tl.constexpr, W: tl.constexpr,
    BATCH: tl.constexpr, OUT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write gradients of the second layer's mixings from input channel c to OUT output channels from first_o on."""
    # d_R1[c, o, m] = sum_b conj(X[b, c, m]) * d_mixed[b, o, m], X = rfft(x1): [OUT, MODES], from [BATCH, OUT, MODES]
    mode = tl.arange(0, MODES)[None, None, :]
    outs = first_o + tl.arange(0, OUT)
    sum_real = tl.zeros([BATCH, OUT, MODES], tl.float32)
    sum_imag = tl.zeros([BATCH, OUT, MODES], tl.float32)
    for first in tl.range(0, LIMIT, BATCH, num_stages=STAGES):
        b = (first + tl.arange(0, BATCH)).to(tl.int64)[:, None, None]
        x = spectrum + (b * W + c) * GRID + mode
        y = d_mixed + (b * W + outs[None, :, None]) * GRID + mode
        x_real = tl.load(x, mask=b < B, other=0)
        x_imag = tl.load(x + MODES, mask=b < B, other=0)
        y_real = tl.load(y, mask=b < B, other=0)
        y_imag = tl.load(y + MODES, mask=b < B, other=0)
        # At mode 0 the real part is mode 0's, and the imaginary part sums mode 16.
        crossed = tl.where(mode == 0, 0, x_imag)
        sum_real += x_real * y_real + crossed * y_imag
        sum_imag += tl.where(mode == 0, x_imag, x_real) * y_imag - crossed * y_real
    real = tl.sum(sum_real, 0)
    imag = tl.sum(sum_imag, 0)
    m = tl.arange(0, MODES)[None, :]
    weight = (c * W + outs[:, None]) * MODES + m
    tl.store(d_real1 + weight, real)
    tl.store(d_imag1 + weight, tl.where(m == 0, 0, imag))

    # d_point1[o, c] = sum_bj x1[b, c, j] * d_u2[b, o, j], by Parseval the sum of the spectra's products, mode 16's too
    tl.store(d_point1 + outs * W + c, tl.sum(real + tl.where(m == 0, imag, 0), 1))


@triton.jit
def sum_samples(
    t, means, d_z, d_mixed, d_u1, c, B, LIMIT: tl.constexpr, W: tl.constexpr, BATCH: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Return all that the gradients of the first and last layer need of the samples, summed in one loop.

    They are d_start [W, GRID], d_slope [W, 1], d_last [W] and d_bias2 [1, W], and d_bias1 of channel c.
    """
    o = tl.arange(0, W)[None, :, None]
    j = tl.arange(0, GRID)[None, None, :]
    p = tl.arange(0, W)[None, :]
    start = tl.zeros([BATCH, W, GRID], tl.float32)
    slope = tl.zeros([BATCH, W, GRID], tl.float32)
    last = tl.zeros([BATCH, W], tl.float32)
    bias2 = tl.zeros([BATCH, W], tl.float32)
    bias1 = tl.zeros([BATCH, 1], tl.float32)
    for first in tl.range(0, LIMIT, BATCH, num_stages=STAGES):
        b = (first + tl.arange(0, BATCH)).to(tl.int64)[:, None]
        b_oj = b[:, :, None]
        # d_start[o, j] = sum_b d_u1[b, o, j], d_slope[o] = sum_bj t[b] * d_u1[b, o, j]
        du1 = tl.load(d_u1 + (b_oj * W + o) * GRID + j, mask=b_oj < B, other=0)
        start += du1
        slope += tl.load(t + b_oj, mask=b_oj < B, other=0) * du1
        # d_last[p] = sum_b mean[b, c] * d_z[b, p], d_bias2[p] = sum_b d_z[b, p]
        dz = tl.load(d_z + b * W + p, mask=b < B, other=0)
        last += tl.load(means + b * W + c, mask=b < B, other=0) * dz
        bias2 += dz
        # d_bias1[c] = sum_bj d_u2[b, c, j], GRID times what irfft_weight left of mode 0
        bias1 += tl.load(d_mixed + (b * W + c) * GRID, mask=b < B, other=0)
    d_slope = tl.sum(tl.sum(slope, 0), 1, keep_dims=True)
    d_bias1 = tl.sum(tl.sum(bias1, 1), 0) * GRID
    return tl.sum(start, 0), d_slope, tl.sum(last, 0), tl.sum(bias2, 0, keep_dims=True), d_bias1


@triton.jit
def lift_and_first_layer(
    d_start, d_slope, lift_weight, lift_bias, real0, imag0, point0, tables, d_lift_weight, d_lift_bias, d_real0,
    d_imag0, d_point0, d_bias0, c, W: tl.constexpr,
):  # fmt: skip
    """Write gradients of the lift to channel c, of the first layer's mixings from it, and of the bias of channel c."""
    o = tl.arange(0, W)[:, None]
    j = tl.arange(0, GRID)[None, :]
    m = tl.arange(0, MODES)[None, :]

    # d_level[o] = sum_j d_start[o, j], d_point_slope[o] = sum_j d_start[o, j] * grid[j] + d_slope[o]: [W, 1]
    d_level = tl.sum(d_start, 1, keep_dims=True)
    d_point_slope = tl.sum(d_start * tl.load(tables + GRID_ROW * GRID + j), 1, keep_dims=True) + d_slope

    # Y[o, m] = irfft_weight * rfft(d_start): [W, MODES]
    cosines = tables + tl.arange(0, GRID)[:, None] + m * GRID
    negative_sines = cosines + NEGATIVE_SINE_ROW * GRID
    y_real = tl.dot(d_start, tl.load(cosines), input_precision="ieee") * irfft_weight(m)
    y_imag = tl.dot(d_start, tl.load(negative_sines), input_precision="ieee") * irfft_weight(m)
    y_imag = tl.where(m == 0, 0, y_imag)  # not mode 16

    # d_S[o, m] = conj(rfft(grid)[m]) * Y[o, m], and at mode 0 + d_slope[o]: [W, MODES]
    grid_spectrum = tables + GRID_SPECTRUM_ROW * GRID
    g_real = tl.load(grid_spectrum + m)
    g_imag = tl.load(grid_spectrum + MODES + m)
    ds_real = g_real * y_real + g_imag * y_imag + tl.where(m == 0, d_slope, 0)
    ds_imag = g_real * y_imag - g_imag * y_real

    # d_R0[c, o, m] = lift_weight[c] * d_S[o, m], and at mode 0 + lift_bias[c] * d_level[o]
    lift = tl.load(lift_weight + c)
    lift_b = tl.load(lift_bias + c)
    weight = (c * W + o) * MODES + m
    tl.store(d_real0 + weight, lift * ds_real + tl.where(m == 0, lift_b * d_level, 0))
    tl.store(d_imag0 + weight, lift * tl.where(m == 0, 0, ds_imag))

    # d_point0[o, c] = lift_weight[c] * d_point_slope[o] + lift_bias[c] * d_level[o]
    tl.store(d_point0 + o * W + c, lift * d_point_slope + lift_b * d_level)

    # d_lift_weight[c] = sum_om (real0 * real d_S + imag0 * imag d_S)[c, o, m] + sum_o point0[o, c] * d_point_slope[o]
    spectral = tl.sum(tl.load(real0 + weight) * ds_real + tl.load(imag0 + weight) * ds_imag, 1, keep_dims=True)
    pointwise = tl.load(point0 + o * W + c)
    tl.store(d_lift_weight + c, tl.sum(tl.sum(spectral + pointwise * d_point_slope, 1), 0))

    # d_lift_bias[c] = sum_o (point0[o, c] + real0[c, o, 0]) * d_level[o]
    of_constant = pointwise + tl.load(real0 + (c * W + o) * MODES)
    tl.store(d_lift_bias + c, tl.sum(tl.sum(of_constant * d_level, 1), 0))

    # d_bias0[o] = d_level[o], of which this program writes its channel's
    tl.store(d_bias0 + o, d_level, mask=o == c)


@triton.jit
def last_layer(d_last, d_bias2_sum, d_real2, d_imag2, d_point2, d_bias2, c, W: tl.constexpr):
    """Write gradients of the last layer's mixings from input channel c, and of the bias of channel c."""
    # d_real2[c, p, 0] = d_point2[p, c] = d_last[p] = sum_b mean[b, c] * d_z[b, p]; other frequencies don't act
    row = c * W + tl.arange(0, W)[:, None]
    m = tl.arange(0, MODES)[None, :]
    tl.store(d_real2 + row * MODES + m, tl.where(m == 0, d_last[:, None], 0))
    tl.store(d_imag2 + row * MODES + m, tl.zeros([W, MODES], tl.float32))
    tl.store(d_point2 + tl.arange(0, W) * W + c, d_last)
    p = tl.arange(0, W)[None, :]
    tl.store(d_bias2 + p, d_bias2_sum, mask=p == c)


@triton.jit
def projection(
    d_out, z, d_project_weight, d_project_bias, d_out_stride, first_row, B, LIMIT: tl.constexpr, D: tl.constexpr,
    W: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write gradients of ROWS rows of the projection, from first_row on."""
    # d_project_weight[d, p] = sum_b d_out[b, d] * z[b, p]: [ROWS, W], d_project_bias[d] = sum_b d_out[b, d]: [ROWS]
    SAMPLES: tl.constexpr = 32
    d = first_row + tl.arange(0, ROWS)[:, None]
    p = tl.arange(0, W)[None, :]
    weight = tl.zeros([ROWS, W], tl.float32)
    bias = tl.zeros([ROWS, SAMPLES], tl.float32)
    for first in tl.range(0, LIMIT, SAMPLES, num_stages=STAGES):
        samples = (first + tl.arange(0, SAMPLES)).to(tl.int64)
        b = samples[None, :]
        d_out_db = tl.load(d_out + b * d_out_stride + d, mask=(d < D) & (b < B), other=0)
        z_bp = tl.load(z + samples[:, None] * W + p, mask=samples[:, None] < B, other=0)
        weight = tl.dot(d_out_db, z_bp, acc=weight, input_precision="ieee")
        bias += d_out_db
    tl.store(d_project_weight + d * W + p, weight, mask=d < D)
    tl.store(d_project_bias + d, tl.sum(bias, 1, keep_dims=True), mask=d < D)


@triton.jit
def _backward_weights(
    d_out,  # [B, D], rows d_out_stride apart
    t, lift_weight, lift_bias, real0, imag0, point0,  # inputs of the forward
    spectrum, means,  # outputs of the forward
    tables,
    d_z, d_mixed, d_u1,  # outputs of _backward_samples
    d_lift_weight, d_lift_bias, d_real0, d_imag0, d_point0, d_bias0, d_real1, d_imag1, d_point1, d_bias1, d_real2,
    d_imag2, d_point2, d_bias2, d_project_weight, d_project_bias,  # out, each as its weight
    d_out_stride,
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
    # W programs for the outer layers, one for each input channel; W * BLOCKS for the middle layer; the projection's.
    BLOCKS: tl.constexpr = W // OUT
    program = tl.program_id(0)
    if program < W:
        c = program
        d_start, d_slope, d_last, d_bias2_sum, d_bias1_c = sum_samples(
            t, means, d_z, d_mixed, d_u1, c, B, LIMIT, W, BATCH, STAGES
        )
        lift_and_first_layer(
            d_start, d_slope, lift_weight, lift_bias, real0, imag0, point0, tables, d_lift_weight, d_lift_bias, d_real0,
            d_imag0, d_point0, d_bias0, c, W,
        )  # fmt: skip
        tl.store(d_bias1 + c, d_bias1_c)
        last_layer(d_last, d_bias2_sum, d_real2, d_imag2, d_point2, d_bias2, c, W)
    elif program < W + W * BLOCKS:
        c = (program - W) // BLOCKS
        first_o = (program - W) % BLOCKS * OUT
        middle_layer(spectrum, d_mixed, d_real1, d_imag1, d_point1, c, first_o, B, LIMIT, W, BATCH, OUT, STAGES)
    else:
        z = means + B * W
        first_row = (program - W - W * BLOCKS) * ROWS
        projection(d_out, z, d_project_weight, d_project_bias, d_out_stride, first_row, B, LIMIT, D, W, ROWS, STAGES)


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
    """Return gradients of t and of the weights, fp32; None where not asked for.

    Args:
        d_out: gradient of the embedding [B, D].
        t, weights: what `forward` was given.
        spectrum, derivative, means, start, slope: what it returned beside the embedding.
        of_t, of_weights: which are asked for.
    """
    d_out, t, weights = rows_of(d_out), t.contiguous(), [value.contiguous() for value in weights]
    batch, channels, width = t.shape[0], weights[0].shape[0], weights[-1].shape[0]
    d_t = torch.empty_like(t) if of_t else None
    d_z, d_mixed, d_u1 = torch.empty_like(means[0]), torch.empty_like(spectrum), torch.empty_like(spectrum)
    lift_weight, lift_bias, real0, imag0, point0, _, real1, imag1, point1, _, real2, _, point2, _, project, _ = weights
    tables = make_tables(t.device, torch.float32)
    launch(
        _backward_samples,
        (batch,),
        *(d_out, t, real1, imag1, point1, real2, point2, project, derivative, start, slope, *tables),
        *(d_t, d_z, d_mixed, d_u1, d_out.stride(0)),
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
        *(d_out, t, lift_weight, lift_bias, real0, imag0, point0, spectrum, means, *tables, d_z, d_mixed, d_u1),
        *(*gradients, d_out.stride(0), batch),
        LIMIT=triton.next_power_of_2(batch),
        D=width,
        W=channels,
        **config,
    )
    return [d_t, *gradients]
