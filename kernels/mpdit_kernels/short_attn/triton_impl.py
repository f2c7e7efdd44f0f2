"""Attention over few tokens: forward and backward kernels, their configurations and launchers.

Of one head, with queries q [T - f, d] and keys k and values v [T, d] in the packed projection (Vaswani et al., 2017):

    s = scale * q @ k^T,  p = softmax(s),  out = p @ v

and backward (FlashAttention-2, Dao, 2023, section 3.1), with p = 2^(log2(e) * s - lse) of the kept lse[i] =
log2(sum_j e^s[i, j]):

    dv = p^T @ d_out,  dp = d_out @ v^T,  delta_i = sum_d out[i, d] * d_out[i, d] = sum_j p[i, j] * dp[i, j]
    ds = p * (dp - delta),  dq = scale * ds @ k,  dk = scale * ds^T @ q

One head's queries, keys or values are tuples of tiles that fit their sizes. A head's width is the sum of powers of two
of at least 16, columns past it being zero: 72 is 64 + 16 with 8 columns idle, where one block would be 128. So are the
keys: 80 tokens are 64 + 16, 272 are 256 + 16. COLUMNS and KEYS are such sums, ((first, number), ...).

Forward, a program has one head of one sequence, its keys and values RESIDENT, and goes through the queries tile by
tile. Softmax over a group of keys is one pass, in registers; groups are merged once. Where they don't fit (fp32, wide
heads), a program has one tile of queries, and keys and values come chunk by chunk.

Backward, one launch gives the packed gradient, each number written once by the program that has its head. Scores are
computed again. For each block of keys a loop over the queries adds up dk and dv, with scores transposed so that p^T and
ds^T are left operands straight from registers. Where the block is ALL_KEYS, the same loop makes dq. Otherwise another
before the loops of all blocks makes dq, and computes the scores a third time, which costs less than adding up in
memory. It leaves delta, in memory, to the loops after it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpdit_kernels.dispatch import shared_limit
from mpdit_kernels.launch import Config, Tunable, launch, target
from mpdit_kernels.rows import zeros

MAX_COLUMNS = 128
LOG2E = math.log2(math.e)

Chunks = tuple[tuple[int, int], ...]


def chunks(size: int, cap: int, first: int = 0) -> Chunks:
    """Return ((first, number), ...), powers of two from 16 to `cap` that add up to `size`, rounded up to 16s."""
    parts, end = [], first + -(-size // 16) * 16
    while first < end:
        number = min(cap, 1 << ((end - first).bit_length() - 1))
        parts.append((first, number))
        first += number
    return tuple(parts)


def groups(size: int, most: int, cap: int) -> tuple[Chunks, Chunks]:
    """Return the chunks of `size` rows in equal groups of up to `most`, and ((begin, end), ...) of each group's."""
    sixteens = -(-size // 16)
    count = -(-sixteens * 16 // most)
    found: Chunks = ()
    ranges: Chunks = ()
    for g in range(count):
        first, end = (16 * (sixteens * bound // count) for bound in (g, g + 1))
        group = chunks(end - first, cap, first)
        ranges += ((len(found), len(found) + len(group)),)
        found += group
    return found, ranges


def _forward(queries: int, group: int, cap: int, warps: int) -> Config:
    """Tile so many queries, with keys in groups, in chunks of up to `cap`. A group of 0: chunks come one by one."""
    return {"QUERIES": queries, "GROUP": group, "CAP": cap, "num_warps": warps, "num_stages": 1}


def _default(tokens: int, width: int, bytes: int) -> Config:
    if bytes > 2:
        return _forward(16, 0, 32, 4)
    if not _fits(tokens, width):
        return _forward(64, 0, 64, 4)
    # As many keys at once as leave the registers of a thread without spills.
    if target() == "sm_90":
        return _forward(64, 320, 256, 4) if tokens <= 272 else _forward(64, 160, 64, 4)
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
    """Return whether keys, values and a tile of queries fit into a program's shared memory, in a 16-bit dtype."""
    columns = sum(number for _, number in chunks(width, MAX_COLUMNS))
    return width <= 80 and 2 * columns * (2 * tokens + 64) <= shared_limit(target())


def _backward(queries: int, block: int, warps: int, whole: bool = False) -> Config:
    """Tile so many queries, with keys by the block; with `whole` all keys at once, in chunks of up to a block."""
    return {"QUERIES": queries, "BLOCK": block, "ALL_KEYS": whole, "num_warps": warps, "num_stages": 1}


def _default_backward(tokens: int, width: int, bytes: int) -> Config:
    if bytes > 2:
        return _backward(16, 32, 4)
    if width > 80:
        return _backward(32, 64, 8)
    if width <= 64 and tokens <= 80:
        return _backward(32, 64, 4, whole=True)
    if tokens <= 80 and target() == "sm_90":  # on sm_80 this spills
        return _backward(64, 128, 8, whole=True)
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


@triton.jit
def load_rows(base, rows, limit, row_stride, COLUMNS: tl.constexpr, D: tl.constexpr):
    """Return rows [R] of one head at base, those from `limit` on as zero: a tuple of tiles, one for each of COLUMNS."""
    tiles = ()
    for j in tl.static_range(len(COLUMNS)):
        columns = COLUMNS[j][0] + tl.arange(0, COLUMNS[j][1])
        mask = rows[:, None] < limit
        if COLUMNS[j][0] + COLUMNS[j][1] > D:
            mask = mask & (columns[None, :] < D)
        tiles = tiles + (tl.load(base + rows[:, None] * row_stride + columns[None, :], mask=mask, other=0),)
    return tiles


@triton.jit
def load_group(
    base, limit, row_stride, KEYS: tl.constexpr, BEGIN: tl.constexpr, END: tl.constexpr, COLUMNS: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Return rows of a group of keys or values, chunks BEGIN to END of KEYS: for each a tuple of tiles."""
    chunks_of_rows = ()
    for i in tl.static_range(BEGIN, END):
        rows = KEYS[i][0] + tl.arange(0, KEYS[i][1])
        chunks_of_rows = chunks_of_rows + (load_rows(base, rows, limit, row_stride, COLUMNS, D),)
    return chunks_of_rows


@triton.jit
def store_rows(base, rows, limit, row_stride, tiles, factor, COLUMNS: tl.constexpr, D: tl.constexpr):
    """Write factor * tiles, without rows from `limit` and columns from D on."""
    for j in tl.static_range(len(COLUMNS)):
        columns = COLUMNS[j][0] + tl.arange(0, COLUMNS[j][1])
        mask = rows[:, None] < limit
        if COLUMNS[j][0] + COLUMNS[j][1] > D:
            mask = mask & (columns[None, :] < D)
        values = (tiles[j] * factor).to(base.dtype.element_ty)
        tl.store(base + rows[:, None] * row_stride + columns[None, :], values, mask=mask)


@triton.jit
def dot_transposed(left, right):
    """Return left @ right^T, fp32 [R, R'], of tuples of tiles [R, C] and [R', C]; fp32 operands without TF32."""
    total = tl.dot(left[0], tl.trans(right[0]), input_precision="ieee")
    for j in tl.static_range(1, len(left)):
        total = tl.dot(left[j], tl.trans(right[j]), total, input_precision="ieee")
    return total


@triton.jit
def dot_plain(left, right, acc):
    """Return acc + left @ right of a tile [R, R'] and a tuple of tiles [R', C]; an empty acc is zero."""
    products = ()
    for j in tl.static_range(len(right)):
        if len(acc) == 0:
            products = products + (tl.dot(left, right[j], input_precision="ieee"),)
        else:
            products = products + (tl.dot(left, right[j], acc[j], input_precision="ieee"),)
    return products


@triton.jit
def forward_kernel(
    qkv,  # [N, 3, H, D], neighbours in memory within each of N rows
    out,  # out [N', H, D]
    lse,  # out fp32 [H, N']: base-2 logarithm of the sum that each query's weights are divided by
    starts,  # int64 [S] or None: each sequence's first row, and
    out_starts,  # int64 [S]: its first row of the result
    T,
    query_start,
    scale_log2,  # scale of scores, times log2(e)
    row_stride,
    sequence_stride,
    num_out_rows,  # N'
    H: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    RESIDENT: tl.constexpr,
    PADDED: tl.constexpr,
):
    # This program's sequence and head, and where they begin.
    s = tl.program_id(0) // H
    h = tl.program_id(0) % H
    if starts is not None:
        q = qkv + tl.load(starts + s) * row_stride + h * D
        out_row = tl.load(out_starts + s)
    else:
        q = qkv + s.to(tl.int64) * sequence_stride + h * D
        out_row = s.to(tl.int64) * (T - query_start)
    k = q + H * D
    v = q + 2 * H * D
    q += query_start * row_stride
    out += out_row * (H * D) + h * D
    lse += h.to(tl.int64) * num_out_rows + out_row

    # Keys and values of each group, a tuple of chunks of tuples of tiles [keys, columns], for all tiles of queries
    keys = ()
    values = ()
    if RESIDENT:
        for g in tl.static_range(len(GROUPS)):
            keys = keys + (load_group(k, T, row_stride, KEYS, GROUPS[g][0], GROUPS[g][1], COLUMNS, D),)
            values = values + (load_group(v, T, row_stride, KEYS, GROUPS[g][0], GROUPS[g][1], COLUMNS, D),)

    num_queries = T - query_start
    # LLVM would compute what every product addresses before the loop, and keep it in more registers than there are.
    for first in tl.range(tl.program_id(1) * QUERIES, num_queries, tl.num_programs(1) * QUERIES, disable_licm=True):
        rows = tl.arange(0, QUERIES)
        limit = num_queries - first
        queries = load_rows(q + first * row_stride, rows, limit, row_stride, COLUMNS, D)  # [QUERIES, columns]
        if RESIDENT:
            m_i, l_i, acc = _attend(queries, keys[0], values[0], T, scale_log2, KEYS, 0, GROUPS[0][1], QUERIES, PADDED)
            for g in tl.static_range(1, len(GROUPS)):
                tl.debug_barrier()  # or this group's products are begun before the last one's registers are free
                m_g, l_g, acc_g = _attend(
                    queries, keys[g], values[g], T, scale_log2, KEYS, GROUPS[g][0], GROUPS[g][1], QUERIES, PADDED
                )
                m_i, l_i, acc = _merge(m_i, l_i, acc, m_g, l_g, acc_g)
        else:
            m_i = tl.full([QUERIES], float("-inf"), tl.float32)
            l_i = tl.zeros([QUERIES], tl.float32)
            acc = zeros(QUERIES, COLUMNS)
            for key in tl.range(0, T, KEYS[0][1], disable_licm=True):
                chunk_k = load_group(k + key * row_stride, T - key, row_stride, KEYS, 0, 1, COLUMNS, D)
                chunk_v = load_group(v + key * row_stride, T - key, row_stride, KEYS, 0, 1, COLUMNS, D)
                m_g, l_g, acc_g = _attend(queries, chunk_k, chunk_v, T - key, scale_log2, KEYS, 0, 1, QUERIES, PADDED)
                m_i, l_i, acc = _merge(m_i, l_i, acc, m_g, l_g, acc_g)
        # out = acc / l_i, lse = m_i + log2(l_i)
        store_rows(out + first * (H * D), rows, limit, H * D, acc, (1 / l_i)[:, None], COLUMNS, D)
        tl.store(lse + first + rows, m_i + tl.log2(l_i), mask=rows < limit)


@triton.jit
def _attend(
    queries, keys, values, limit, scale_log2, KEYS: tl.constexpr, BEGIN: tl.constexpr, END: tl.constexpr,
    QUERIES: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Attend to a group of keys, chunks BEGIN to END: return m_i, l_i [QUERIES] and acc, tiles [QUERIES, columns].

    They are the top score m_i = max_j s[i, j], scaled for base 2, the sum l_i = sum_j p[i, j] of the weights p[i, j] =
    2^(s[i, j] - m_i), and acc = p @ v.
    """
    # s = q @ k^T of each chunk: [QUERIES, keys]
    m_i = tl.full([QUERIES], float("-inf"), tl.float32)
    scores = ()
    for i in tl.static_range(END - BEGIN):
        score = dot_transposed(queries, keys[i])
        if PADDED and BEGIN + i + 1 == len(KEYS):
            at = KEYS[BEGIN + i][0] + tl.arange(0, KEYS[BEGIN + i][1])
            score = tl.where(at[None, :] < limit, score, float("-inf"))
        m_i = tl.maximum(m_i, tl.max(score, 1))
        scores = scores + (score,)

    # p = 2^(scale_log2 * s - m_i), l_i = sum_j p: the scale is positive, so the top score stays the top
    m_i *= scale_log2
    l_i = tl.zeros([QUERIES], tl.float32)
    weights = ()
    for i in tl.static_range(END - BEGIN):
        p = tl.exp2(scores[i] * scale_log2 - m_i[:, None])
        l_i += tl.sum(p, 1)
        weights = weights + (p.to(values[i][0].dtype),)

    # acc = p @ v
    acc = ()
    for i in tl.static_range(END - BEGIN):
        acc = dot_plain(weights[i], values[i], acc)
    return m_i, l_i, acc


@triton.jit
def _merge(m_i, l_i, acc, m_g, l_g, acc_g):
    """Return (m_i, l_i, acc) of two groups of keys together: both are scaled to the higher of their top scores."""
    m_new = tl.maximum(m_i, m_g)
    alpha = tl.exp2(m_i - m_new)
    alpha_g = tl.exp2(m_g - m_new)
    merged = ()
    for j in tl.static_range(len(acc)):
        merged = merged + (acc[j] * alpha[:, None] + acc_g[j] * alpha_g[:, None],)
    return m_new, l_i * alpha + l_g * alpha_g, merged


@triton.jit
def backward_kernel(
    d_out,  # [N', H, D], neighbours in memory within each of N' rows
    qkv,  # [N, 3, H, D], likewise
    out,  # [N', H, D]
    lse,  # fp32 [H, N']
    delta,  # scratch fp32 [H, N'], unless ALL_KEYS
    d_qkv,  # out [N, 3, H, D]
    starts,  # int64 [S] or None
    out_starts,  # int64 [S]
    T,
    query_start,
    scale,
    scale_log2,  # scale times log2(e)
    row_stride,
    sequence_stride,
    d_out_row_stride,
    d_out_sequence_stride,
    num_out_rows,  # N'
    H: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALL_KEYS: tl.constexpr,
    PADDED: tl.constexpr,
    QUERIES: tl.constexpr,
):
    # This program's sequence and head, and where they begin.
    s = tl.program_id(0) // H
    h = tl.program_id(0) % H
    if starts is not None:
        start = tl.load(starts + s)
        out_row = tl.load(out_starts + s)
        q = qkv + start * row_stride + h * D
        d_out += out_row * d_out_row_stride + h * D
    else:
        start = s.to(tl.int64) * T
        out_row = s.to(tl.int64) * (T - query_start)
        q = qkv + s.to(tl.int64) * sequence_stride + h * D
        d_out += s.to(tl.int64) * d_out_sequence_stride + h * D
    k = q + H * D
    v = q + 2 * H * D
    q += query_start * row_stride
    out += out_row * (H * D) + h * D
    lse += h.to(tl.int64) * num_out_rows + out_row
    if not ALL_KEYS:
        delta += h.to(tl.int64) * num_out_rows + out_row
    dq = d_qkv + start * (3 * H * D) + h * D
    dk = dq + H * D
    dv = dq + 2 * H * D

    # Tokens before query_start have no queries: zeros.
    for first in range(0, query_start, 16):
        rows = first + tl.arange(0, 16)
        store_rows(dq, rows, query_start, 3 * H * D, zeros(16, COLUMNS), 0, COLUMNS, D)
    dq += query_start * (3 * H * D)

    num_queries = T - query_start
    if ALL_KEYS:
        _backward_keys(
            q, k, v, d_out, lse, delta, dq, dk, dv, T, num_queries, scale, scale_log2, row_stride, d_out_row_stride,
            H, D, COLUMNS, KEYS, QUERIES, PADDED, True,
        )  # fmt: skip
    else:
        _backward_queries(
            q, k, v, d_out, out, lse, delta, dq, T, num_queries, scale, scale_log2, row_stride, d_out_row_stride,
            H, D, COLUMNS, BLOCK, QUERIES, PADDED,
        )  # fmt: skip
        tl.debug_barrier()  # delta, which some threads have written, is read by others
        for key in tl.range(0, T, BLOCK, disable_licm=True):
            block_k = k + key * row_stride
            block_v = v + key * row_stride
            block_dk = dk + key * (3 * H * D)
            block_dv = dv + key * (3 * H * D)
            _backward_keys(
                q, block_k, block_v, d_out, lse, delta, dq, block_dk, block_dv, T - key, num_queries, scale, scale_log2,
                row_stride, d_out_row_stride, H, D, COLUMNS, KEYS, QUERIES, PADDED, False,
            )  # fmt: skip


@triton.jit
def _backward_keys(
    q, k, v, d_out, lse, delta, dq, dk, dv, limit, num_queries, scale, scale_log2, row_stride, d_out_row_stride,
    H: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr,
    PADDED: tl.constexpr, ALL_KEYS: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of one block of keys, by one loop over the queries; dq too, if the block is ALL_KEYS."""
    keys = load_group(k, limit, row_stride, KEYS, 0, len(KEYS), COLUMNS, D)
    values = load_group(v, limit, row_stride, KEYS, 0, len(KEYS), COLUMNS, D)
    dk_acc = ()
    dv_acc = ()
    for i in tl.static_range(len(KEYS)):
        dk_acc = dk_acc + (zeros(KEYS[i][1], COLUMNS),)
        dv_acc = dv_acc + (zeros(KEYS[i][1], COLUMNS),)

    # LLVM would compute what every product addresses before the loop, and keep it in more registers than there are.
    for first in tl.range(0, num_queries, QUERIES, disable_licm=True):
        rows = tl.arange(0, QUERIES)
        query_limit = num_queries - first
        queries = load_rows(q + first * row_stride, rows, query_limit, row_stride, COLUMNS, D)
        d_outs = load_rows(d_out + first * d_out_row_stride, rows, query_limit, d_out_row_stride, COLUMNS, D)
        # Weights past the last query are 0.
        lse_i = tl.load(lse + first + rows, mask=rows < query_limit, other=float("inf"))

        # p^T = 2^(scale_log2 * k @ q^T - lse), dp^T = v @ d_out^T of each chunk: [keys, QUERIES]
        weights = ()
        d_weights = ()
        for i in tl.static_range(len(KEYS)):
            p = tl.exp2(dot_transposed(keys[i], queries) * scale_log2 - lse_i[None, :])
            if PADDED and i + 1 == len(KEYS):
                at = KEYS[i][0] + tl.arange(0, KEYS[i][1])
                p = tl.where(at[:, None] < limit, p, 0)  # else infinite where all scores are low
            weights = weights + (p,)
            d_weights = d_weights + (dot_transposed(values[i], d_outs),)

        # delta_i = sum_j p[i, j] * dp[i, j]: [QUERIES]
        if ALL_KEYS:
            delta_i = tl.zeros([QUERIES], tl.float32)
            for i in tl.static_range(len(KEYS)):
                delta_i += tl.sum(weights[i] * d_weights[i], 0)
        else:
            delta_i = tl.load(delta + first + rows, mask=rows < query_limit, other=0)

        # ds^T = p^T * (dp^T - delta), dv += p^T @ d_out, dk += ds^T @ q, dq = ds @ k
        dq_acc = ()
        new_dk = ()
        new_dv = ()
        for i in tl.static_range(len(KEYS)):
            ds = (weights[i] * (d_weights[i] - delta_i[None, :])).to(q.dtype.element_ty)
            new_dv = new_dv + (dot_plain(weights[i].to(q.dtype.element_ty), d_outs, dv_acc[i]),)
            new_dk = new_dk + (dot_plain(ds, queries, dk_acc[i]),)
            if ALL_KEYS:
                dq_acc = dot_plain(tl.trans(ds), keys[i], dq_acc)
        dk_acc = new_dk
        dv_acc = new_dv
        if ALL_KEYS:
            store_rows(dq + first * (3 * H * D), rows, query_limit, 3 * H * D, dq_acc, scale, COLUMNS, D)

    for i in tl.static_range(len(KEYS)):
        rows = KEYS[i][0] + tl.arange(0, KEYS[i][1])
        store_rows(dk, rows, limit, 3 * H * D, dk_acc[i], scale, COLUMNS, D)
        store_rows(dv, rows, limit, 3 * H * D, dv_acc[i], 1, COLUMNS, D)


@triton.jit
def _backward_queries(
    q, k, v, d_out, out, lse, delta, dq, T, num_queries, scale, scale_log2, row_stride, d_out_row_stride,
    H: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """Write delta and dq, tile by tile, from all keys and values, which come in blocks."""
    for first in tl.range(0, num_queries, QUERIES, disable_licm=True):
        rows = tl.arange(0, QUERIES)
        limit = num_queries - first
        queries = load_rows(q + first * row_stride, rows, limit, row_stride, COLUMNS, D)
        d_outs = load_rows(d_out + first * d_out_row_stride, rows, limit, d_out_row_stride, COLUMNS, D)
        # delta_i = sum_d out[i, d] * d_out[i, d]: [QUERIES]
        outs = load_rows(out + first * (H * D), rows, limit, H * D, COLUMNS, D)
        delta_i = tl.zeros([QUERIES], tl.float32)
        for j in tl.static_range(len(COLUMNS)):
            delta_i += tl.sum(d_outs[j].to(tl.float32) * outs[j].to(tl.float32), 1)
        tl.store(delta + first + rows, delta_i, mask=rows < limit)
        lse_i = tl.load(lse + first + rows, mask=rows < limit, other=float("inf"))
        dq_acc = zeros(QUERIES, COLUMNS)
        for key in tl.range(0, T, BLOCK, disable_licm=True):
            at = tl.arange(0, BLOCK)
            keys = load_rows(k + key * row_stride, at, T - key, row_stride, COLUMNS, D)
            values = load_rows(v + key * row_stride, at, T - key, row_stride, COLUMNS, D)
            # p = 2^(scale_log2 * q @ k^T - lse), ds = p * (d_out @ v^T - delta): [QUERIES, BLOCK]
            p = tl.exp2(dot_transposed(queries, keys) * scale_log2 - lse_i[:, None])
            if PADDED:
                p = tl.where(at[None, :] < T - key, p, 0)
            ds = p * (dot_transposed(d_outs, values) - delta_i[:, None])
            # dq += ds @ k
            dq_acc = dot_plain(ds.to(q.dtype.element_ty), keys, dq_acc)
        store_rows(dq + first * (3 * H * D), rows, limit, 3 * H * D, dq_acc, scale, COLUMNS, D)


def forward(
    qkv: Tensor, starts: Tensor | None, lengths: Sequence[int], scale: float, query_start: int
) -> tuple[Tensor, Tensor]:
    """Return (result, lse fp32 [H, N']) of qkv [B, T, 3, H, d], or of [N, 3, H, d] by starts and lengths."""
    *_, heads, width = qkv.shape
    qkv = _rows(qkv, 3)
    if starts is None:
        shape: tuple[int, ...] = (qkv.shape[0], qkv.shape[1] - query_start)
    else:
        shape = (qkv.shape[0] - starts.shape[1] * query_start,)
    out = torch.empty(*shape, heads, width, dtype=qkv.dtype, device=qkv.device)
    rows = math.prod(shape)
    lse = torch.empty(heads, rows, dtype=torch.float32, device=qkv.device)
    for tokens, count, first_rows, out_rows in _runs(qkv, starts, lengths):
        config = _pick(FORWARD, qkv, tokens)
        group, cap = config.pop("GROUP"), config.pop("CAP")
        tiles = 1 if group else triton.cdiv(tokens - query_start, config["QUERIES"])
        keys, ranges = groups(tokens, group, cap) if group else (((0, cap),), ((0, 1),))
        launch(
            forward_kernel,
            (count * heads, tiles),
            *(qkv, out, lse, first_rows, out_rows, tokens, query_start, scale * LOG2E),
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
    return out, lse


def backward(
    d_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor | None,
    lengths: Sequence[int],
    scale: float,
    query_start: int,
) -> Tensor:
    """Return the gradient of qkv, in its shape.

    Args:
        d_out: gradient of out.
        qkv, starts, lengths, scale, query_start: what `forward` was given.
        out, lse: what it returned.
    """
    *_, heads, width = qkv.shape
    d_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    qkv, d_out = _rows(qkv, 3), _rows(d_out, 2)
    for tokens, count, first_rows, out_rows in _runs(qkv, starts, lengths):
        config = _pick(BACKWARD, qkv, tokens)
        block, whole = config["BLOCK"], config["ALL_KEYS"]
        keys = chunks(tokens, block) if whole and block < tokens else ((0, block),)
        delta = None if whole else torch.empty_like(lse)
        launch(
            backward_kernel,
            (count * heads,),
            *(d_out, qkv, out, lse, delta, d_qkv, first_rows, out_rows, tokens, query_start, scale, scale * LOG2E),
            *(qkv.stride(-4), qkv.stride(0), d_out.stride(-3), d_out.stride(0), lse.shape[1]),
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
    """Yield (tokens, sequences, their first rows, their first rows of the result) of each launch; None where dense."""
    if starts is None:
        yield qkv.shape[1], qkv.shape[0], None, None
        return
    first = 0
    for tokens, count in zip(lengths[::2], lengths[1::2], strict=True):
        yield tokens, count, starts[0, first : first + count], starts[1, first : first + count]
        first += count


def _rows(x: Tensor, inner: int) -> Tensor:
    """Return x, or a copy: its last `inner` dimensions neighbours in memory, tokens within 32 bits of each other."""
    expected = 1
    for size, stride in zip(x.shape[: -inner - 1 : -1], x.stride()[: -inner - 1 : -1], strict=True):
        if size > 1 and stride != expected:
            return x.contiguous()
        expected *= size
    return x if x.stride(-inner - 1) * 512 < 2**31 else x.contiguous()  # of fewer tokens than that
