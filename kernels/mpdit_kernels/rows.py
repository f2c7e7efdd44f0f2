"""Device functions shared by kernels: whole rows of width D in registers, and GELU.

A row is a tuple of tiles [ROWS, C], the powers of two that D is the sum of: 1152 = 1024 + 128, where one block would
be 2048 with 44 % of its lanes idle. CHUNKS, ((first column, columns), ...), is that sum, computed by `chunks`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def chunks(width: int, cap: int) -> tuple[tuple[int, int], ...]:
    """Return ((first column, columns), ...), columns being powers of two of at most `cap`, adding up to `width`."""
    parts, first = [], 0
    while first < width:
        columns = min(cap, 1 << ((width - first).bit_length() - 1))
        parts.append((first, columns))
        first += columns
    return tuple(parts)


def rows_of(x: Tensor) -> Tensor:
    """Return x, or a copy, with neighbouring columns neighbours in memory, as the kernels need."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@triton.jit
def columns(CHUNKS: tl.constexpr, i: tl.constexpr):
    """Return column indices [1, C] of tile i."""
    return CHUNKS[i][0] + tl.arange(0, CHUNKS[i][1])[None, :]


@triton.jit
def load_rows(pointers, mask, CHUNKS: tl.constexpr):
    """Return rows at pointers [ROWS], those not in mask as 0: a tuple of fp32 tiles [ROWS, C]."""
    tiles = ()
    for i in tl.static_range(len(CHUNKS)):
        tile = tl.load(pointers[:, None] + columns(CHUNKS, i), mask=mask[:, None], other=0)
        tiles = tiles + (tile.to(tl.float32),)
    return tiles


@triton.jit
def load_vector(pointer, CHUNKS: tl.constexpr):
    """Return one row at a pointer: a tuple of fp32 tiles [1, C]."""
    tiles = ()
    for i in tl.static_range(len(CHUNKS)):
        tiles = tiles + (tl.load(pointer + columns(CHUNKS, i)).to(tl.float32),)
    return tiles


@triton.jit
def row_mean(tiles, D: tl.constexpr):
    """Return the mean [ROWS] over all columns."""
    total = tl.sum(tiles[0], 1)
    for i in tl.static_range(1, len(tiles)):
        total += tl.sum(tiles[i], 1)
    return total / D


@triton.jit
def row_means(a, b, D: tl.constexpr):
    """Return the means [ROWS] of two rows over all columns, both by one sum: as many barriers as for one."""
    total = tl.sum(tl.join(a[0], b[0]), 1)
    for i in tl.static_range(1, len(a)):
        total += tl.sum(tl.join(a[i], b[i]), 1)
    return (total / D).split()


@triton.jit
def row_moments(tiles, eps, D: tl.constexpr):
    """Return mean and reciprocal standard deviation [ROWS], the variance as the mean of squared differences."""
    mean = row_mean(tiles, D)
    squares = ()
    for i in tl.static_range(len(tiles)):
        difference = tiles[i] - mean[:, None]
        squares = squares + (difference * difference,)
    return mean, 1 / tl.sqrt_rn(row_mean(squares, D) + eps)


@triton.jit
def zeros(ROWS: tl.constexpr, CHUNKS: tl.constexpr):
    """Return a tuple of fp32 zeros [ROWS, C], to add up in."""
    tiles = ()
    for i in tl.static_range(len(CHUNKS)):
        tiles = tiles + (_zeros(ROWS, CHUNKS[i][1]),)
    return tiles


@triton.jit
def _zeros(ROWS: tl.constexpr, C: tl.constexpr):
    return tl.zeros([ROWS, C], tl.float32)


@triton.jit
def store_vector(pointer, tiles, CHUNKS: tl.constexpr):
    """Write a tuple of tiles [1, C] as one row at a pointer."""
    for i in tl.static_range(len(CHUNKS)):
        tl.store(pointer + columns(CHUNKS, i), tiles[i].to(pointer.dtype.element_ty))


# tanh-GELU is gelu(h) = h * s, s = sigmoid(z) = 1 / (1 + e), e = exp(-z), as (1 + tanh(z / 2)) / 2 is sigmoid(z). The
# sigmoid's derivative is s * (e * s): taken as s - s^2, a difference of near equals, it would cost several times
# PyTorch's error once h reaches 2.


@triton.jit
def gelu_exponential(h):
    """Return (h, e = exp(-z(h))), both with h from -10 on: below, e would be infinite and gelu(h) is 0 in fp32."""
    h = tl.maximum(h, -10.0, tl.PropagateNan.ALL)
    # z = 2 sqrt(2 / pi) * (h + 0.044715 * h^3), in bits: exp would multiply by log2(e) once more
    return h, tl.exp2(h * (-2.302208198144325 - 0.1029432395800235 * h * h))


@triton.jit
def gelu(h):
    """Return h * s."""
    _, e = gelu_exponential(h)
    return h * (1 / (1 + e))  # not h / (1 + e): the slope needs the quotient too


@triton.jit
def gelu_and_slope(h):
    """Return gelu(h) and gelu'(h) = s + h * s * (e * s) * z'(h)."""
    bounded, e = gelu_exponential(h)
    s = 1 / (1 + e)
    # h meets s * (e * s) first, so that large h give 0 and not 0 times infinity; 0.21... is 3 * 0.044715 * 1.59...
    return h * s, s + bounded * (s * (e * s)) * (1.5957691216057308 + 0.2140644488 * bounded * bounded)
