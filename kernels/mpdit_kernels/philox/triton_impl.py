"""The Triton kernel: four numbers a lane, from the counter to the result in registers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpdit_kernels.launch import launch
from mpdit_kernels.philox.reference import INDEX_BASE, INDEX_SHIFT, quantiles

_BLOCK = 256
"""Counters of a program."""
_BASE: tl.constexpr = tl.constexpr(INDEX_BASE)
_SHIFT: tl.constexpr = tl.constexpr(INDEX_SHIFT)
_REST: tl.constexpr = tl.constexpr((1 << INDEX_SHIFT) - 1)


@triton.jit
def _uniform(word):
    return ((word >> 9).to(tl.float32) + 0.5) * (2.0**-23)


@triton.jit
def _normal(word, table, slope):
    # The reference's arithmetic, operation by operation.
    numerator = ((word << 1) | 1).to(tl.float64).to(tl.int64, bitcast=True)
    index = (numerator >> _SHIFT) - _BASE
    remainder = (numerator & _REST).to(tl.float32)
    lower_tail = tl.load(slope + index) * remainder + tl.load(table + index)
    return (lower_tail.to(tl.uint32, bitcast=True) ^ (word >> 31 << 31)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["key_low", "key_high", "purpose"])
def _draw(
    positions,  # int64 [B]
    table,  # fp32 [32 * 1024], where NORMAL
    slope,  # fp32, likewise
    out,  # fp32 [B, count]
    count,
    key_low,
    key_high,
    purpose,
    NORMAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + row)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    none = tl.zeros([BLOCK], tl.uint32)
    words = tl.philox_impl(
        block.to(tl.uint32),
        none + purpose.to(tl.uint32),
        none + position.to(tl.uint32),
        none + (position >> 32).to(tl.uint32),
        key_low.to(tl.uint32),
        key_high.to(tl.uint32),
        10,
    )
    for i in tl.static_range(4):
        column = 4 * block + i
        value = _normal(words[i], table, slope) if NORMAL else _uniform(words[i])
        tl.store(out + row * count + column, value, mask=column < count)


def draw(positions: Tensor, key: Sequence[int], count: int, normal: bool) -> Tensor:
    """Return numbers fp32 [B, count] for positions int64 [B]; key is (low, high, purpose), signed 32-bit words."""
    out = positions.new_empty((len(positions), count), dtype=torch.float32)
    table, slope = quantiles(positions.device) if normal else (None, None)
    counters = triton.cdiv(count, 4)
    block = min(_BLOCK, triton.next_power_of_2(max(1, counters)))
    launch(
        _draw,
        (len(positions), triton.cdiv(counters, block)),
        *(positions.contiguous(), table, slope, out, count, *key),
        NORMAL=normal,
        BLOCK=block,
        # A fused multiply-add would round once where the reference rounds twice.
        enable_fp_fusion=False,
    )
    return out
