"""Configurations and launchers of the kernels in forward.py and backward.py."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import triton
from torch import Tensor

from mpdit_kernels.dispatch import shared_limit
from mpdit_kernels.launch import Config, Tunable, launch, target
from mpdit_kernels.short_attn.backward import backward_kernel
from mpdit_kernels.short_attn.forward import forward_kernel
from mpdit_kernels.short_attn.tiles import chunks, groups

MAX_COLUMNS = 128
MAX_TOKENS = 320
LOG2E = math.log2(math.e)


def _forward(queries: int, group: int, cap: int, warps: int) -> Config:
    """Queries of a tile; keys of a group, in chunks of up to `cap`. A group of 0 keys: chunks come one by one."""
    return {"QUERIES": queries, "GROUP": group, "CAP": cap, "num_warps": warps, "num_stages": 1}


def _default(tokens: int, width: int, bytes: int) -> Config:
    if bytes > 2:
        return _forward(16, 0, 32, 4)
    if not _fits(tokens, width):
        return _forward(64, 0, 64, 4)
    # As many keys at once as leave the registers of a thread without spills.
    if target() == "sm_90":
        return _forward(64, 320 if tokens <= 272 else 160, 64, 4)
    if tokens <= 160 or width <= 64:
        return _forward(64, 144, 128, 4)
    return _forward(128, 64, 64, 8) if target() == "sm_80" else _forward(64, 80, 64, 4)


def _candidates(tokens: int, width: int, bytes: int) -> list[Config]:
    if bytes > 2 or not _fits(tokens, width):
        return [_forward(queries, 0, cap, 4) for queries in (16, 32, 64) for cap in (32, 64)]
    return [
        _forward(queries, group, cap, warps)
        for queries, warps in ((64, 4), (128, 8), (32, 2), (16, 1))
        for group, cap in ((64, 64), (96, 64), (144, 128), (160, 64), (320, 64), (320, 256))
        if queries <= tokens and (group < tokens or group == 320)
    ] + [_forward(64, 0, 64, 4), _forward(128, 0, 64, 8)]


def _fits(tokens: int, width: int) -> bool:
    """Whether keys, values and a tile of queries fit into a program's shared memory, in a 16-bit dtype."""
    columns = sum(number for _, number in chunks(width, MAX_COLUMNS))
    return width <= 80 and 2 * columns * (2 * tokens + 64) <= shared_limit(target())


def _backward(queries: int, block: int, warps: int, whole: bool = False) -> Config:
    """Queries of a tile, keys of a block; with `whole` all keys at once, in chunks of up to a block."""
    return {"QUERIES": queries, "BLOCK": block, "ALL": whole, "num_warps": warps, "num_stages": 1}


def _default_backward(tokens: int, width: int, bytes: int) -> Config:
    if bytes > 2:
        return _backward(16, 32, 4)
    if width > 80:
        return _backward(32, 64, 8)
    if width <= 64 and tokens <= 80:
        return _backward(32, 64, 4, whole=True)
    return _backward(64 if target() == "sm_90" else 32, 64, 4)


def _candidates_backward(tokens: int, width: int, bytes: int) -> list[Config]:
    if bytes > 2 or width > 80:
        return [_backward(queries, 32, 4) for queries in (16, 32)]
    blocks = [_backward(queries, block, warps) for block in (64, 128) for queries in (16, 32, 64) for warps in (4, 8)]
    if tokens > 128:
        return blocks
    whole = [(16, 64, 4), (32, 64, 4), (32, 64, 8), (64, 64, 8), (16, 128, 8), (32, 128, 8), (64, 128, 8)]
    return blocks + [_backward(queries, block, warps, whole=True) for queries, block, warps in whole]


FORWARD = Tunable("short_attn.forward", _default, _candidates)
BACKWARD = Tunable("short_attn.backward", _default_backward, _candidates_backward)


def forward(
    qkv: Tensor, starts: Tensor | None, lengths: Sequence[int], scale: float, first_query: int
) -> tuple[Tensor, Tensor]:
    """(result, base-2 logarithms of sums fp32 [H, N']) of qkv [B,T,3,H,d], or of [N,3,H,d] by starts and lengths."""
    *_, heads, width = qkv.shape
    qkv = _rows(qkv, 3)
    if starts is None:
        shape: tuple[int, ...] = (qkv.shape[0], qkv.shape[1] - first_query)
    else:
        shape = (qkv.shape[0] - starts.shape[1] * first_query,)
    out = torch.empty(*shape, heads, width, dtype=qkv.dtype, device=qkv.device)
    rows = math.prod(shape)
    logs = torch.empty(heads, rows, dtype=torch.float32, device=qkv.device)
    for tokens, count, first_rows, out_rows in _runs(qkv, starts, lengths):
        config = _pick(FORWARD, qkv, tokens)
        group, cap = config.pop("GROUP"), config.pop("CAP")
        tiles = 1 if group else triton.cdiv(tokens - first_query, config["QUERIES"])
        keys, ranges = groups(tokens, group, cap) if group else (((0, cap),), ((0, 1),))
        launch(
            forward_kernel,
            (count * heads, tiles),
            *(qkv, out, logs, first_rows, out_rows, tokens, first_query, scale * LOG2E),
            *(qkv.stride(-4), qkv.stride(0), rows),
            H=heads,
            D=width,
            COLUMNS=chunks(width, MAX_COLUMNS),
            KEYS=keys,
            GROUPS=ranges,
            RESIDENT=group > 0,
            PADDED=tokens % (16 if group else cap) != 0,
            **config,
        )
    return out, logs


def backward(
    d_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    logs: Tensor,
    starts: Tensor | None,
    lengths: Sequence[int],
    scale: float,
    first_query: int,
) -> Tensor:
    """The gradient of qkv."""
    *_, heads, width = qkv.shape
    d_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    qkv, d_out = _rows(qkv, 3), _rows(d_out, 2)
    for tokens, count, first_rows, out_rows in _runs(qkv, starts, lengths):
        config = _pick(BACKWARD, qkv, tokens)
        block, whole = config["BLOCK"], config["ALL"]
        keys = chunks(tokens, block) if whole and block < tokens else ((0, block),)
        launch(
            backward_kernel,
            (count * heads,),
            *(d_out, qkv, out, logs, d_qkv, first_rows, out_rows, tokens, first_query, scale, scale * LOG2E),
            *(qkv.stride(-4), qkv.stride(0), d_out.stride(-3), d_out.stride(0), logs.shape[1]),
            H=heads,
            D=width,
            COLUMNS=chunks(width, MAX_COLUMNS),
            KEYS=keys,
            PADDED=tokens % sum(number for _, number in keys) != 0,
            **config,
        )
    return d_qkv


def _pick(tunable: Tunable, qkv: Tensor, tokens: int) -> Config:
    key = {"tokens": -(-tokens // 16) * 16, "width": qkv.shape[-1], "bytes": qkv.element_size()}
    return dict(tunable.pick(**key))


def _runs(
    qkv: Tensor, starts: Tensor | None, lengths: Sequence[int]
) -> Iterator[tuple[int, int, Tensor | None, Tensor | None]]:
    """(tokens, sequences, their first rows, their first rows of the result) of each launch; None where they follow."""
    if starts is None:
        yield qkv.shape[1], qkv.shape[0], None, None
        return
    first = 0
    for tokens, count in zip(lengths[::2], lengths[1::2], strict=True):
        yield tokens, count, starts[0, first : first + count], starts[1, first : first + count]
        first += count


def _rows(x: Tensor, inner: int) -> Tensor:
    """x whose last `inner` dimensions are neighbours in memory, and tokens within 32 bits of each other: or a copy."""
    expected = 1
    for size, stride in zip(x.shape[: -inner - 1 : -1], x.stride()[: -inner - 1 : -1], strict=True):
        if size > 1 and stride != expected:
            return x.contiguous()
        expected *= size
    return x if x.stride(-inner - 1) * MAX_TOKENS < 2**31 else x.contiguous()
