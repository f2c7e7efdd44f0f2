"""The public functions: checks, and calls of the backends chosen, as few as possible for several lengths."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace

import torch
from torch import Tensor

from mpdit_kernels.backends.choose import BackendError, Context, choice, choose, context, fixed, tell
from mpdit_kernels.backends.libraries import BACKENDS, Call
from mpdit_kernels.backends.probe import refusal
from mpdit_kernels.checks import autocast_dtype, check, check_filled, takes_old_name
from mpdit_kernels.dispatch import constant_to_compiler
from mpdit_kernels.short_attn.op import check_query_start, checked_scale
from mpdit_kernels.varlen import Offsets, Sequences, sequences


@takes_old_name("first_query", "query_start")
def attention(
    qkv: Tensor,
    scale: float | None = None,
    query_start: int = 0,
    *,
    backend: str = "auto",
    deterministic: bool | None = None,
) -> Tensor:
    """Compute softmax(scale * Q K^T) V for every head, by the fastest library that can.

    Args:
        qkv: [B, T, 3, H, d] as the packed projection writes it, fp64, fp32, bf16 or fp16; under autocast, as with
            PyTorch's own attention, it is cast. Any strides: it is copied unless the last axis is contiguous and rows
            are as aligned as in a copy.
        scale: of the scores; by default 1 / sqrt(d).
        query_start: f: tokens before it are keys and values only, and their queries get a gradient of zero.
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
    check_query_start(query_start, tokens)
    qkv = _ready(qkv)
    if not qkv.shape[0]:
        return qkv[:, query_start:, 0]
    name = choose(tokens, *context(qkv, query_start, backend, deterministic))
    return BACKENDS[name].run(qkv, scale, query_start, deterministic)


@takes_old_name("first_query", "query_start")
def attention_varlen(
    qkv: Tensor,
    cu_seqlens: Offsets,
    scale: float | None = None,
    query_start: int = 0,
    *,
    backend: str = "auto",
    deterministic: bool | None = None,
) -> Tensor:
    """Compute `attention` of S sequences of any lengths, packed one after the other; each attends to itself alone.

    The backend is chosen for every length as `attention` would. Lengths that choose the same library go in one call, if
    it has one for several lengths; otherwise each length is a batch of its own.

    Args:
        qkv: [N, 3, H, d].
        cu_seqlens: [S + 1] cumulative lengths from 0 to N. Best as a tuple: a tensor on a GPU is waited for, and
            torch.compile can't read one.
        scale, backend, deterministic: as for `attention`.
        query_start: f: each sequence's tokens before it are keys and values only. Every length must exceed it.

    Returns:
        [N - S * f, H, d], packed likewise.

    Raises:
        ValueError: as `attention`, and lengths that don't fit.
    """
    scale, deterministic = _check(qkv, "[N, 3, H, d]", scale, deterministic, backend)
    if torch.compiler.is_compiling() and not isinstance(cu_seqlens, Tensor):
        cu_seqlens = tuple(fixed(offset) for offset in cu_seqlens)
    offsets = sequences(cu_seqlens, qkv.shape[0]).offsets
    check_query_start(query_start, min([b - a for a, b in itertools.pairwise(offsets)] or [1]))
    qkv = _ready(qkv)
    if len(offsets) == 1:
        return qkv[:, 0]
    runs, parts = plan(offsets, context(qkv, query_start, backend, deterministic))
    pieces = qkv.split([length * count for length, count in runs])
    outs = list(pieces)
    for name, length, members, part_offsets in parts:
        mine = qkv if len(members) == len(runs) else torch.cat([pieces[index] for index in members])
        if length:
            dense = mine.unflatten(0, (-1, length))
            out = BACKENDS[name].run(dense, scale, query_start, deterministic).flatten(0, 1)
        else:
            run_packed = BACKENDS[name].run_packed
            assert run_packed is not None
            out = run_packed(mine, Sequences(part_offsets), scale, query_start, deterministic)
        if len(parts) == 1:
            return out
        sizes = [(runs[index][0] - query_start) * runs[index][1] for index in members]
        for index, piece in zip(members, out.split(sizes), strict=True):
            outs[index] = piece
    return torch.cat(outs)


def _check(
    qkv: Tensor, letters: str, scale: float | None, deterministic: bool | None, backend: str
) -> tuple[float, bool]:
    """Return (scale, deterministic) as they are meant."""
    checked_scale(qkv, letters, scale)
    if not isinstance(backend, str):
        raise BackendError(f"backend is {backend!r}: choose auto or one of {', '.join(BACKENDS)}")
    if deterministic not in (None, True, False):
        check(False, "deterministic", repr(deterministic), "True, False or None")
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    return 1 / math.sqrt(fixed(qkv.shape[-1])) if scale is None else float(scale), deterministic


def _ready(qkv: Tensor) -> Tensor:
    """Return qkv in the dtype that PyTorch's attention would take, and in memory that all backends can read."""
    dtype = autocast_dtype(qkv)
    if dtype is not None and qkv.dtype != torch.float64:
        qkv = qkv.to(dtype)
    step = math.gcd(fixed(qkv.shape[-1]), 16 // qkv.element_size())  # as aligned as rows of a copy are
    *others, last = qkv.stride()
    start = 0 if torch.compiler.is_compiling() else qkv.storage_offset()  # not traceable
    aligned = all(stride % step == 0 for stride in (start, *others))
    return qkv if last == 1 and aligned else qkv.contiguous()


# Plain tuples, as a compiler's tracer takes no other constants.
Run = tuple[int, int]
"""(length, how many): neighbours of equal length, which stay together and are viewed, not copied."""
Part = tuple[str, int, tuple[int, ...], tuple[int, ...]]
"""One call: the backend's name; the length of every sequence, or 0 where lengths differ; which of the plan's runs it is
made of; and cumulative lengths in it."""
Plan = tuple[tuple[Run, ...], tuple[Part, ...]]


@constant_to_compiler  # probes, reads files and logs; run where it is traced
def plan(offsets: tuple[int, ...], context: Context) -> Plan:
    """Return how sequences at these offsets are computed; remembered.

    Raises:
        ValueError: as `choose`.
    """
    return remembered_plan(offsets, context)


@functools.lru_cache(maxsize=256)
def remembered_plan(offsets: tuple[int, ...], context: Context) -> Plan:
    asked, source, training, call = context
    lengths = Sequences(offsets).lengths
    runs = tuple((length, len(list(same))) for length, same in itertools.groupby(lengths))
    chosen: dict[str, list[int]] = {}
    for length in sorted(set(lengths)):
        chosen.setdefault(choice(asked, training, Call(length, *call), source), []).append(length)
    parts: list[Part] = []
    for name, mine in chosen.items():
        together = len(mine) > 1 and _takes_several(name, replace(Call(mine[-1], *call), packed=True))
        for group in [mine] if together else [[length] for length in mine]:
            members = tuple(index for index, (length, _) in enumerate(runs) if length in group)
            each = itertools.chain.from_iterable(itertools.repeat(*runs[index]) for index in members)
            parts.append((name, 0 if together else group[0], members, (0, *itertools.accumulate(each))))
    return runs, tuple(parts)


def _takes_several(name: str, call: Call) -> bool:
    """Return whether a backend has a call for several lengths, and it is available."""
    if BACKENDS[name].run_packed is None:
        return False
    reason = refusal(name, call)
    if reason is not None:
        tell(name, f"in one call for several lengths, {reason}", call)
    return reason is None
