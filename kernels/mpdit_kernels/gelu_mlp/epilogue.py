"""The two products of an MLP that can work on their results before they leave the registers, as Triton products.

Tiles of fp32 sums; the operands come through shared memory, some steps ahead. The first product stores pre-activation
and activation; the other takes the gradient of the activation to that of the pre-activation and adds up its columns.
Triton's interpreter multiplies bf16 as if it were integers: there these are for fp32 and fp16.
"""

# mypy: disable-error-code="assignment,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpdit_kernels.gelu_mlp.gelu import gate, slope
from mpdit_kernels.launch import Config, Tunable, launch
from mpdit_kernels.rows import rows_of


def _tiles(m: int, n: int, k: int, warps: int, stages: int, halvings: int = 2) -> Config:
    return {
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_K": k,
        "GROUP": 8,
        "HALVINGS": halvings,
        "num_warps": warps,
        "num_stages": stages,
    }


def _default(width: int, hidden: int) -> Config:
    return _tiles(128, 128, 64, 8, 3)


def _candidates(width: int, hidden: int) -> list[Config]:
    return [
        _tiles(128, 256, 64, 8, 3, halvings=3),
        _tiles(128, 256, 32, 8, 4, halvings=3),
        _tiles(128, 128, 64, 8, 3),
        _tiles(128, 128, 64, 8, 4),
        _tiles(128, 128, 64, 8, 3, halvings=1),
        _tiles(128, 128, 32, 4, 4, halvings=3),
        _tiles(128, 64, 64, 4, 4),
        _tiles(64, 128, 64, 4, 4, halvings=1),
    ]


FORWARD = Tunable("gelu_mlp.product", _default, _candidates)
BACKWARD = Tunable("gelu_mlp.product_backward", _default, _candidates)


@triton.jit
def _tile(M, H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of this program's tile: GROUP tiles of rows go through the columns together, for the L2."""
    across: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    group = tl.program_id(0) // (GROUP * across)
    within = tl.program_id(0) % (GROUP * across)
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - group * GROUP, GROUP)
    row = (group * GROUP + within % height).to(tl.int64) * BLOCK_M
    return row, (within // height) * BLOCK_N


@triton.jit
def _multiply(
    left,  # [M, K]
    left_row,
    right,  # [K, H], or [H, K] where TRANSPOSED
    row,
    column,
    M,
    K: tl.constexpr,
    H: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The fp32 tile of left @ right at (row, column); what lies past row M repeats the last row, past column H is 0."""
    rows = tl.minimum(row + tl.arange(0, BLOCK_M), M - 1)
    columns = column + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    lefts = left + rows[:, None] * left_row + k[None, :]
    if TRANSPOSED:
        rights = right + columns[None, :].to(tl.int64) * K + k[:, None]
    else:
        rights = right + k[:, None].to(tl.int64) * H + columns[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(lefts) if K % BLOCK_K == 0 else tl.load(lefts, mask=k[None, :] < K - start, other=0)
        if K % BLOCK_K == 0 and H % BLOCK_N == 0:
            b = tl.load(rights)
        else:
            b = tl.load(rights, mask=(k[:, None] < K - start) & (columns[None, :] < H), other=0)
        total = tl.dot(a, b, total, input_precision="ieee")  # of fp32: as cuBLAS multiplies it by default
        lefts += BLOCK_K
        if TRANSPOSED:
            rights += BLOCK_K
        else:
            rights += BLOCK_K * H
    return total


@triton.jit
def _columns(tile, HALVINGS: tl.constexpr):
    """The tile's columns in 2^HALVINGS equal runs, one after the other: an epilogue on all at once would spill."""
    parts = (tile,)
    for _ in tl.static_range(HALVINGS):
        halves = ()
        for i in tl.static_range(len(parts)):
            pairs = parts[i].reshape(tile.shape[0], 2, parts[i].shape[1] // 2)
            halves = halves + tl.split(pairs.permute(0, 2, 1))
        parts = halves
    return parts


@triton.jit
def _forward_product(
    x,  # [M, K]
    weight,  # [H, K]
    bias,  # [H]
    h,  # out [M, H]
    a,  # out [M, H]
    M,
    x_row,
    K: tl.constexpr,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    HALVINGS: tl.constexpr,
):
    row, column = _tile(M, H, BLOCK_M, BLOCK_N, GROUP)
    product = _multiply(x, x_row, weight, row, column, M, K, H, True, BLOCK_M, BLOCK_N, BLOCK_K)
    parts = _columns(product, HALVINGS)
    rows = row + tl.arange(0, BLOCK_M)[:, None]
    for i in tl.static_range(len(parts)):
        columns = column + i * parts[i].shape[1] + tl.arange(0, parts[i].shape[1])[None, :]
        mask = (rows < M) & (columns < H)
        biased = parts[i] + tl.load(bias + columns, mask=columns < H, other=0).to(tl.float32)
        rounded = biased.to(h.dtype.element_ty)
        tl.store(h + rows * H + columns, rounded, mask=mask)
        values = rounded.to(tl.float32)  # as stored: backward computes the same activation again
        tl.store(a + rows * H + columns, (values * gate(values)[0]).to(a.dtype.element_ty), mask=mask)


@triton.jit
def _backward_product(
    dy,  # [M, K]
    weight,  # [K, H]
    h,  # [M, H]
    dh,  # out [M, H]
    a,  # out [M, H], where ACTIVATION
    partials,  # out fp32 [P, H], where SUMS: column sums of dh over BLOCK_M rows
    M,
    dy_row,
    K: tl.constexpr,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    HALVINGS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SUMS: tl.constexpr,
):
    row, column = _tile(M, H, BLOCK_M, BLOCK_N, GROUP)
    product = _multiply(dy, dy_row, weight, row, column, M, K, H, False, BLOCK_M, BLOCK_N, BLOCK_K)
    parts = _columns(product, HALVINGS)
    rows = row + tl.arange(0, BLOCK_M)[:, None]
    for i in tl.static_range(len(parts)):
        columns = column + i * parts[i].shape[1] + tl.arange(0, parts[i].shape[1])[None, :]
        mask = (rows < M) & (columns < H)
        at = rows * H + columns
        values = tl.load(h + at, mask=mask, other=0).to(tl.float32)
        s, ds = gate(values)
        gradient = parts[i] * slope(values, s, ds)
        tl.store(dh + at, gradient.to(dh.dtype.element_ty), mask=mask)
        if ACTIVATION:
            tl.store(a + at, (values * s).to(a.dtype.element_ty), mask=mask)
        if SUMS:
            sums = tl.sum(tl.where(rows < M, gradient, 0), 0, keep_dims=True)
            tl.store(partials + row // BLOCK_M * H + columns, sums, mask=columns < H)


def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """h = x [M, K] weight [H, K]^T + bias [H], and gelu(h)."""
    (m, width), hidden = x.shape, weight.shape[0]
    x = rows_of(x)
    h = torch.empty(m, hidden, dtype=x.dtype, device=x.device)
    a = torch.empty_like(h)
    config = _fitting(FORWARD.pick(width=width, hidden=hidden), x)
    launch(
        _forward_product,
        _grid(m, hidden, config),
        *(x, weight.contiguous(), bias.contiguous(), h, a, m, x.stride(0)),
        K=width,
        H=hidden,
        **config,
    )
    return h, a


def backward(
    dy: Tensor, weight: Tensor, h: Tensor, activation: bool, sums: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dh = (dy [M, K] weight [K, H]) * gelu'(h [M, H]); gelu(h); fp32 [P, H], sums of dh over the rows of a tile."""
    (m, width), hidden = dy.shape, weight.shape[1]
    dy = rows_of(dy)
    dh = torch.empty_like(h)
    a = torch.empty_like(h) if activation else None
    config = _fitting(BACKWARD.pick(width=width, hidden=hidden), dy)
    parts = triton.cdiv(m, config["BLOCK_M"])
    partials = torch.empty(parts, hidden, dtype=torch.float32, device=h.device) if sums else None
    launch(
        _backward_product,
        _grid(m, hidden, config),
        *(dy, weight.contiguous(), h, dh, a, partials, m, dy.stride(0)),
        K=width,
        H=hidden,
        ACTIVATION=activation,
        SUMS=sums,
        **config,
    )
    return dh, a, partials


def _grid(m: int, hidden: int, config: Config) -> tuple[int]:
    return (triton.cdiv(m, config["BLOCK_M"]) * triton.cdiv(hidden, config["BLOCK_N"]),)


def _fitting(config: Config, x: Tensor) -> Config:
    """The configuration, which is for operands of two bytes, with as many bytes of these."""
    return config | {"BLOCK_K": config["BLOCK_K"] * 2 // x.element_size()}
