"""Kernels of the step: one small launch for each tensor's scalars, one for all elements of all tensors.

Of each element (Loshchilov & Hutter, "Decoupled weight decay regularization", algorithm 2, and the weights' average):

    g = grad * factor
    m = m + (1 - beta1) * (g - m),  v = v + (1 - beta2) * (g^2 - v)
    p = p * (1 - lr * weight_decay) - lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)
    ema = ema + (1 - ema_decay) * (p - ema)

Tensors are found through a table of addresses (int64 [8, N]: rows PARAM to SIZE below), programs through a map (int32
[P, 2]: tensor, chunk), so one launch serves hundreds of small tensors and one flat partition alike. Arithmetic is
fp32, except for the bias corrections: 1 - beta**step loses half its digits in fp32 and is taken in fp64, once a tensor.
Moments move by start + weight * (end - start), with the weight 1 - beta rounded once: beta rounded to fp32 would
shift the second moment by 1e-5, since the error adds up over 1 / (1 - beta) steps.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpdit_kernels.adamw_ema.reference import Batch, Settings
from mpdit_kernels.adamw_ema.uploads import Uploads
from mpdit_kernels.launch import Config, Tunable, launch

PARAM, GRAD, MEAN, SQUARE, EMA, COPY, STEP, SIZE = (tl.constexpr(row) for row in range(8))
"""Rows of the table."""

VECTOR = 8
"""Elements: what is left of a tensor beyond a multiple of this many takes narrow accesses."""

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _candidates(narrow: bool) -> list[Config]:
    return [
        {"BLOCK": block, "TILES": tiles, "HINT": hint, "num_warps": warps, "num_stages": 1}
        for block, warps in ((512, 4), (1024, 8), (1024, 4), (2048, 8))
        for tiles in (1, 4, 8, 16)
        for hint in ((8, 16) if narrow and block == 256 * warps else (8,))
    ]


def _default(narrow: bool) -> Config:
    # HINT is what 16-bit tensors are taken to be aligned to. With 8 bytes a thread holds four elements of every tensor;
    # with 16 it would load eight, and pass fp32 on through shared memory.
    return {"BLOCK": 512, "TILES": 8, "HINT": 8, "num_warps": 4, "num_stages": 1}


UPDATE = Tunable("adamw_ema.update", _default, _candidates)


@triton.jit
def _bias(step, weight):
    """Return 1 - (1 - weight)**step in fp64; without the logarithm of 0 at weight 1."""
    beta = 1 - tl.cast(weight, tl.float64)
    return tl.where(beta > 0, 1 - tl.exp(step * tl.log(tl.where(beta > 0, beta, 1.0))), 1.0)


@triton.jit
def _advance(
    table,  # int64 [8, N]
    scalars,  # out fp32 [3, N]: lr * weight decay, lr / (1 - beta1**step), 1 / sqrt(1 - beta2**step)
    skip,  # fp32 scalar, 0, or 1 where this step is skipped; None: 0
    lr,  # a number or a scalar tensor
    weight_decay,
    mean_weight,  # 1 - beta1
    square_weight,  # 1 - beta2
    N,
    LR_TENSOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = tensor < N
    addresses = tl.load(table + STEP * N + tensor, mask=mask, other=0)
    steps = addresses.to(tl.pointer_type(tl.float32))
    done = tl.load(steps, mask=mask, other=0)
    if skip is None:
        tl.store(steps, done + 1, mask=mask)
    else:
        tl.store(steps, done + (1 - tl.load(skip)), mask=mask)
    # The scalars that all elements of a tensor share
    rate = tl.load(lr).to(tl.float32) if LR_TENSOR else lr
    step = (done + 1).to(tl.float64)
    tl.store(scalars + tensor, rate * weight_decay, mask=mask)
    tl.store(scalars + N + tensor, (rate / _bias(step, mean_weight)).to(tl.float32), mask=mask)
    tl.store(scalars + 2 * N + tensor, (1 / tl.sqrt(_bias(step, square_weight))).to(tl.float32), mask=mask)


@triton.jit
def _pointer(table, row: tl.constexpr, tensor, N, TYPE: tl.constexpr, ALIGNED: tl.constexpr, HINT: tl.constexpr):
    pointer = tl.load(table + row * N + tensor).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16 if TYPE.primitive_bitwidth == 32 else HINT)
    return pointer


@triton.jit
def _toward(start, end, weight):
    """Return start + weight * (end - start), from the nearer side so that it is exact at both."""
    near = weight < 0.5
    return tl.where(near, start, end) + tl.where(near, weight, weight - 1) * (end - start)


@triton.jit
def _elements(
    at, mask,
    param, grad, mean, square, ema, copy,  # pointers
    factor,
    decay,  # lr * weight_decay
    rate,  # lr / (1 - beta1^step)
    root,  # 1 / sqrt(1 - beta2^step)
    mean_weight, square_weight, ema_weight,  # 1 - beta1, 1 - beta2, 1 - ema_decay
    eps,
    COPY_TYPE: tl.constexpr,
):  # fmt: skip
    # g, m, v
    g = tl.load(grad + at, mask=mask, other=0).to(tl.float32) * factor
    p = tl.load(param + at, mask=mask, other=0)
    m = _toward(tl.load(mean + at, mask=mask, other=0), g, mean_weight)
    v = _toward(tl.load(square + at, mask=mask, other=0), g * g, square_weight)
    # p = p - decay * p - rate * m / (sqrt(v) * root + eps)
    p -= decay * p
    p -= rate * tl.div_rn(m, tl.sqrt_rn(v) * root + eps)
    average = _toward(tl.load(ema + at, mask=mask, other=0), p, ema_weight)
    tl.store(param + at, p, mask=mask)
    tl.store(mean + at, m, mask=mask)
    tl.store(square + at, v, mask=mask)
    tl.store(ema + at, average, mask=mask)
    if COPY_TYPE is not None:
        tl.store(copy + at, p.to(COPY_TYPE), mask=mask)


@triton.jit
def _update(
    table,  # int64 [8, N]
    programs,  # int32 [P, 2]: tensor, chunk
    scalars,  # fp32 [3, N], from _advance
    factor,  # fp32 scalar the gradients are multiplied by; None: 1
    skip,  # fp32 scalar, 0, or 1 where nothing is to be written; None: 0
    mean_weight,
    square_weight,
    ema_weight,
    eps,
    N,
    GRAD_TYPE: tl.constexpr,
    COPY_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    VECTOR: tl.constexpr,
    HINT: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    program = tl.program_id(0)
    tensor = tl.load(programs + 2 * program)
    first = tl.load(programs + 2 * program + 1).to(tl.int64) * (BLOCK * TILES)
    size = tl.load(table + SIZE * N + tensor)
    if skip is not None:
        size = tl.where(tl.load(skip) == 0, size, 0)
    param = _pointer(table, PARAM, tensor, N, tl.float32, ALIGNED, HINT)
    grad = _pointer(table, GRAD, tensor, N, GRAD_TYPE, ALIGNED, HINT)
    mean = _pointer(table, MEAN, tensor, N, tl.float32, ALIGNED, HINT)
    square = _pointer(table, SQUARE, tensor, N, tl.float32, ALIGNED, HINT)
    ema = _pointer(table, EMA, tensor, N, tl.float32, ALIGNED, HINT)
    copy = param if COPY_TYPE is None else _pointer(table, COPY, tensor, N, COPY_TYPE, ALIGNED, HINT)
    scale = 1.0
    if factor is not None:
        scale = tl.load(factor)
    decay = tl.load(scalars + tensor)
    rate = tl.load(scalars + N + tensor)
    root = tl.load(scalars + 2 * N + tensor)
    # Up to the last multiple of VECTOR the mask is equal within every vector, which keeps the accesses wide.
    whole = size // VECTOR * VECTOR
    for tile in range(TILES):
        at = first + tile * BLOCK + tl.arange(0, BLOCK)
        _elements(at, at < whole, param, grad, mean, square, ema, copy, scale, decay, rate, root,
                  mean_weight, square_weight, ema_weight, eps, COPY_TYPE)  # fmt: skip
    if (whole < size) & (size <= first + BLOCK * TILES):
        at = whole + tl.arange(0, VECTOR)
        _elements(at, at < size, param, grad, mean, square, ema, copy, scale, decay, rate, root,
                  mean_weight, square_weight, ema_weight, eps, COPY_TYPE)  # fmt: skip


def update_(batch: Batch, settings: Settings, factor: Tensor | None, skip: Tensor | None, uploads: Uploads) -> None:
    """Update a batch in two launches; all tensors of one place in the batch are dense and laid out alike."""
    device, count = batch.params[0].device, len(batch.params)
    columns = [batch.params, batch.grads, batch.exp_avgs, batch.exp_avg_sqs, batch.emas]
    columns += [batch.params if batch.copies is None else batch.copies, batch.steps]
    addresses = tuple(x.data_ptr() for column in columns for x in column)
    sizes = tuple(param.numel() for param in batch.params)
    table = uploads.get((addresses, sizes), device, lambda: torch.tensor(addresses + sizes, dtype=torch.int64))
    types = batch.grads[0].dtype, torch.float32 if batch.copies is None else batch.copies[0].dtype
    config = dict(UPDATE.pick(narrow=types != (torch.float32, torch.float32)))
    chunk = config["BLOCK"] * config["TILES"]
    programs = uploads.get((chunk, sizes), device, lambda: _programs(sizes, chunk))
    scalars = torch.empty(3, count, dtype=torch.float32, device=device)
    lr = settings.lr
    if isinstance(lr, Tensor) and lr.device.type == "cpu" and device.type != "cpu":
        lr = lr.item()
    weights = tuple(float(1 - beta) for beta in settings.betas)
    launch(
        _advance,
        (triton.cdiv(count, 128),),
        *(table, scalars, skip, lr if isinstance(lr, Tensor) else float(lr), float(settings.weight_decay)),
        *(*weights, count),
        LR_TENSOR=isinstance(lr, Tensor),
        BLOCK=128,
        num_warps=4,
    )
    launch(
        _update,
        (programs.shape[0],),
        *(table, programs, scalars, factor, skip),
        *(*weights, float(1 - settings.ema_decay), float(settings.eps), count),
        GRAD_TYPE=_TYPES[types[0]],
        COPY_TYPE=None if batch.copies is None else _TYPES[types[1]],
        ALIGNED=all(address % 16 == 0 for address in itertools.islice(addresses, 6 * count)),
        VECTOR=VECTOR,
        **config,
    )


def _programs(sizes: tuple[int, ...], chunk: int) -> Tensor:
    """Return int32 [P, 2]: for each program its tensor and which of the tensor's chunks."""
    counts = (torch.tensor(sizes) + chunk - 1) // chunk
    tensors = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    firsts = torch.cumsum(counts, 0) - counts
    return torch.stack([tensors, torch.arange(len(tensors)) - firsts[tensors]], dim=1).to(torch.int32)
