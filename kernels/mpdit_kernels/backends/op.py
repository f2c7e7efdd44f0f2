"""The public functions: checks, and calls of the backends chosen."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from mpdit_kernels.backends.choose import BackendError, choose, context, fixed
from mpdit_kernels.backends.packed import plan_of, run_plan
from mpdit_kernels.backends.registry import BACKENDS
from mpdit_kernels.checks import autocast_dtype, check, check_dims, check_filled, check_tensors
from mpdit_kernels.short_attn.op import check_first_query, checked
from mpdit_kernels.varlen import Offsets, sequences


def attention(
    qkv: Tensor,
    scale: float | None = None,
    first_query: int = 0,
    *,
    backend: str = "auto",
    deterministic: bool | None = None,
) -> Tensor:
    """softmax(scale * Q K^T) V for every head, by the fastest library that can.

    Args:
        qkv: [B, T, 3, H, d] as the packed projection writes it, fp64, fp32, bf16 or fp16; under autocast, as with
            PyTorch's own attention, it is cast. Any strides: it is copied unless the last axis is contiguous and rows
            are as aligned as in a copy.
        scale: of the scores; by default 1 / sqrt(d).
        first_query: f: tokens before it are keys and values only, and their queries get a gradient of zero.
        backend: "auto" takes what `use_attention`, MPDIT_ATTENTION or the measured table say, in this order; or one of
            `BACKENDS`.
        deterministic: whether the gradient must repeat bit for bit; by default what torch was told by
            `use_deterministic_algorithms`.

    Returns:
        [B, T - f, H, d].

    Raises:
        ValueError: arguments that don't fit, a backend that is unknown or can't serve this call; the latter two list
            what is available. Also where a new shape meets a CUDA graph's capture: a backend's first call at a shape is
            a probe, which can't be captured.
    """
    scale, deterministic = _check(qkv, "[B, T, 3, H, d]", scale, deterministic, backend)
    tokens = fixed(qkv.shape[1])
    check_filled("qkv", qkv, 1, "at least one token")
    check_first_query(first_query, tokens)
    qkv = _ready(qkv)
    if not qkv.shape[0]:
        return qkv[:, first_query:, 0]
    name = choose(tokens, *context(qkv, first_query, backend, deterministic))
    return BACKENDS[name].run(qkv, scale, first_query, deterministic)


def attention_varlen(
    qkv: Tensor,
    cu_seqlens: Offsets,
    scale: float | None = None,
    first_query: int = 0,
    *,
    backend: str = "auto",
    deterministic: bool | None = None,
) -> Tensor:
    """`attention` of S sequences of any lengths, packed one after the other; each attends to itself alone.

    The backend is chosen for every length as `attention` would. Lengths that choose the same library go in one call, if
    it has one for several lengths; otherwise each length is a batch of its own.

    Args:
        qkv: [N, 3, H, d].
        cu_seqlens: [S + 1] cumulative lengths from 0 to N. Best as a tuple: a tensor on a GPU is waited for, and
            torch.compile can't read one.
        scale, backend, deterministic: as for `attention`.
        first_query: f: each sequence's tokens before it are keys and values only. Every length must exceed it.

    Returns:
        [N - S * f, H, d], packed likewise.

    Raises:
        ValueError: as `attention`, and lengths that don't fit.
    """
    scale, deterministic = _check(qkv, "[N, 3, H, d]", scale, deterministic, backend)
    if torch.compiler.is_compiling() and not isinstance(cu_seqlens, Tensor):
        cu_seqlens = tuple(fixed(offset) for offset in cu_seqlens)
    offsets = sequences(cu_seqlens, qkv.shape[0]).offsets
    check_first_query(first_query, min([b - a for a, b in itertools.pairwise(offsets)] or [1]))
    qkv = _ready(qkv)
    if len(offsets) == 1:
        return qkv[:, 0]
    plan = plan_of(offsets, *context(qkv, first_query, backend, deterministic))
    return run_plan(qkv, plan, scale, first_query, deterministic)


def _check(
    qkv: Tensor, letters: str, scale: float | None, deterministic: bool | None, backend: str
) -> tuple[float, bool]:
    """(scale, deterministic) as they are meant."""
    check_tensors(qkv=qkv)
    check_dims("qkv", qkv, letters)
    checked(qkv, scale)
    if not isinstance(backend, str):
        raise BackendError(f"backend is {backend!r}: choose auto or one of {', '.join(BACKENDS)}")
    if deterministic not in (None, True, False):
        check(False, "deterministic", repr(deterministic), "True, False or None")
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    return 1 / math.sqrt(fixed(qkv.shape[-1])) if scale is None else float(scale), deterministic


def _ready(qkv: Tensor) -> Tensor:
    """In the dtype that PyTorch's attention would take, and in memory that all backends can read."""
    dtype = autocast_dtype(qkv)
    if dtype is not None and qkv.dtype != torch.float64:
        qkv = qkv.to(dtype)
    step = math.gcd(fixed(qkv.shape[-1]), 16 // qkv.element_size())  # as aligned as rows of a copy are
    *others, last = qkv.stride()
    start = 0 if torch.compiler.is_compiling() else qkv.storage_offset()  # not traceable
    aligned = all(stride % step == 0 for stride in (start, *others))
    return qkv if last == 1 and aligned else qkv.contiguous()
