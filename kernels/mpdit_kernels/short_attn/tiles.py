"""What forward and backward share: one head's queries, keys or values as tiles that fit their sizes.

A head's width is the sum of powers of two of at least 16, columns past it being zero: 72 is 64 + 16 with 8 columns
idle, where one block would be 128. So are the keys: 80 tokens are 64 + 16, 272 are 256 + 16. COLUMNS and KEYS are such
sums, ((first, number), ...); rows of a head are tuples of tiles [rows, columns], one for each of COLUMNS.
"""

# mypy: disable-error-code="assignment,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

Chunks = tuple[tuple[int, int], ...]


def chunks(size: int, cap: int, first: int = 0) -> Chunks:
    """((first, number), ...), numbers being powers of two from 16 to `cap` that add up to `size`, rounded up to 16s."""
    parts, end = [], first + -(-size // 16) * 16
    while first < end:
        number = min(cap, 1 << ((end - first).bit_length() - 1))
        parts.append((first, number))
        first += number
    return tuple(parts)


def groups(size: int, most: int, cap: int) -> tuple[Chunks, Chunks]:
    """The chunks of `size` rows in equal groups of up to `most`; ((begin, end), ...) of each group's chunks."""
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


@triton.jit
def load_rows(base, rows, limit, stride, COLUMNS: tl.constexpr, D: tl.constexpr):
    """Rows [R] of one head at base; those from `limit` on are zero."""
    tiles = ()
    for j in tl.static_range(len(COLUMNS)):
        columns = COLUMNS[j][0] + tl.arange(0, COLUMNS[j][1])
        mask = rows[:, None] < limit
        if COLUMNS[j][0] + COLUMNS[j][1] > D:
            mask = mask & (columns[None, :] < D)
        tiles = tiles + (tl.load(base + rows[:, None] * stride + columns[None, :], mask=mask, other=0),)
    return tiles


@triton.jit
def load_group(
    base,
    limit,
    stride,
    KEYS: tl.constexpr,
    BEGIN: tl.constexpr,
    END: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
):
    """Rows of a group of keys or values, chunks BEGIN to END: a tuple for each."""
    rows = ()
    for i in tl.static_range(BEGIN, END):
        rows = rows + (load_rows(base, KEYS[i][0] + tl.arange(0, KEYS[i][1]), limit, stride, COLUMNS, D),)
    return rows


@triton.jit
def store_rows(base, rows, limit, stride, tiles, factor, COLUMNS: tl.constexpr, D: tl.constexpr):
    """Write factor * tiles, without rows from `limit` and columns from D on."""
    for j in tl.static_range(len(COLUMNS)):
        columns = COLUMNS[j][0] + tl.arange(0, COLUMNS[j][1])
        mask = rows[:, None] < limit
        if COLUMNS[j][0] + COLUMNS[j][1] > D:
            mask = mask & (columns[None, :] < D)
        values = (tiles[j] * factor).to(base.dtype.element_ty)
        tl.store(base + rows[:, None] * stride + columns[None, :], values, mask=mask)


@triton.jit
def inner(left, right):
    """left @ right^T, fp32 [R, R'], of two rows of tiles; fp32 operands without TF32."""
    total = tl.dot(left[0], tl.trans(right[0]), input_precision="ieee")
    for j in tl.static_range(1, len(left)):
        total = tl.dot(left[j], tl.trans(right[j]), total, input_precision="ieee")
    return total


@triton.jit
def outer(left, right, totals):
    """totals + left @ right, row by row of tiles; without totals where they are empty."""
    found = ()
    for j in tl.static_range(len(right)):
        if len(totals) == 0:
            found = found + (tl.dot(left, right[j], input_precision="ieee"),)
        else:
            found = found + (tl.dot(left, right[j], totals[j], input_precision="ieee"),)
    return found


@triton.jit
def zeros(R: tl.constexpr, COLUMNS: tl.constexpr):
    """fp32 rows to add up in."""
    tiles = ()
    for j in tl.static_range(len(COLUMNS)):
        tiles = tiles + (_zeros(R, COLUMNS[j][1]),)
    return tiles


@triton.jit
def _zeros(R: tl.constexpr, C: tl.constexpr):
    return tl.zeros([R, C], tl.float32)
