"""The backward kernel: one launch gives the packed gradient, each number written once by the program that has its head.

Scores are computed again. A walk through the queries, with scores transposed so that weights and their gradients are
left operands straight from registers, adds up the key and value gradients of one block of keys. Where the block is ALL
keys, the same walk makes the query gradients. Otherwise, after a walk for each block, another makes them and computes
the scores a third time, which costs less than adding up in memory.
"""

# mypy: disable-error-code="assignment,no-untyped-def,unreachable"

from __future__ import annotations

import triton
import triton.language as tl

from mpdit_kernels.short_attn.tiles import inner, load_group, load_rows, outer, store_rows, zeros


@triton.jit
def backward_kernel(
    d_out,  # [N', H, D], neighbours in memory within each of N' rows
    qkv,  # [N, 3, H, D], likewise
    out,  # [N', H, D]
    logs,  # fp32 [H, N']
    d_qkv,  # out [N, 3, H, D]
    starts,  # int64 [S] or None
    out_starts,  # int64 [S]
    T,
    first_query,
    scale,
    scale2,  # times log2(e)
    row,
    sequence,
    d_out_row,
    d_out_sequence,
    out_rows,  # N'
    H: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALL: tl.constexpr,
    PADDED: tl.constexpr,
    QUERIES: tl.constexpr,
):
    s = tl.program_id(0) // H
    h = tl.program_id(0) % H
    if starts is not None:
        start = tl.load(starts + s)
        to = tl.load(out_starts + s)
        q = qkv + start * row + h * D
        d_out += to * d_out_row + h * D
    else:
        start = s.to(tl.int64) * T
        to = s.to(tl.int64) * (T - first_query)
        q = qkv + s.to(tl.int64) * sequence + h * D
        d_out += s.to(tl.int64) * d_out_sequence + h * D
    k = q + H * D
    q += first_query * row
    out += to * (H * D) + h * D
    logs += h.to(tl.int64) * out_rows + to
    dq = d_qkv + start * (3 * H * D) + h * D
    dk = dq + H * D
    for first in range(0, first_query, 16):
        rows = first + tl.arange(0, 16)
        store_rows(dq, rows, first_query, 3 * H * D, zeros(16, COLUMNS), 0, COLUMNS, D)
    dq += first_query * (3 * H * D)
    asked = T - first_query
    if ALL:
        _walk(
            *(q, k, d_out, out, logs, dq, dk, T, asked, scale, scale2, row, d_out_row),
            *(H, D, COLUMNS, KEYS, QUERIES, PADDED, True),
        )
    else:
        for key in tl.range(0, T, BLOCK, disable_licm=True):
            d = dk + key * (3 * H * D)
            _walk(
                *(q, k + key * row, d_out, out, logs, dq, d, T - key, asked, scale, scale2, row, d_out_row),
                *(H, D, COLUMNS, KEYS, QUERIES, PADDED, False),
            )
        for first in tl.range(0, asked, QUERIES, disable_licm=True):
            rows = tl.arange(0, QUERIES)
            queries = load_rows(q + first * row, rows, asked - first, row, COLUMNS, D)
            gradients = load_rows(d_out + first * d_out_row, rows, asked - first, d_out_row, COLUMNS, D)
            along = _along(out + first * (H * D), gradients, asked - first, H, D, COLUMNS, QUERIES)
            log = tl.load(logs + first + rows, mask=rows < asked - first, other=float("inf"))
            found = zeros(QUERIES, COLUMNS)
            for key in tl.range(0, T, BLOCK, disable_licm=True):
                at = tl.arange(0, BLOCK)
                keys = load_rows(k + key * row, at, T - key, row, COLUMNS, D)
                values = load_rows(k + key * row + H * D, at, T - key, row, COLUMNS, D)
                weight = tl.exp2(inner(queries, keys) * scale2 - log[:, None])
                if PADDED:
                    weight = tl.where(at[None, :] < T - key, weight, 0)
                d_score = weight * (inner(gradients, values) - along[:, None])
                found = outer(d_score.to(q.dtype.element_ty), keys, found)
            store_rows(dq + first * (3 * H * D), rows, asked - first, 3 * H * D, found, scale, COLUMNS, D)


@triton.jit
def _walk(
    q,
    k,
    d_out,
    out,
    logs,
    dq,
    dk,
    limit,
    asked,
    scale,
    scale2,
    row,
    d_out_row,
    H: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    PADDED: tl.constexpr,
    ALL: tl.constexpr,
):
    """Through all queries for one block of keys: gradients of its keys and values; of the queries too, if it is ALL."""
    keys = load_group(k, limit, row, KEYS, 0, len(KEYS), COLUMNS, D)
    values = load_group(k + H * D, limit, row, KEYS, 0, len(KEYS), COLUMNS, D)
    d_keys = ()
    d_values = ()
    for i in tl.static_range(len(KEYS)):
        d_keys = d_keys + (zeros(KEYS[i][1], COLUMNS),)
        d_values = d_values + (zeros(KEYS[i][1], COLUMNS),)
    # LLVM would compute what every product addresses before the loop, and keep it in more registers than there are.
    for first in tl.range(0, asked, QUERIES, disable_licm=True):
        rows = tl.arange(0, QUERIES)
        queries = load_rows(q + first * row, rows, asked - first, row, COLUMNS, D)
        gradients = load_rows(d_out + first * d_out_row, rows, asked - first, d_out_row, COLUMNS, D)
        log = tl.load(logs + first + rows, mask=rows < asked - first, other=float("inf"))  # weights past the last are 0
        weights = ()
        d_weights = ()
        for i in tl.static_range(len(KEYS)):
            weight = tl.exp2(inner(keys[i], queries) * scale2 - log[None, :])
            if PADDED and i + 1 == len(KEYS):
                at = KEYS[i][0] + tl.arange(0, KEYS[i][1])
                weight = tl.where(at[:, None] < limit, weight, 0)  # else infinite where all scores are low
            weights = weights + (weight,)
            d_weights = d_weights + (inner(values[i], gradients),)
        if ALL:
            along = tl.zeros([QUERIES], tl.float32)
            for i in tl.static_range(len(KEYS)):
                along += tl.sum(weights[i] * d_weights[i], 0)
        else:
            along = _along(out + first * (H * D), gradients, asked - first, H, D, COLUMNS, QUERIES)
        found = ()
        new_keys = ()
        new_values = ()
        for i in tl.static_range(len(KEYS)):
            d_score = (weights[i] * (d_weights[i] - along[None, :])).to(q.dtype.element_ty)
            new_values = new_values + (outer(weights[i].to(q.dtype.element_ty), gradients, d_values[i]),)
            new_keys = new_keys + (outer(d_score, queries, d_keys[i]),)
            if ALL:
                found = outer(tl.trans(d_score), keys[i], found)
        d_keys = new_keys
        d_values = new_values
        if ALL:
            store_rows(dq + first * (3 * H * D), rows, asked - first, 3 * H * D, found, scale, COLUMNS, D)
    for i in tl.static_range(len(KEYS)):
        rows = KEYS[i][0] + tl.arange(0, KEYS[i][1])
        store_rows(dk, rows, limit, 3 * H * D, d_keys[i], scale, COLUMNS, D)
        store_rows(dk + H * D, rows, limit, 3 * H * D, d_values[i], 1, COLUMNS, D)


@triton.jit
def _along(out, gradients, limit, H: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, QUERIES: tl.constexpr):
    """Products [QUERIES] of results with their gradients: the sum over all keys of weights times theirs."""
    results = load_rows(out, tl.arange(0, QUERIES), limit, H * D, COLUMNS, D)
    along = tl.zeros([QUERIES], tl.float32)
    for j in tl.static_range(len(COLUMNS)):
        along += tl.sum(gradients[j].to(tl.float32) * results[j].to(tl.float32), 1)
    return along
