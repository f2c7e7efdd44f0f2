"""Kernels between the two matrix products, which are left to cuBLAS.

Of m class tokens and n0 = h * w coarse image tokens a sample, T = m + r*r*n0 fine tokens are made:

    pre_gelu     = image @ expand^T + expand_bias               cuBLAS: r*r fine tokens a coarse one, side by side
    a            = GELU(pre_gelu), pixel-shuffled; class tokens join as they are                 _forward, to the end
    normalized   = (a - mean(a)) * rstd, rstd = 1 / sqrt(var(a) + eps), over each token's D columns
    refine_input = [normalized, patch values, zeros]            [B*T, D + SKIP_COLUMNS]
    out          = refine_bias + skip_bias + position           the last two of image tokens alone
    out         += refine_input @ refine^T                      cuBLAS, refine having the skip's weight as more columns

and backward, from g = (d_out @ refine)[:, :D]:

    d_a          = (g - normalized * mean(g * normalized) - mean(g)) * rstd                     _backward
    d_pre_gelu   = GELU'(pre_gelu) * d_a of image tokens, d_a of class tokens
    d_image      = d_pre_gelu @ expand,  d_expand = d_pre_gelu^T @ image,  d_refine = d_out^T @ refine_input     cuBLAS

pre_gelu is the rows of one matrix: class tokens of all samples, then for each coarse token its r*r offsets (i, j). The
forward kernel takes each row to its place in the result. It also writes the whole result, filled with biases and
positions, which the product then reads and writes again (tools/cases.py has the bytes). The backward kernel goes the
same way back, computing the normalised rows again. A program takes one offset of several coarse tokens, or several
class tokens, ROWS at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpdit_kernels.launch import Config, Tunable, element_sizes, launch, target
from mpdit_kernels.rows import (
    chunks,
    columns,
    gelu,
    gelu_and_slope,
    load_rows,
    load_vector,
    row_means,
    row_moments,
    rows_of,
    zeros,
)


def _candidates(width: int, bytes: str) -> list[Config]:
    return [
        {"ROWS": rows, "TOKENS": tokens, "CAP": cap, "num_warps": warps, "num_stages": 1}
        for cap in (128, 512, 1024)
        for warps in (1, 4, 8)
        for rows in (1, 2, 4)
        for tokens in (8, 16, 32)
        if rows * width <= 1152 * warps and cap < 2 * width
    ]


def _default(width: int, bytes: str) -> Config:
    # A warp has whole rows in registers, and no sum has a barrier; of 128 images an H200 holds all programs at once.
    if width <= 1152:
        return {"ROWS": 1, "TOKENS": 18, "CAP": 128, "num_warps": 1, "num_stages": 1}
    return {"ROWS": 1, "TOKENS": 16, "CAP": 1024, "num_warps": 4 if width <= 2048 else 8, "num_stages": 1}


def _default_backward(width: int, bytes: str) -> Config:
    if width > 1024 and target() != "sm_90":  # a warp spills, as compiled by Triton 3.6
        return {"ROWS": 1, "TOKENS": 32, "CAP": 1024, "num_warps": 4 if width <= 2048 else 8, "num_stages": 1}
    default = _default(width, bytes)
    return default | {"TOKENS": 2 * default["TOKENS"]}


FORWARD = Tunable("upsample.forward", _default, _candidates)
BACKWARD = Tunable("upsample.backward", _default_backward, _candidates)
INCOMING = Tunable(
    "upsample.incoming",
    lambda bytes: {"SAMPLES": 4, "BATCH": 32, "COLUMNS": 1024, "num_warps": 4, "num_stages": 1},
    lambda bytes: [
        {"SAMPLES": samples, "BATCH": batch, "COLUMNS": columns, "num_warps": 4, "num_stages": 1}
        for samples in (1, 2, 4)
        for batch in (16, 32, 128)
        for columns in (512, 1024)
    ],
)


@triton.jit
def split_program(IMAGE_PROGRAMS, OFFSETS: tl.constexpr):
    """Return what this program takes: (is_image, part, offset).

    is_image: whether its tokens are image tokens, as those of the first IMAGE_PROGRAMS programs are.
    part: which TOKENS of them, counted over all samples.
    offset: i * r + j of the fine tokens within their coarse ones; 0 for class tokens.
    """
    pid = tl.program_id(0)
    is_image = pid < IMAGE_PROGRAMS
    return is_image, tl.where(is_image, pid // OFFSETS, pid - IMAGE_PROGRAMS), tl.where(is_image, pid % OFFSETS, 0)


@triton.jit
def locate_tokens(index, is_image, offset, B, M, H, W, R: tl.constexpr):
    """Return where tokens are, each [ROWS], by their index over all samples: (mask, sample, token, pre_gelu_row).

    mask: which of them exist.
    sample: int64.
    token: int64, within the sample's T fine tokens.
    pre_gelu_row: int64.
    """
    tokens_per_sample = tl.where(is_image, H * W, M)
    sample = index // tokens_per_sample
    coarse = index - sample * tokens_per_sample
    # The pixel-shuffle: offset (i, j) of coarse token (y, x) is fine token (y * R + i, x * R + j).
    y = coarse // W
    x = coarse - y * W
    fine = (y * R + offset // R) * (W * R) + x * R + offset % R
    token = tl.where(is_image, M + fine, coarse)
    image_row = tl.cast(B, tl.int64) * M + index.to(tl.int64) * (R * R) + offset
    pre_gelu_row = tl.where(is_image, image_row, index.to(tl.int64))
    return index < B * tokens_per_sample, sample.to(tl.int64), token.to(tl.int64), pre_gelu_row


@triton.jit
def normalize(pre_gelu, is_image, eps, D: tl.constexpr, CHUNKS: tl.constexpr):
    """Return layer norm of rows, image tokens' after GELU, and their reciprocal standard deviations [ROWS]."""
    activated = ()
    for i in tl.static_range(len(CHUNKS)):
        activated = activated + (tl.where(is_image, gelu(pre_gelu[i]), pre_gelu[i]),)
    mean, rstd = row_moments(activated, eps, D)
    normalized = ()
    for i in tl.static_range(len(CHUNKS)):
        normalized = normalized + ((activated[i] - mean[:, None]) * rstd[:, None],)
    return normalized, rstd


@triton.jit
def store_refine_input(
    refine_input, row, normalized, patches, patches_batch_stride, patches_token_stride, sample, image_token, mask,
    is_image, D: tl.constexpr, CHUNKS: tl.constexpr, K: tl.constexpr, SKIP_COLUMNS: tl.constexpr,
    SKIP_BLOCK: tl.constexpr,
):  # fmt: skip
    """Write rows [normalized, the patch's K values, zeros]: D and SKIP_COLUMNS columns."""
    rows = refine_input + row[:, None] * (D + SKIP_COLUMNS)
    for i in tl.static_range(len(CHUNKS)):
        tl.store(rows + columns(CHUNKS, i), normalized[i].to(refine_input.dtype.element_ty), mask=mask[:, None])
    if SKIP_COLUMNS:
        at = tl.arange(0, SKIP_BLOCK)[None, :]
        patch = patches + sample[:, None] * patches_batch_stride + image_token[:, None] * patches_token_stride
        values = tl.load(patch + at, mask=mask[:, None] & is_image & (at < K), other=0)
        tl.store(rows + D + at, values.to(refine_input.dtype.element_ty), mask=mask[:, None] & (at < SKIP_COLUMNS))


@triton.jit
def _forward(
    pre_gelu,  # [B*(M + H*W*R*R), D]
    patches,  # [B, n1, K]
    refine_bias,  # [D]
    skip_bias,  # [D], where SKIP
    position,  # [n1, D], where POSITION
    refine_input,  # out [B*T, D + SKIP_COLUMNS]
    out,  # out [B, T, D]: biases and positions, to which the product is added in place
    B,
    M,
    H,
    W,
    IMAGE_PROGRAMS,
    eps,
    patches_batch_stride,
    patches_token_stride,
    R: tl.constexpr,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    K: tl.constexpr,
    SKIP_COLUMNS: tl.constexpr,
    SKIP_BLOCK: tl.constexpr,
    SKIP: tl.constexpr,
    POSITION: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    tl.static_assert(TOKENS % ROWS == 0)
    is_image, part, offset = split_program(IMAGE_PROGRAMS, R * R)
    # bias = refine_bias, and + skip_bias for image tokens: tiles [1, columns]
    bias = load_vector(refine_bias, CHUNKS)
    if SKIP:
        skip_biases = load_vector(skip_bias, CHUNKS)
        summed = ()
        for i in tl.static_range(len(CHUNKS)):
            summed = summed + (bias[i] + tl.where(is_image, skip_biases[i], 0.0),)
        bias = summed

    for step in range(0, TOKENS, ROWS):
        index = part * TOKENS + step + tl.arange(0, ROWS)
        mask, sample, token, pre_gelu_row = locate_tokens(index, is_image, offset, B, M, H, W, R)
        row = sample * (M + H * W * R * R) + token

        # refine_input = [normalize(GELU(pre_gelu)), patch values, 0]: tiles [ROWS, columns]
        values = load_rows(pre_gelu + pre_gelu_row * D, mask, CHUNKS)
        normalized, _ = normalize(values, is_image, eps, D, CHUNKS)
        store_refine_input(
            refine_input, row, normalized, patches, patches_batch_stride, patches_token_stride, sample, token - M,
            mask, is_image, D, CHUNKS, K, SKIP_COLUMNS, SKIP_BLOCK,
        )  # fmt: skip

        # out = bias, and + position for image tokens
        for i in tl.static_range(len(CHUNKS)):
            addend = bias[i]
            if POSITION:
                place = position + (token - M)[:, None] * D + columns(CHUNKS, i)
                addend = addend + tl.load(place, mask=mask[:, None] & is_image, other=0).to(tl.float32)
            target = out + row[:, None] * D + columns(CHUNKS, i)
            tl.store(target, addend.to(out.dtype.element_ty), mask=mask[:, None])


@triton.jit
def _backward(
    pre_gelu,  # [B*(M + H*W*R*R), D]
    patches,  # [B, n1, K], where REFINE_INPUT
    d_refine_input,  # [B*T, D_STRIDE], where GRADIENT
    refine_input,  # out [B*T, D + SKIP_COLUMNS], where REFINE_INPUT
    d_pre_gelu,  # out as pre_gelu, where GRADIENT
    partials,  # out fp32 [parts, R*R, D]: of the expanding bias, where GRADIENT
    B,
    M,
    H,
    W,
    IMAGE_PROGRAMS,
    eps,
    patches_batch_stride,
    patches_token_stride,
    D_STRIDE: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    K: tl.constexpr,
    SKIP_COLUMNS: tl.constexpr,
    SKIP_BLOCK: tl.constexpr,
    REFINE_INPUT: tl.constexpr,
    GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    tl.static_assert(TOKENS % ROWS == 0)
    is_image, part, offset = split_program(IMAGE_PROGRAMS, R * R)
    d_bias = zeros(ROWS, CHUNKS)
    for step in range(0, TOKENS, ROWS):
        index = part * TOKENS + step + tl.arange(0, ROWS)
        mask, sample, token, pre_gelu_row = locate_tokens(index, is_image, offset, B, M, H, W, R)
        row = sample * (M + H * W * R * R) + token

        # refine_input as in the forward: tiles [ROWS, columns]
        values = load_rows(pre_gelu + pre_gelu_row * D, mask, CHUNKS)
        normalized, rstd = normalize(values, is_image, eps, D, CHUNKS)
        if REFINE_INPUT:
            store_refine_input(
                refine_input, row, normalized, patches, patches_batch_stride, patches_token_stride, sample, token - M,
                mask, is_image, D, CHUNKS, K, SKIP_COLUMNS, SKIP_BLOCK,
            )  # fmt: skip

        if GRADIENT:
            # mean(g * normalized), mean(g): [ROWS]
            g = load_rows(d_refine_input + row * D_STRIDE, mask, CHUNKS)
            products = ()
            for i in tl.static_range(len(CHUNKS)):
                products = products + (g[i] * normalized[i],)
            mean_product, mean_g = row_means(products, g, D)
            new_d_bias = ()
            for i in tl.static_range(len(CHUNKS)):
                # d_a = (g - normalized * mean(g * normalized) - mean(g)) * rstd
                d_a = (g[i] - normalized[i] * mean_product[:, None] - mean_g[:, None]) * rstd[:, None]
                # d_pre_gelu = GELU'(pre_gelu) * d_a of image tokens
                _, slope = gelu_and_slope(values[i])
                d_values = tl.where(is_image, d_a * slope, d_a)
                target = d_pre_gelu + pre_gelu_row[:, None] * D + columns(CHUNKS, i)
                tl.store(target, d_values.to(d_pre_gelu.dtype.element_ty), mask=mask[:, None])
                # d_expand_bias += d_pre_gelu; a row that doesn't exist may hold NaN where eps is 0
                new_d_bias = new_d_bias + (d_bias[i] + tl.where(mask[:, None], d_values, 0.0),)
            d_bias = new_d_bias

    if GRADIENT:
        partial = partials + (part.to(tl.int64) * (R * R) + offset) * D
        for i in tl.static_range(len(CHUNKS)):
            tl.store(partial + columns(CHUNKS, i), tl.sum(d_bias[i], 0, keep_dims=True), mask=is_image)


@triton.jit
def _incoming(
    d_out,  # [B, N], N numbers a sample
    cast,  # out [B, N]: d_out in the products' dtype, where CAST
    sums,  # out fp32 [splits, N]: over BATCH samples each
    B,
    N,
    CAST: tl.constexpr,
    SAMPLES: tl.constexpr,
    BATCH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    split = tl.program_id(1).to(tl.int64)
    # sums[split, n] = sum_b d_out[b, n], SAMPLES at a time
    total = tl.zeros([1, COLUMNS], tl.float32)
    for step in range(0, BATCH, SAMPLES):
        sample = split * BATCH + step + tl.arange(0, SAMPLES)[:, None]
        mask = (sample < B) & (column < N)
        values = tl.load(d_out + sample * N + column, mask=mask, other=0)
        if CAST:
            tl.store(cast + sample * N + column, values.to(cast.dtype.element_ty), mask=mask)
        total += tl.sum(values.to(tl.float32), 0, keep_dims=True)
    tl.store(sums + split * N + column, total, mask=column < N)


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
    """Return (result [B, T, D], pre_gelu [B*T, D], image tokens [B*n0, D]); sizes are (m, r, h, w).

    expand [r*r*D, D] has rows (i, j, channel); refine [D, D + K padded to a multiple of 8] has the skip's columns.
    """
    m, r, h, w = sizes
    batch, width, tokens = x.shape[0], x.shape[2], m + h * w * r * r
    image = expand.new_empty(batch * h * w, width)
    image.view(batch, h * w, width).copy_(x[:, m:])
    pre_gelu = expand.new_empty(batch * tokens, width)
    pre_gelu[: batch * m].view(batch, m, width).copy_(x[:, :m])
    # A bias vector is added in cuBLASLt's epilogue, without a pass of its own.
    torch.addmm(expand_bias, image, expand.t(), out=pre_gelu[batch * m :].view(-1, expand.shape[0]))
    refine_input = expand.new_empty(batch * tokens, refine.shape[1])
    out = x.new_empty(batch, tokens, width, dtype=dtype)
    patches = None if patches is None else rows_of(patches)
    config, image_programs, grid = _plan(FORWARD, element_sizes(pre_gelu, out), batch, width, sizes)
    launch(
        _forward,
        grid,
        *(pre_gelu, patches, refine_bias.contiguous(), None if skip_bias is None else skip_bias.contiguous()),
        *(None if position is None else position.contiguous(), refine_input, out),
        *(batch, m, h, w, image_programs, eps, *_strides(patches)),
        R=r,
        SKIP=skip_bias is not None,
        POSITION=position is not None,
        **_columns(refine, patches),
        **config,
    )
    accumulate(out.view(-1, width), refine_input, refine.t())
    return out, pre_gelu, image


class Wanted(NamedTuple):
    """Which gradients of the forward's first eight arguments are asked for."""

    x: bool
    expand: bool
    expand_bias: bool
    refine: bool
    refine_bias: bool
    patches: bool
    skip_bias: bool
    position: bool


def backward(
    d_out: Tensor,
    pre_gelu: Tensor,
    image: Tensor,
    expand: Tensor,
    refine: Tensor,
    patches: Tensor | None,
    sizes: Sequence[int],
    eps: float,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Return gradients of the forward's first eight arguments, None where not wanted.

    Args:
        d_out: gradient of the result [B, T, D].
        pre_gelu, image: what `forward` returned beside it.
        expand, refine, patches, sizes, eps: what it was given.
        dtype: of the gradient of x.
        wanted: of each of the eight, whether it is.
    """
    m, r, h, w = sizes
    batch, tokens, width = d_out.shape
    want = Wanted(*wanted)
    through_gelu = want.x or want.expand or want.expand_bias

    # d_out in the products' dtype, and its sums over the batch
    d_out = d_out.contiguous()
    sums = None
    if want.refine_bias or want.skip_bias or want.position:
        d_out, sums = sum_and_cast(d_out, pre_gelu.dtype)
    d_rows = d_out.to(pre_gelu.dtype).view(-1, width)

    # d_refine_input = d_out @ refine, of which the skip's columns are the patches' gradient
    d_refine_input = None
    if through_gelu or want.patches:
        d_refine_input = d_rows @ (refine if want.patches else refine[:, :width])

    # The way back through norm and GELU, and refine_input once more
    refine_input = pre_gelu.new_empty(batch * tokens, refine.shape[1]) if want.refine else None
    d_pre_gelu = torch.empty_like(pre_gelu) if through_gelu else None
    config, image_programs, grid = _plan(BACKWARD, element_sizes(pre_gelu, d_refine_input), batch, width, sizes)
    partials = pre_gelu.new_empty(image_programs // (r * r), r * r * width, dtype=torch.float32)
    patch_rows = None if patches is None else rows_of(patches)
    if through_gelu or want.refine:
        launch(
            _backward,
            grid,
            *(pre_gelu, patch_rows, d_refine_input, refine_input, d_pre_gelu, partials),
            *(batch, m, h, w, image_programs, eps, *_strides(patch_rows)),
            D_STRIDE=0 if d_refine_input is None else d_refine_input.shape[1],
            R=r,
            REFINE_INPUT=want.refine,
            GRADIENT=through_gelu,
            **_columns(refine, patches),
            **config,
        )

    dx = d_expand = d_patches = None
    if d_pre_gelu is not None:
        d_image = d_pre_gelu[batch * m :].view(-1, expand.shape[0])
        if want.x:
            dx = d_out.new_empty(batch, m + h * w, width, dtype=dtype)
            dx[:, :m].copy_(d_pre_gelu[: batch * m].view(batch, m, width))
            dx[:, m:].copy_((d_image @ expand).view(batch, h * w, width))
        d_expand = d_image.t() @ image if want.expand else None
    if want.patches and d_refine_input is not None and patches is not None:
        # Copied even where contiguous: an operator's outputs own their memory.
        skip_columns = d_refine_input.unflatten(0, (batch, tokens))[:, m:, width : width + patches.shape[2]]
        d_patches = skip_columns.clone(memory_format=torch.contiguous_format)
    return [
        dx,
        d_expand,
        partials.sum(0) if want.expand_bias else None,
        None if refine_input is None else d_rows.t() @ refine_input,
        sums.sum(0) if sums is not None and want.refine_bias else None,
        d_patches,
        sums[m:].sum(0) if sums is not None and want.skip_bias else None,
        sums[m:].clone() if sums is not None and want.position else None,
    ]


def sum_and_cast(d_out: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return d_out [B, T, D] as `dtype`, and its sum over the batch, fp32 [T, D], reading it once.

    The sum holds the gradients of all that is added to tokens: both biases and the positions.
    """
    batch, elements = d_out.shape[0], d_out[0].numel() if len(d_out) else 0
    cast = None if d_out.dtype == dtype else torch.empty(d_out.shape, dtype=dtype, device=d_out.device)
    config = INCOMING.pick(bytes=element_sizes(d_out, cast))
    splits = triton.cdiv(batch, config["BATCH"])
    sums = torch.empty(splits, *d_out.shape[1:], dtype=torch.float32, device=d_out.device)
    grid = (triton.cdiv(elements, config["COLUMNS"]), splits)
    launch(_incoming, grid, d_out, cast, sums, batch, elements, CAST=cast is not None, **config)
    return d_out if cast is None else cast, sums[0] if splits == 1 else sums.sum(0)


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


def _plan(tunable: Tunable, bytes: str, batch: int, width: int, sizes: Sequence[int]) -> tuple[Config, int, tuple[int]]:
    """Return the kernel's constants by its configuration, how many programs take image tokens, and the grid.

    The grid's other programs take class tokens.
    """
    m, r, h, w = sizes
    config = dict(tunable.pick(width=width, bytes=bytes))
    config["CHUNKS"] = chunks(width, config.pop("CAP"))
    most = max(1, batch * max(m, h * w))  # no more tokens to a program than there are
    tokens = config["TOKENS"] = min(config["TOKENS"], triton.cdiv(most, config["ROWS"]) * config["ROWS"])
    image_programs = triton.cdiv(batch * h * w, tokens) * r * r
    return config, image_programs, (image_programs + triton.cdiv(batch * m, tokens),)


def _columns(refine: Tensor, patches: Tensor | None) -> Config:
    """Return the constants that say what columns refine_input has."""
    width = refine.shape[0]
    skip_columns = refine.shape[1] - width
    return {
        "D": width,
        "K": 0 if patches is None else patches.shape[2],
        "SKIP_COLUMNS": skip_columns,
        "SKIP_BLOCK": triton.next_power_of_2(skip_columns),
    }


def _strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))
