"""The MLP forward and backward: products by cuBLAS, and one pass over [tokens, H] each way as Triton kernels.

With h = x @ weight1^T + bias1 [tokens, H]:

    a  = GELU(h),  y = a @ weight2^T + bias2
    da = dy @ weight2,  dh = GELU'(h) * da,  d_bias1 = sum_t dh,  dx = dh @ weight1
    d_weight1 = dh^T @ x,  d_weight2 = dy^T @ a,  d_bias2 = sum_t dy

Where nothing is kept, product and GELU are cuBLASLt's own. That is no way to train: torch exposes no epilogue that also
keeps the pre-activation (GELU_AUX), and the activation doesn't tell it, for GELU has no inverse.
Backward reads the pre-activation, writes its gradient and the activation, and adds up the bias gradient: fp32 sums of a
program's rows, then of the programs in a fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from mpdit_kernels.launch import Tunable, launch
from mpdit_kernels.rows import gelu, gelu_and_slope, rows_of

PASS = Tunable(
    "gelu_mlp.pass",
    lambda hidden, bytes: {"BLOCK": 2048, "num_warps": 4, "num_stages": 1},
    lambda hidden, bytes: [
        {"BLOCK": block, "num_warps": warps, "num_stages": 1}
        for warps in (4, 8)
        for block in (1024, 2048, 4096, 8192)
        if 8 <= block // (32 * warps) <= 32
    ],
)
PASS_BACKWARD = Tunable(
    "gelu_mlp.pass_backward",
    lambda hidden, bytes: {"ROWS": 4, "COLUMNS": 256, "TOKENS": 64, "num_warps": 4, "num_stages": 1},
    lambda hidden, bytes: [
        {"ROWS": rows, "COLUMNS": columns, "TOKENS": tokens, "num_warps": 4, "num_stages": 1}
        for rows, columns in ((4, 256), (8, 256), (4, 512), (2, 1024))
        for tokens in (32, 64)
    ],
)


@triton.jit
def _forward_pass(h, a, N, BLOCK: tl.constexpr):
    """Write a = GELU(h), N values; a may be h."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(h + at, mask=at < N, other=0).to(tl.float32)
    tl.store(a + at, gelu(values).to(a.dtype.element_ty), mask=at < N)


@triton.jit
def _backward_pass(
    da,  # [M, H]
    h,  # [M, H]
    dh,  # out [M, H]; may be da
    a,  # out [M, H], where ACTIVATION
    partials,  # out fp32 [P, H], where SUMS: column sums of dh over TOKENS rows
    M,
    da_row_stride,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SUMS: tl.constexpr,
):
    across: tl.constexpr = (H + COLUMNS - 1) // COLUMNS
    part = (tl.program_id(0) // across).to(tl.int64)
    columns = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    first = part * TOKENS
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(0, TOKENS, ROWS):
        rows = first + step + tl.arange(0, ROWS)[:, None]
        mask = (rows < M) & (columns < H)
        at = rows * H + columns
        values = tl.load(h + at, mask=mask, other=0).to(tl.float32)
        # dh = GELU'(h) * da, a = GELU(h): [ROWS, COLUMNS]
        gradient = tl.load(da + rows * da_row_stride + columns, mask=mask, other=0).to(tl.float32)
        activation, slope = gelu_and_slope(values)
        gradient *= slope
        tl.store(dh + at, gradient.to(dh.dtype.element_ty), mask=mask)
        if ACTIVATION:
            tl.store(a + at, activation.to(a.dtype.element_ty), mask=mask)
        if SUMS:
            total += gradient
    if SUMS:
        tl.store(partials + part * H + columns, tl.sum(total, 0, keep_dims=True), mask=columns < H)


def forward(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor | None, bias2: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Return (result [..., D2], pre-activation [..., H]); the second is None unless kept."""
    leading, width, hidden = x.shape[:-1], x.shape[-1], weight1.shape[0]
    x = x.reshape(-1, width)
    h = None
    if not keep and x.is_cuda:
        # cuBLASLt's epilogue; its GELU is the tanh form on CUDA, and the erf form on a CPU.
        a = torch._addmm_activation(bias1, x, weight1.t(), use_gelu=True)
    else:
        h = linear(x, weight1, bias1)
        a = _activation(h, torch.empty_like(h) if keep else h)
    y = a if weight2 is None else linear(a, weight2, bias2)
    return y.view(*leading, y.shape[-1]), h.view(*leading, hidden) if keep and h is not None else None


def backward(
    dy: Tensor, x: Tensor, weight1: Tensor, weight2: Tensor | None, hidden: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Return gradients of x, weight1, bias1, weight2, bias2, None where not needed, given forward's pre-activation."""
    need_x, need_weight1, need_bias1, need_weight2, need_bias2 = needs
    dy, h = dy.reshape(-1, dy.shape[-1]), hidden.view(-1, hidden.shape[-1])
    dh = a = partials = None
    if need_x or need_weight1 or need_bias1:
        da = rows_of(dy) if weight2 is None else dy @ weight2
        dh = torch.empty_like(h) if weight2 is None else da  # a caller's gradient is not written to
        a = torch.empty_like(h) if need_weight2 else None
        config = PASS_BACKWARD.pick(hidden=h.shape[1], bytes=h.element_size())
        parts = triton.cdiv(h.shape[0], config["TOKENS"])
        partials = torch.empty(parts, h.shape[1], dtype=torch.float32, device=h.device) if need_bias1 else None
        launch(
            _backward_pass,
            (parts * triton.cdiv(h.shape[1], config["COLUMNS"]),),
            *(da, h, dh, a, partials, h.shape[0], da.stride(0)),
            H=h.shape[1],
            ACTIVATION=need_weight2,
            SUMS=need_bias1,
            **config,
        )
    elif need_weight2:
        a = _activation(h, torch.empty_like(h))
    d_weight2 = None if a is None else dy.t() @ a
    del a  # before dx needs memory
    d_weight1 = dh.t() @ x.reshape(-1, x.shape[-1]) if dh is not None and need_weight1 else None
    dx = (dh @ weight1).view(x.shape) if dh is not None and need_x else None
    d_bias1 = None if partials is None else partials.sum(0).to(weight1.dtype)
    return dx, d_weight1, d_bias1, d_weight2, dy.sum(0) if need_bias2 else None


def _activation(h: Tensor, a: Tensor) -> Tensor:
    """Write gelu(h) into a, which may be h."""
    config = PASS.pick(hidden=h.shape[-1], bytes=h.element_size())
    launch(_forward_pass, (triton.cdiv(h.numel(), config["BLOCK"]),), h, a, h.numel(), **config)
    return a
