"""Device functions of the time embedding: transforms of the grid, complex mixings, GELU; and their table.

A spectrum is 32 numbers, the real parts of modes 0 to 15 and then the imaginary ones. Mode 0 has no imaginary part; its
place holds mode 16, which only a layer's pointwise mixing passes on: so all gradients of a layer come from spectra.
"""

# Kernels are Triton's language, not Python's.
# mypy: disable-error-code="assignment, no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpdit_kernels.fno import reference


@reference.per_device
def make_tables() -> tuple[Tensor, ...]:
    """[34, 32]: cosines and negative sines of each mode over the grid, as in a spectrum; the grid; its spectrum."""
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
    """What an inverse DFT weighs each of a spectrum's numbers with."""
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
