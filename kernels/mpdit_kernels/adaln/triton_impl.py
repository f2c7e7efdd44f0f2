"""Kernels of the gated residual and the modulated layer norm: one forward and one backward, parts switched off.

Forward, of each token, where GATED and where NORM:

    residual = x + gate * branch
    y        = normalized * (1 + scale) + shift,  normalized = (residual - mean) * rstd

and backward, with g = d_y * (1 + scale) and sums over a sample's tokens for its vectors:

    d_x      = (g - normalized * mean(g * normalized) - mean(g)) * rstd + d_residual
    d_branch = gate * d_x,  d_gate = sum_t d_x * branch,  d_shift = sum_t d_y,  d_scale = sum_t d_y * normalized

A program takes TOKENS tokens of one sample, ROWS at a time, whole rows in registers, so the sample's modulation is
read once per program. Statistics and sums are fp32. The backward sums over a program's tokens in registers and writes
one fp32 partial row per program; the partials are added up in a fixed order, so results repeat bit for bit.

PACKED, a program takes tokens of one of S sequences, which are stretches of a single sample of N tokens. There are
programs for the longest; those that others have no tokens for add partials of zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpdit_kernels.launch import Config, Tunable, element_sizes, launch
from mpdit_kernels.rows import (
    chunks,
    columns,
    load_rows,
    load_vector,
    row_means,
    row_moments,
    rows_of,
    store_vector,
    zeros,
)
from mpdit_kernels.varlen import Sequences


def _candidates(width: int, parts: str, bytes: str) -> list[Config]:
    return [
        {"ROWS": rows, "TOKENS": tokens, "CAP": cap, "num_warps": warps, "num_stages": 1}
        for cap in (128, 512, 1024)
        for warps in (1, 4, 8)
        for rows in (1, 2, 4)
        for tokens in (8, 20, 40)
        if rows * width <= 1152 * warps and cap < 2 * width and tokens % rows == 0
    ]


def _default(width: int, parts: str, bytes: str) -> Config:
    if width <= 1152:  # a warp has whole rows in registers, and no sum has a barrier
        return {"ROWS": 1, "TOKENS": 8, "CAP": 128, "num_warps": 1, "num_stages": 1}
    return {"ROWS": 2 if width <= 1536 else 1, "TOKENS": 16, "CAP": 1024, "num_warps": 4, "num_stages": 1}


def _default_backward(width: int, parts: str, bytes: str) -> Config:
    warps = 8 if width > 1536 else 4
    return {"ROWS": 1, "TOKENS": 20, "CAP": 1024, "num_warps": warps, "num_stages": 1}


FORWARD = Tunable("adaln.forward", _default, _candidates)
BACKWARD = Tunable("adaln.backward", _default_backward, _candidates)


@triton.jit
def _span(cu_seqlens, T, PACKED: tl.constexpr):
    """Return (whose vectors a program's tokens meet, the sample they lie in, the first of them, their end)."""
    b = tl.program_id(0).to(tl.int64)
    if PACKED:
        sample = tl.cast(0, tl.int64)
        start, end = tl.load(cu_seqlens + b), tl.load(cu_seqlens + b + 1)
    else:
        sample = b
        start, end = 0, T
    return b, sample, start, end


@triton.jit
def _forward(
    x,  # [B, T, D]
    branch,  # [B, T, D]
    gate,  # [B, D]
    shift,  # [B, D]
    scale,  # [B, D]
    residual,  # out [B, T, D]
    y,  # out [B, T, D]
    statistics,  # out fp32 [2, B, T]: mean, reciprocal standard deviation
    cu_seqlens,  # int32 [S+1], where PACKED
    T,
    eps,
    x_batch_stride,
    x_token_stride,
    branch_batch_stride,
    branch_token_stride,
    gate_batch_stride,
    shift_batch_stride,
    scale_batch_stride,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    PACKED: tl.constexpr,
):
    tl.static_assert(TOKENS % ROWS == 0)
    b, sample, start, end = _span(cu_seqlens, T, PACKED)
    if GATED:
        g = load_vector(gate + b * gate_batch_stride, CHUNKS)
    if NORM:
        shifts = load_vector(shift + b * shift_batch_stride, CHUNKS)
        scales = load_vector(scale + b * scale_batch_stride, CHUNKS)
    first = start + tl.program_id(1) * TOKENS
    for step in range(0, tl.minimum(TOKENS, end - first) if PACKED else TOKENS, ROWS):
        rows = (first + step + tl.arange(0, ROWS)).to(tl.int64)
        mask = rows < end
        out = (sample * T + rows) * D
        values = load_rows(x + sample * x_batch_stride + rows * x_token_stride, mask, CHUNKS)
        # residual = x + gate * branch: tiles [ROWS, columns]
        if GATED:
            branches = load_rows(branch + sample * branch_batch_stride + rows * branch_token_stride, mask, CHUNKS)
            summed = ()
            for i in tl.static_range(len(CHUNKS)):
                # The norm sees the sum as it is stored, as the reference does.
                rounded = (values[i] + g[i] * branches[i]).to(residual.dtype.element_ty)
                tl.store(residual + out[:, None] + columns(CHUNKS, i), rounded, mask=mask[:, None])
                summed = summed + (rounded.to(tl.float32),)
            values = summed
        # y = normalized * (1 + scale) + shift
        if NORM:
            mean, rstd = row_moments(values, eps, D)
            tl.store(statistics + sample * T + rows, mean, mask=mask)
            tl.store(statistics + ((1 if PACKED else tl.num_programs(0)) + sample) * T + rows, rstd, mask=mask)
            for i in tl.static_range(len(CHUNKS)):
                normalized = (values[i] - mean[:, None]) * rstd[:, None]
                modulated = normalized * (1 + scales[i]) + shifts[i]
                target = y + out[:, None] + columns(CHUNKS, i)
                tl.store(target, modulated.to(y.dtype.element_ty), mask=mask[:, None])


@triton.jit
def _backward(
    d_residual,  # [B, T, D], where GRAD_RESIDUAL
    d_y,  # [B, T, D], where NORM
    x,  # [B, T, D]: what was normalised
    branch,  # [B, T, D]
    gate,  # [B, D]
    scale,  # [B, D]
    statistics,  # fp32 [2, B, T]
    d_x,  # out [B, T, D]
    d_branch,  # out [B, T, D]
    partials,  # out fp32 [1 to 3, B, P, D]: of gate where GATED, of shift and scale where NORM
    cu_seqlens,  # int32 [S+1], where PACKED
    T,
    d_residual_batch_stride,
    d_residual_token_stride,
    d_y_batch_stride,
    d_y_token_stride,
    x_batch_stride,
    x_token_stride,
    branch_batch_stride,
    branch_token_stride,
    gate_batch_stride,
    scale_batch_stride,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    GRAD_RESIDUAL: tl.constexpr,
    PACKED: tl.constexpr,
):
    tl.static_assert(TOKENS % ROWS == 0)
    b, sample, start, end = _span(cu_seqlens, T, PACKED)
    part = tl.program_id(1)
    d_gate = zeros(1, CHUNKS)
    d_shift = zeros(1, CHUNKS)
    d_scale = zeros(1, CHUNKS)
    if GATED:
        gates = load_vector(gate + b * gate_batch_stride, CHUNKS)
    if NORM:
        scales = load_vector(scale + b * scale_batch_stride, CHUNKS)
    first = start + part * TOKENS
    for step in range(0, tl.minimum(TOKENS, end - first) if PACKED else TOKENS, ROWS):
        rows = (first + step + tl.arange(0, ROWS)).to(tl.int64)
        mask = rows < end
        out = (sample * T + rows) * D
        # All loads come before the sums over columns, whose barriers would hold up those after them.
        if GRAD_RESIDUAL:
            d_residual_rows = d_residual + sample * d_residual_batch_stride + rows * d_residual_token_stride
            incoming = load_rows(d_residual_rows, mask, CHUNKS)
        if GATED:
            branches = load_rows(branch + sample * branch_batch_stride + rows * branch_token_stride, mask, CHUNKS)
        if NORM:
            mean = tl.load(statistics + sample * T + rows, mask=mask, other=0)
            rstd = tl.load(statistics + ((1 if PACKED else tl.num_programs(0)) + sample) * T + rows, mask=mask, other=0)
            values = load_rows(x + sample * x_batch_stride + rows * x_token_stride, mask, CHUNKS)
            d_ys = load_rows(d_y + sample * d_y_batch_stride + rows * d_y_token_stride, mask, CHUNKS)
            # d_shift += sum_t d_y, d_scale += sum_t d_y * normalized, g = d_y * (1 + scale): tiles [ROWS, columns]
            normalized = ()
            g = ()
            products = ()
            new_d_shift = ()
            new_d_scale = ()
            for i in tl.static_range(len(CHUNKS)):
                normalized_i = (values[i] - mean[:, None]) * rstd[:, None]
                new_d_shift = new_d_shift + (d_shift[i] + tl.sum(d_ys[i], 0, keep_dims=True),)
                new_d_scale = new_d_scale + (d_scale[i] + tl.sum(d_ys[i] * normalized_i, 0, keep_dims=True),)
                g = g + (d_ys[i] * (1 + scales[i]),)
                products = products + (g[i] * normalized_i,)
                normalized = normalized + (normalized_i,)
            d_shift = new_d_shift
            d_scale = new_d_scale
            mean_product, mean_g = row_means(products, g, D)
        new_d_gate = ()
        for i in tl.static_range(len(CHUNKS)):
            at = columns(CHUNKS, i)
            # dx = (g - normalized * mean(g * normalized) - mean(g)) * rstd + d_residual
            if NORM:
                dx = (g[i] - normalized[i] * mean_product[:, None] - mean_g[:, None]) * rstd[:, None]
            if GRAD_RESIDUAL:
                if NORM:
                    dx += incoming[i]
                else:
                    dx = incoming[i]
            if NORM:
                tl.store(d_x + out[:, None] + at, dx.to(d_x.dtype.element_ty), mask=mask[:, None])
            # d_gate += sum_t dx * branch, d_branch = dx * gate
            if GATED:
                new_d_gate = new_d_gate + (d_gate[i] + tl.sum(dx * branches[i], 0, keep_dims=True),)
                gated = (dx * gates[i]).to(d_branch.dtype.element_ty)
                tl.store(d_branch + out[:, None] + at, gated, mask=mask[:, None])
        if GATED:
            d_gate = new_d_gate
    row = partials + (b * tl.num_programs(1) + part) * D
    plane = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * D
    if GATED:
        store_vector(row, d_gate, CHUNKS)
    if NORM:
        store_vector(row + GATED * plane, d_shift, CHUNKS)
        store_vector(row + (GATED + 1) * plane, d_scale, CHUNKS)


def forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    offsets: Sequence[int] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (residual, y, statistics fp32 [2, B, T]); residual is None without a branch, the others without a shift.

    Args:
        x, branch: [B, T, D]; [N, D] with offsets, and the statistics then [2, N].
        gate, shift, scale: [B, D]; [S, D] with offsets.
        eps: of the norm.
        dtype: of y.
        offsets: cumulative lengths (0, ..., N) of S sequences.
    """
    batch, tokens, cu_seqlens = _extent(x, offsets)
    x, branch = rows_of(x), None if branch is None else rows_of(branch)
    gate, shift, scale = (None if v is None else rows_of(v) for v in (gate, shift, scale))
    residual = None if branch is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = None if shift is None else torch.empty(x.shape, dtype=dtype, device=x.device)
    statistics = None if shift is None else torch.empty(2, *x.shape[:-1], dtype=torch.float32, device=x.device)
    config = _config(FORWARD, x, branch, y, tokens)
    launch(
        _forward,
        (batch, triton.cdiv(tokens, config["TOKENS"])),
        *(x, branch, gate, shift, scale, residual, y, statistics, cu_seqlens, x.shape[-2], eps),
        *(*_strides(x), *_strides(branch)),
        *(0 if v is None else v.stride(0) for v in (gate, shift, scale)),
        D=x.shape[-1],
        CHUNKS=chunks(x.shape[-1], config.pop("CAP")),
        GATED=branch is not None,
        NORM=shift is not None,
        PACKED=offsets is not None,
        **config,
    )
    return residual, y, statistics


def backward(
    d_residual: Tensor | None,
    d_y: Tensor | None,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    statistics: Tensor | None,
    offsets: Sequence[int] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Return (dx, dbranch, fp32 [1 to 3, B, D]) given what the forward normalised as x.

    dx is None without d_y: it is then d_residual itself. The third is of the gate where there is a branch, then of
    shift and scale where there is d_y. Cumulative lengths as in the forward, [S, D] taking the place of [B, D].
    """
    batch, tokens, cu_seqlens = _extent(x, offsets)
    width = x.shape[-1]
    d_residual, d_y, branch = (None if v is None else rows_of(v) for v in (d_residual, d_y, branch))
    gate, scale = (None if v is None else rows_of(v) for v in (gate, scale))
    x = rows_of(x)
    norm = d_y is not None
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if norm else None
    dbranch = None if branch is None else torch.empty(x.shape, dtype=branch.dtype, device=x.device)
    config = _config(BACKWARD, x, branch, d_y, tokens)
    parts = triton.cdiv(tokens, config["TOKENS"])
    partials = torch.empty((branch is not None) + 2 * norm, batch, parts, width, dtype=torch.float32, device=x.device)
    launch(
        _backward,
        (batch, parts),
        *(d_residual, d_y, x, branch, gate, scale if norm else None, statistics, dx, dbranch, partials, cu_seqlens),
        *(x.shape[-2], *_strides(d_residual), *_strides(d_y), *_strides(x), *_strides(branch)),
        *(0 if gate is None else gate.stride(0), 0 if scale is None else scale.stride(0)),
        D=width,
        CHUNKS=chunks(width, config.pop("CAP")),
        GATED=branch is not None,
        NORM=norm,
        GRAD_RESIDUAL=d_residual is not None,
        PACKED=offsets is not None,
        **config,
    )
    return dx, dbranch, partials[:, :, 0] if parts == 1 else partials.sum(2)


def _extent(x: Tensor, offsets: Sequence[int] | None) -> tuple[int, int, Tensor | None]:
    """Return how many samples or sequences there are, the most tokens of one, and cumulative lengths on x's device."""
    if offsets is None:
        return x.shape[0], x.shape[1], None
    packed = Sequences(tuple(offsets))
    return len(packed), packed.longest, packed.on(x.device)


def _config(tunable: Tunable, x: Tensor, branch: Tensor | None, y: Tensor | None, tokens: int) -> Config:
    """Return the tuned configuration, with no more tokens to a program than there are; y or its gradient."""
    parts = "gate+norm" if branch is not None and y is not None else "norm" if branch is None else "gate"
    config = tunable.pick(width=x.shape[-1], parts=parts, bytes=element_sizes(x, branch, y))
    most = triton.cdiv(max(1, tokens), config["ROWS"]) * config["ROWS"]
    return config | {"TOKENS": min(config["TOKENS"], most)}


def _strides(x: Tensor | None) -> tuple[int, int]:
    """Return the strides of samples and tokens; packed ones are a single sample."""
    return (0, 0) if x is None else (x.stride(0) if x.ndim == 3 else 0, x.stride(-2))
