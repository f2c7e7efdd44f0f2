"""The forward kernel. Softmax over a group of keys is one pass, in registers; groups are merged once.

A program has one head of one sequence, its keys and values RESIDENT, and goes through the queries tile by tile. Where
they don't fit (fp32, wide heads), a program has one tile of queries, and keys and values come chunk by chunk.
"""

# mypy: disable-error-code="assignment,misc,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from mpdit_kernels.short_attn.tiles import inner, load_group, load_rows, outer, store_rows, zeros


@triton.jit
def forward_kernel(
    qkv,  # [N, 3, H, D], neighbours in memory within each of N rows
    out,  # out [N', H, D]
    logs,  # out fp32 [H, N']: base-2 logarithm of the sum that each query's weights are divided by
    starts,  # int64 [S] or None: each sequence's first row, and
    out_starts,  # int64 [S]: its first row of the result
    T,
    first_query,
    scale,  # of scores, times log2(e)
    row,
    sequence,
    out_rows,  # N'
    H: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    RESIDENT: tl.constexpr,
    PADDED: tl.constexpr,
):
    s = tl.program_id(0) // H
    h = tl.program_id(0) % H
    if starts is not None:
        q = qkv + tl.load(starts + s) * row + h * D
        to = tl.load(out_starts + s)
    else:
        q = qkv + s.to(tl.int64) * sequence + h * D
        to = s.to(tl.int64) * (T - first_query)
    k = q + H * D
    v = q + 2 * H * D
    q += first_query * row
    out += to * (H * D) + h * D
    logs += h.to(tl.int64) * out_rows + to
    keys = ()
    values = ()
    if RESIDENT:
        for g in tl.static_range(len(GROUPS)):
            keys = keys + (load_group(k, T, row, KEYS, GROUPS[g][0], GROUPS[g][1], COLUMNS, D),)
            values = values + (load_group(v, T, row, KEYS, GROUPS[g][0], GROUPS[g][1], COLUMNS, D),)
    asked = T - first_query
    # LLVM would compute what every product addresses before the loop, and keep it in more registers than there are.
    for first in tl.range(tl.program_id(1) * QUERIES, asked, tl.num_programs(1) * QUERIES, disable_licm=True):
        rows = tl.arange(0, QUERIES)
        queries = load_rows(q + first * row, rows, asked - first, row, COLUMNS, D)
        if RESIDENT:
            top, total, result = _attend(queries, keys[0], values[0], T, scale, KEYS, 0, GROUPS[0][1], QUERIES, PADDED)
            for g in tl.static_range(1, len(GROUPS)):
                tl.debug_barrier()  # or this group's products are begun before the last one's registers are free
                top, total, result = _merged(
                    *(top, total, result),
                    *_attend(
                        *(queries, keys[g], values[g], T, scale),
                        *(KEYS, GROUPS[g][0], GROUPS[g][1], QUERIES, PADDED),
                    ),
                )
        else:
            top = tl.full([QUERIES], float("-inf"), tl.float32)
            total = tl.zeros([QUERIES], tl.float32)
            result = zeros(QUERIES, COLUMNS)
            for key in tl.range(0, T, KEYS[0][1], disable_licm=True):
                chunk = load_group(k + key * row, T - key, row, KEYS, 0, 1, COLUMNS, D)
                worth = load_group(v + key * row, T - key, row, KEYS, 0, 1, COLUMNS, D)
                top, total, result = _merged(
                    *(top, total, result),
                    *_attend(queries, chunk, worth, T - key, scale, KEYS, 0, 1, QUERIES, PADDED),
                )
        store_rows(out + first * (H * D), rows, asked - first, H * D, result, (1 / total)[:, None], COLUMNS, D)
        tl.store(logs + first + rows, top + tl.log2(total), mask=rows < asked - first)


@triton.jit
def _attend(
    queries,
    keys,
    values,
    limit,
    scale,
    KEYS: tl.constexpr,
    BEGIN: tl.constexpr,
    END: tl.constexpr,
    QUERIES: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Of a group of keys: highest score and sum [QUERIES], and sum of values, by weights 2^(score - highest)."""
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    scores = ()
    for i in tl.static_range(END - BEGIN):
        score = inner(queries, keys[i])
        if PADDED and BEGIN + i + 1 == len(KEYS):
            at = KEYS[BEGIN + i][0] + tl.arange(0, KEYS[BEGIN + i][1])
            score = tl.where(at[None, :] < limit, score, float("-inf"))
        top = tl.maximum(top, tl.max(score, 1))
        scores = scores + (score,)
    top *= scale
    total = tl.zeros([QUERIES], tl.float32)
    weights = ()
    for i in tl.static_range(END - BEGIN):
        weight = tl.exp2(scores[i] * scale - top[:, None])
        total += tl.sum(weight, 1)
        weights = weights + (weight.to(values[i][0].dtype),)
    result = ()
    for i in tl.static_range(END - BEGIN):
        result = outer(weights[i], values[i], result)
    return top, total, result


@triton.jit
def _merged(top, total, result, top2, total2, result2):
    """Two groups of keys as one."""
    highest = tl.maximum(top, top2)
    weight = tl.exp2(top - highest)
    weight2 = tl.exp2(top2 - highest)
    merged = ()
    for j in tl.static_range(len(result)):
        merged = merged + (result[j] * weight[:, None] + result2[j] * weight2[:, None],)
    return highest, total * weight + total2 * weight2, merged
