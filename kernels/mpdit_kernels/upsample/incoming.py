"""The result's gradient, read once: its sum over the batch, and a copy in the products' dtype.

The sum holds the gradients of all that is added to tokens: both biases and the positions.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpdit_kernels.launch import Config, Tunable, launch


def _candidates() -> list[Config]:
    return [
        {"SAMPLES": samples, "BATCH": batch, "COLUMNS": columns, "num_warps": 4, "num_stages": 1}
        for samples in (1, 2, 4)
        for batch in (16, 32, 128)
        for columns in (512, 1024)
    ]


INCOMING = Tunable(
    "upsample.incoming",
    lambda: {"SAMPLES": 4, "BATCH": 32, "COLUMNS": 1024, "num_warps": 4, "num_stages": 1},
    _candidates,
)


@triton.jit
def _incoming(
    gradient,  # [B, N]
    narrow,  # out [B, N], where CAST
    sums,  # out fp32 [splits, N]
    B,
    N,
    CAST: tl.constexpr,
    SAMPLES: tl.constexpr,
    BATCH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    split = tl.program_id(1).to(tl.int64)
    total = tl.zeros([1, COLUMNS], tl.float32)
    for step in range(0, BATCH, SAMPLES):
        sample = split * BATCH + step + tl.arange(0, SAMPLES)[:, None]
        mask = (sample < B) & (at < N)
        values = tl.load(gradient + sample * N + at, mask=mask, other=0)
        if CAST:
            tl.store(narrow + sample * N + at, values.to(narrow.dtype.element_ty), mask=mask)
        total += tl.sum(values.to(tl.float32), 0, keep_dims=True)
    tl.store(sums + split * N + at, total, mask=at < N)


def sum_and_cast(d_out: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """d_out [B, T, D] as `dtype`, and its sum over the batch, fp32 [T, D]; one reading."""
    batch, elements = d_out.shape[0], d_out[0].numel() if len(d_out) else 0
    narrow = None if d_out.dtype == dtype else torch.empty(d_out.shape, dtype=dtype, device=d_out.device)
    config = INCOMING.pick()
    splits = triton.cdiv(batch, config["BATCH"])
    sums = torch.empty(splits, *d_out.shape[1:], dtype=torch.float32, device=d_out.device)
    grid = (triton.cdiv(elements, config["COLUMNS"]), splits)
    launch(_incoming, grid, d_out, narrow, sums, batch, elements, CAST=narrow is not None, **config)
    return d_out if narrow is None else narrow, sums[0] if splits == 1 else sums.sum(0)
