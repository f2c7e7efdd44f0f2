"""Device functions: which tokens a program takes, where they come from and where they go."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from mpdit_kernels.rows import columns


@triton.jit
def program(PROGRAMS, OFFSETS: tl.constexpr):
    """Whether this program's tokens are image tokens, which part of them it takes, and at which offset."""
    pid = tl.program_id(0)
    image = pid < PROGRAMS
    return image, tl.where(image, pid // OFFSETS, pid - PROGRAMS), tl.where(image, pid % OFFSETS, 0)


@triton.jit
def places(index, image, offset, B, M, H, W, R: tl.constexpr):
    """For tokens [ROWS], numbered over all samples: which exist, sample, token in the result, row before GELU."""
    each = tl.where(image, H * W, M)
    sample = index // each
    token = index - sample * each
    down = token // W
    fine = (down * R + offset // R) * (W * R) + (token - down * W) * R + offset % R
    before = tl.where(image, tl.cast(B, tl.int64) * M + index.to(tl.int64) * (R * R) + offset, index.to(tl.int64))
    return index < B * each, sample.to(tl.int64), tl.where(image, M + fine, token).to(tl.int64), before


@triton.jit
def store_normal(
    normal, target, values, patches, patches_batch, patches_token, sample, token, mask, image,
    D: tl.constexpr, CHUNKS: tl.constexpr, K: tl.constexpr, EXTRA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of the second product: normalised values, then the patch's values and zeros, EXTRA in all."""
    rows = normal + target[:, None] * (D + EXTRA)
    for i in tl.static_range(len(CHUNKS)):
        tl.store(rows + columns(CHUNKS, i), values[i].to(normal.dtype.element_ty), mask=mask[:, None])
    if EXTRA:
        at = tl.arange(0, BLOCK)[None, :]
        source = patches + sample[:, None] * patches_batch + token[:, None] * patches_token + at
        taken = tl.load(source, mask=mask[:, None] & image & (at < K), other=0)
        tl.store(rows + D + at, taken.to(normal.dtype.element_ty), mask=mask[:, None] & (at < EXTRA))
