"""Kernels between the two matrix products, which are left to cuBLAS.

The first product leaves the r*r fine tokens of a coarse one side by side, so tokens before GELU are the rows of one
matrix: class tokens of all samples, then for each coarse token its offsets (i, j). The forward kernel takes each to its
place in the result: GELU, norm, and the patch's values appended as columns so that the skip rides in the second
product. It also writes the whole result, filled with biases and positions, which that product then reads and writes
again (tools/cases.py has the bytes). The backward kernel does the same way back, computing the normalised rows again. A
program takes one offset of several coarse tokens, or several class tokens, ROWS at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpdit_kernels.launch import Config, Tunable, launch
from mpdit_kernels.rows import (
    chunks,
    columns,
    gelu_gate,
    gelu_slope,
    load_rows,
    load_vector,
    row_mean,
    row_moments,
    rows_of,
    zeros,
)


def _candidates(width: int) -> list[Config]:
    return [
        {"ROWS": rows, "TOKENS": tokens, "CAP": cap, "num_warps": warps, "num_stages": 1}
        for cap in (128, 512, 1024)
        for warps in (4, 8)
        for rows in (1, 2, 4)
        for tokens in (8, 16, 32)
        if rows * width <= 1024 * warps and cap < 2 * width
    ]


def _default(width: int) -> Config:
    rows, warps = (2 if width <= 1024 else 1), (4 if width <= 2048 else 8)
    return {"ROWS": rows, "TOKENS": 16, "CAP": 1024, "num_warps": warps, "num_stages": 1}


FORWARD = Tunable("upsample.forward", _default, _candidates)
BACKWARD = Tunable("upsample.backward", lambda width: {**_default(width), "TOKENS": 32}, _candidates)
INCOMING = Tunable(
    "upsample.incoming",
    lambda: {"SAMPLES": 4, "BATCH": 32, "COLUMNS": 1024, "num_warps": 4, "num_stages": 1},
    lambda: [
        {"SAMPLES": samples, "BATCH": batch, "COLUMNS": columns, "num_warps": 4, "num_stages": 1}
        for samples in (1, 2, 4)
        for batch in (16, 32, 128)
        for columns in (512, 1024)
    ],
)


@triton.jit
def program(PROGRAMS, OFFSETS: tl.constexpr):
    """Locate a program's tokens: whether they are image tokens, which part of them, and at which offset."""
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


@triton.jit
def _normalized(values, image, eps, D: tl.constexpr, CHUNKS: tl.constexpr):
    """Rows after GELU, where `image`, and layer norm, with their reciprocal standard deviations."""
    activated = ()
    for i in tl.static_range(len(CHUNKS)):
        s, _ = gelu_gate(values[i])
        activated = activated + (tl.where(image, values[i] * s, values[i]),)
    mean, rstd = row_moments(activated, eps, D)
    normalized = ()
    for i in tl.static_range(len(CHUNKS)):
        normalized = normalized + ((activated[i] - mean[:, None]) * rstd[:, None],)
    return normalized, rstd


@triton.jit
def _forward(
    before,  # [B*(M + H*W*R*R), D]: tokens before GELU
    patches,  # [B, n1, K]
    refine_bias,  # [D]
    skip_bias,  # [D], where SKIP
    position,  # [n1, D], where POSITION
    normal,  # out [B*T, D + EXTRA]
    out,  # out [B, T, D]: biases and positions, to which the product is added in place
    B,
    M,
    H,
    W,
    PROGRAMS,
    eps,
    patches_batch,
    patches_token,
    R: tl.constexpr,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    K: tl.constexpr,
    EXTRA: tl.constexpr,
    BLOCK: tl.constexpr,
    SKIP: tl.constexpr,
    POSITION: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    tl.static_assert(TOKENS % ROWS == 0)
    image, part, offset = program(PROGRAMS, R * R)
    bias = load_vector(refine_bias, CHUNKS)
    if SKIP:
        skipped = load_vector(skip_bias, CHUNKS)
        both = ()
        for i in tl.static_range(len(CHUNKS)):
            both = both + (bias[i] + tl.where(image, skipped[i], 0.0),)
        bias = both
    for step in range(0, TOKENS, ROWS):
        index = part * TOKENS + step + tl.arange(0, ROWS)
        mask, sample, token, row = places(index, image, offset, B, M, H, W, R)
        target = sample * (M + H * W * R * R) + token
        values = load_rows(before + row * D, mask, CHUNKS)
        normalized, _ = _normalized(values, image, eps, D, CHUNKS)
        store_normal(
            normal, target, normalized, patches, patches_batch, patches_token, sample, token - M, mask, image,
            D, CHUNKS, K, EXTRA, BLOCK,
        )  # fmt: skip
        for i in tl.static_range(len(CHUNKS)):
            added = bias[i]
            if POSITION:
                place = position + (token - M)[:, None] * D + columns(CHUNKS, i)
                added = added + tl.load(place, mask=mask[:, None] & image, other=0).to(tl.float32)
            place = out + target[:, None] * D + columns(CHUNKS, i)
            tl.store(place, added.to(out.dtype.element_ty), mask=mask[:, None])


@triton.jit
def _backward(
    before,  # [B*(M + H*W*R*R), D]: tokens before GELU
    patches,  # [B, n1, K], where NORMAL
    d_normal,  # [B*T, D_STRIDE], where GRADIENT
    normal,  # out [B*T, D + EXTRA], where NORMAL
    d_before,  # out as before, where GRADIENT
    partials,  # out fp32 [parts, R*R, D]: of the expanding bias, where GRADIENT
    B,
    M,
    H,
    W,
    PROGRAMS,
    eps,
    patches_batch,
    patches_token,
    D_STRIDE: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    K: tl.constexpr,
    EXTRA: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMAL: tl.constexpr,
    GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    tl.static_assert(TOKENS % ROWS == 0)
    image, part, offset = program(PROGRAMS, R * R)
    sums = zeros(ROWS, CHUNKS)
    for step in range(0, TOKENS, ROWS):
        index = part * TOKENS + step + tl.arange(0, ROWS)
        mask, sample, token, row = places(index, image, offset, B, M, H, W, R)
        target = sample * (M + H * W * R * R) + token
        values = load_rows(before + row * D, mask, CHUNKS)
        normalized, rstd = _normalized(values, image, eps, D, CHUNKS)
        if NORMAL:
            store_normal(
                normal, target, normalized, patches, patches_batch, patches_token, sample, token - M, mask, image,
                D, CHUNKS, K, EXTRA, BLOCK,
            )  # fmt: skip
        if GRADIENT:
            gradients = load_rows(d_normal + target * D_STRIDE, mask, CHUNKS)
            products = ()
            for i in tl.static_range(len(CHUNKS)):
                products = products + (gradients[i] * normalized[i],)
            along = row_mean(products, D)[:, None]
            common = row_mean(gradients, D)[:, None]
            new_sums = ()
            for i in tl.static_range(len(CHUNKS)):
                total = (gradients[i] - normalized[i] * along - common) * rstd[:, None]
                s, ds = gelu_gate(values[i])
                total = tl.where(image, total * gelu_slope(values[i], s, ds), total)
                place = d_before + row[:, None] * D + columns(CHUNKS, i)
                tl.store(place, total.to(d_before.dtype.element_ty), mask=mask[:, None])
                # A row that doesn't exist may hold NaN where eps is 0.
                new_sums = new_sums + (sums[i] + tl.where(mask[:, None], total, 0.0),)
            sums = new_sums
    if GRADIENT:
        place = partials + (part.to(tl.int64) * (R * R) + offset) * D
        for i in tl.static_range(len(CHUNKS)):
            tl.store(place + columns(CHUNKS, i), tl.sum(sums[i], 0, keep_dims=True), mask=image)


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


def forward(
    x: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    refine: Tensor,
    refine_bias: Tensor,
    patches: Tensor | None,
    skip_bias: Tensor | None,
    position: Tensor | None,
    sizes: Sequence[int],
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (result [B, T, D], rows before GELU [B*T, D], image tokens [B*n0, D]); sizes are (m, r, h, w).

    expand [r*r*D, D] has rows (i, j, channel); refine [D, D + K padded to a multiple of 8] has the skip's columns.
    """
    m, r, h, w = sizes
    batch, width, tokens = x.shape[0], x.shape[2], m + h * w * r * r
    image = expand.new_empty(batch * h * w, width)
    image.view(batch, h * w, width).copy_(x[:, m:])
    before = expand.new_empty(batch * tokens, width)
    before[: batch * m].view(batch, m, width).copy_(x[:, :m])
    # A bias vector is added in cuBLASLt's epilogue, without a pass of its own.
    torch.addmm(expand_bias, image, expand.t(), out=before[batch * m :].view(-1, expand.shape[0]))
    normal = expand.new_empty(batch * tokens, refine.shape[1])
    out = x.new_empty(batch, tokens, width, dtype=dtype)
    patches = None if patches is None else rows_of(patches)
    config, programs, grid = _programs(FORWARD, batch, width, sizes)
    launch(
        _forward,
        grid,
        *(before, patches, refine_bias.contiguous(), None if skip_bias is None else skip_bias.contiguous()),
        *(None if position is None else position.contiguous(), normal, out),
        *(batch, m, h, w, programs, eps, *_strides(patches)),
        R=r,
        SKIP=skip_bias is not None,
        POSITION=position is not None,
        **_columns(refine, patches, config),
        **config,
    )
    accumulate(out.view(-1, width), normal, refine.t())
    return out, before, image


def backward(
    d_out: Tensor,
    before: Tensor,
    image: Tensor,
    expand: Tensor,
    refine: Tensor,
    patches: Tensor | None,
    sizes: Sequence[int],
    eps: float,
    dtype: torch.dtype,
    asked: Sequence[bool],
) -> list[Tensor | None]:
    """Return gradients of the forward's first eight arguments, None where not asked for; x's as `dtype`."""
    m, r, h, w = sizes
    batch, tokens, width = d_out.shape
    for_x, for_expand, for_bias, for_refine, for_refine_bias, for_patches, for_skip_bias, for_position = asked
    gradient = for_x or for_expand or for_bias
    d_out = d_out.contiguous()
    sums = None
    if for_refine_bias or for_skip_bias or for_position:
        d_out, sums = sum_and_cast(d_out, before.dtype)
    d_rows = d_out.to(before.dtype).view(-1, width)
    d_normal = None
    if gradient or for_patches:
        d_normal = d_rows @ (refine if for_patches else refine[:, :width])
    normal = before.new_empty(batch * tokens, refine.shape[1]) if for_refine else None
    d_before = torch.empty_like(before) if gradient else None
    config, programs, grid = _programs(BACKWARD, batch, width, sizes)
    partials = before.new_empty(programs // (r * r), r * r * width, dtype=torch.float32)
    taken = None if patches is None else rows_of(patches)
    if gradient or for_refine:
        launch(
            _backward,
            grid,
            *(before, taken, d_normal, normal, d_before, partials, batch, m, h, w, programs, eps, *_strides(taken)),
            D_STRIDE=0 if d_normal is None else d_normal.shape[1],
            R=r,
            NORMAL=for_refine,
            GRADIENT=gradient,
            **_columns(refine, patches, config),
            **config,
        )
    dx = d_expand = d_patches = None
    if d_before is not None:
        d_image = d_before[batch * m :].view(-1, expand.shape[0])
        if for_x:
            dx = d_out.new_empty(batch, m + h * w, width, dtype=dtype)
            dx[:, :m].copy_(d_before[: batch * m].view(batch, m, width))
            dx[:, m:].copy_((d_image @ expand).view(batch, h * w, width))
        d_expand = d_image.t() @ image if for_expand else None
    if for_patches and d_normal is not None and patches is not None:
        # Copied even where contiguous: an operator's outputs own their memory.
        columns_of_patches = d_normal.unflatten(0, (batch, tokens))[:, m:, width : width + patches.shape[2]]
        d_patches = columns_of_patches.clone(memory_format=torch.contiguous_format)
    return [
        dx,
        d_expand,
        partials.sum(0) if for_bias else None,
        None if normal is None else d_rows.t() @ normal,
        sums.sum(0) if sums is not None and for_refine_bias else None,
        d_patches,
        sums[m:].sum(0) if sums is not None and for_skip_bias else None,
        sums[m:].clone() if sums is not None and for_position else None,
    ]


def sum_and_cast(d_out: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return d_out [B, T, D] as `dtype`, and its sum over the batch, fp32 [T, D], reading it once.

    The sum holds the gradients of all that is added to tokens: both biases and the positions.
    """
    batch, elements = d_out.shape[0], d_out[0].numel() if len(d_out) else 0
    narrow = None if d_out.dtype == dtype else torch.empty(d_out.shape, dtype=dtype, device=d_out.device)
    config = INCOMING.pick()
    splits = triton.cdiv(batch, config["BATCH"])
    sums = torch.empty(splits, *d_out.shape[1:], dtype=torch.float32, device=d_out.device)
    grid = (triton.cdiv(elements, config["COLUMNS"]), splits)
    launch(_incoming, grid, d_out, narrow, sums, batch, elements, CAST=narrow is not None, **config)
    return d_out if narrow is None else narrow, sums[0] if splits == 1 else sums.sum(0)


def accumulate(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to out, in fp32, out being read and written whole; it has the operands' dtype or is fp32."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out)
    elif not out.is_cuda:  # the interpreter's tensors: no such product on the CPU
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), out=out)
    elif _adds_to_fp32(out.device, a.dtype):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:  # one more pass, and the product is rounded
        out += a @ b


@functools.cache
def _adds_to_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether this torch adds a product of narrow matrices to an fp32 one in place."""
    out, a = torch.zeros(16, 16, device=device), torch.ones(16, 16, dtype=dtype, device=device)
    try:
        torch.addmm(out, a, a, out_dtype=out.dtype, out=out)
    except (RuntimeError, TypeError):
        return False
    return True


def _programs(tunable: Tunable, batch: int, width: int, sizes: Sequence[int]) -> tuple[Config, int, tuple[int]]:
    """Return the configuration, how many programs take image tokens, and the grid with those that take class tokens."""
    m, r, h, w = sizes
    config = dict(tunable.pick(width=width))
    most = max(1, batch * max(m, h * w))  # no more tokens to a program than there are
    tokens = min(config["TOKENS"], triton.cdiv(most, config["ROWS"]) * config["ROWS"])
    programs = triton.cdiv(batch * h * w, tokens) * r * r
    return config | {"TOKENS": tokens}, programs, (programs + triton.cdiv(batch * m, tokens),)


def _columns(refine: Tensor, patches: Tensor | None, config: Config) -> Config:
    """Return constants that say how the second product's rows are made up."""
    width = refine.shape[0]
    extra = refine.shape[1] - width
    return {
        "D": width,
        "CHUNKS": chunks(width, config.pop("CAP")),
        "K": 0 if patches is None else patches.shape[2],
        "EXTRA": extra,
        "BLOCK": triton.next_power_of_2(extra),
    }


def _strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))
