"""The public functions: checks, choice of implementation, and the custom operator with its gradient."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mpdit_kernels.checks import check, check_filled, check_shapes, check_tensors, takes_old_name
from mpdit_kernels.dispatch import takes_triton
from mpdit_kernels.operators import count_flops, kernel_op
from mpdit_kernels.proof import SAMPLES
from mpdit_kernels.short_attn import reference
from mpdit_kernels.varlen import Offsets, Sequences, sequences

MAX_TOKENS = 320
"""Keys that a program holds."""
WIDTHS = (32, 128)
"""Least and greatest width of a head, which is a multiple of 8."""


@takes_old_name("first_query", "query_start")
def short_attention(qkv: Tensor, scale: float | None = None, query_start: int = 0) -> Tensor:
    """Compute softmax(scale * Q K^T) V of every head for sequences of few tokens (Vaswani et al., 2017, section 3.2.1).

    The kernels serve up to 320 tokens and heads of 32 to 128 columns in multiples of 8, the reference whatever else.
    For backward they keep qkv, the result and one fp32 number a query and head; the gradient of qkv is written once,
    packed as qkv is. Through the kernels gradients can be taken once, by torch.autograd; `use("reference")` has no
    such limit.

    Args:
        qkv: [B, T, 3, H, d], as a packed projection writes it. The kernels copy it where a token's numbers aren't
            neighbours in memory.
        scale: of the scores; d**-0.5 by default.
        query_start: f; tokens before it are keys and values only: nothing reads their queries.

    Returns:
        [B, T - f, H, d] in the dtype of qkv. Scores, weights and sums are fp32; weights are rounded to qkv's dtype
        before they meet the values.

    Raises:
        ValueError: no tensor, or a shape, dtype or number that doesn't fit.
    """
    scale = checked_scale(qkv, "[B, T, 3, H, d]", scale)
    tokens = qkv.shape[1]
    check_filled("qkv", qkv, 1, "at least one token")
    check_query_start(query_start, tokens)
    trial = lambda: (functools.partial(short_attention, scale=scale, query_start=query_start), [qkv[:SAMPLES]])  # noqa: E731
    if takes_triton("short_attention", qkv, refusal=refusal(tokens, qkv.shape[-1]), trial=trial, variant=query_start):
        return run(qkv, scale, query_start)
    return reference.attention(qkv, scale, query_start)


@takes_old_name("first_query", "query_start")
def short_attention_varlen(
    qkv: Tensor, cu_seqlens: Offsets | Sequences, scale: float | None = None, query_start: int = 0
) -> Tensor:
    """Compute the same for sequences of several lengths, packed one after the other; one launch for each length.

    Args:
        qkv: [N, 3, H, d].
        cu_seqlens: cumulative lengths (0, ..., N) of S sequences, see `mpdit_kernels.varlen`.
        scale: of the scores; d**-0.5 by default.
        query_start: f, of each sequence; every one is longer.

    Returns:
        [N - S * f, H, d].

    Raises:
        ValueError: no tensor, or a shape, dtype, length or number that doesn't fit.
    """
    scale = checked_scale(qkv, "[N, 3, H, d]", scale)
    packed = cu_seqlens if isinstance(cu_seqlens, Sequences) else sequences(cu_seqlens, qkv.shape[0])
    check_query_start(query_start, min(packed.lengths, default=1))
    if takes_triton("short_attention", qkv, refusal=refusal(packed.longest, qkv.shape[-1])):
        return run_varlen(qkv, packed, scale, query_start)
    return reference.attention_varlen(qkv, packed.offsets, scale, query_start)


def run(qkv: Tensor, scale: float, query_start: int) -> Tensor:
    """Compute `short_attention` by the kernels, arguments being as they should."""
    return _short_attention(qkv, None, [], scale, query_start)[0]


def run_varlen(qkv: Tensor, packed: Sequences, scale: float, query_start: int) -> Tensor:
    """Compute `short_attention_varlen` by the kernels, likewise."""
    lengths = [number for length, members in packed.groups for number in (length, len(members))]
    starts = _starts(packed.offsets, query_start, qkv.device)
    return _short_attention(qkv, starts, lengths, scale, query_start)[0]


def refusal(tokens: int, width: int) -> str | None:
    """Return why the kernels don't take sequences of so many tokens with heads so wide, if they don't."""
    if tokens > MAX_TOKENS:
        return f"there are {tokens} tokens, and the kernels take {MAX_TOKENS} at most"
    low, high = WIDTHS
    if width % 8 or not low <= width <= high:
        return f"heads are {width} wide, and the kernels take {low} to {high} in multiples of 8"
    return None


def checked_scale(qkv: Tensor, letters: str, scale: float | None) -> float:
    """Return the scale, all of qkv [..., 3, H, d] being as it should."""
    check_tensors(qkv=qkv)
    check_shapes({}, qkv=(qkv, letters))
    if qkv.shape[-3] != 3:
        check(False, "qkv", f"of shape {list(qkv.shape)}", "3 in front of [H, d]: queries, keys and values")
    check_filled("qkv", qkv, -2, "at least one head")
    check_filled("qkv", qkv, -1, "heads of at least one column")
    if scale is None:
        return float(qkv.shape[-1] ** -0.5)
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    check(number and 0 < scale < math.inf, "scale", scale, "a finite number above 0, or None")
    return float(scale)


def check_query_start(query_start: int, tokens: int) -> None:
    """Check that 0 <= query_start < tokens."""
    whole = isinstance(query_start, (int, torch.SymInt)) and not isinstance(query_start, bool)
    if not (whole and 0 <= query_start < tokens):
        check(False, "query_start", query_start, f"a whole number from 0 to below {tokens}, the tokens of a sequence")


@functools.lru_cache(maxsize=256)
def _starts(offsets: tuple[int, ...], query_start: int, device: torch.device) -> Tensor:
    """Return int64 [2, S], by rising length: each sequence's first row, and its first row of the result."""
    order = [index for _, members in Sequences(offsets).groups for index in members]
    rows = [offsets[index] for index in order]
    out_rows = [row - index * query_start for row, index in zip(rows, order, strict=True)]
    with torch.inference_mode(False):  # or what inference made could not be kept for backward later
        return torch.tensor([rows, out_rows], dtype=torch.int64, device=device)


@kernel_op(
    "short_attn",
    "forward",
    "short_attention(Tensor qkv, Tensor? starts, SymInt[] lengths, float scale, SymInt query_start) "
    "-> (Tensor, Tensor)",
)
def _short_attention(qkv, starts, lengths, scale, query_start):  # type: ignore[no-untyped-def]
    """Return (result, lse fp32 [H, N']: base-2 logarithm of the sum that each query's weights are divided by).

    By triton_impl.forward. `lengths` are (length, count, ...) in the order of `starts`.
    """
    *_, heads, width = qkv.shape
    if starts is None:
        outer = [qkv.shape[0], qkv.shape[1] - query_start]
    else:
        outer = [qkv.shape[0] - starts.shape[1] * query_start]
    return qkv.new_empty((*outer, heads, width)), qkv.new_empty((heads, math.prod(outer)), dtype=torch.float32)


@kernel_op(
    "short_attn",
    "backward",
    "short_attention_backward(Tensor d_out, Tensor qkv, Tensor out, Tensor lse, Tensor? starts, SymInt[] lengths, "
    "float scale, SymInt query_start) -> Tensor",
)
def _short_attention_backward(d_out, qkv, out, lse, starts, lengths, scale, query_start):  # type: ignore[no-untyped-def]
    """Return the gradient of qkv, contiguous, by triton_impl.backward."""
    return qkv.new_empty(qkv.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, starts, ctx.lengths, ctx.scale, ctx.query_start = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, *output, starts)


def _gradients(ctx: Any, d_out: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if d_out is None:
        return (None,) * 5
    qkv, out, lse, starts = ctx.saved_tensors
    gradient = _short_attention_backward(d_out, qkv, out, lse, starts, ctx.lengths, ctx.scale, ctx.query_start)
    return gradient, None, None, None, None


_short_attention.register_autograd(_gradients, setup_context=_save)


# Backward counts five products, as torch's counter takes for every attention, whatever a kernel computes again.
@count_flops(torch.ops.mpdit_kernels.short_attention)
def _flops(
    qkv: Tensor,
    starts: Tensor | None,
    lengths: Sequence[int],
    scale: float,
    query_start: int,
    *,
    products: int = 2,
    **_: Any,
) -> int:
    *_outer, heads, width = qkv.shape
    pairs = list(zip(lengths[::2], lengths[1::2], strict=True)) if starts is not None else [(qkv.shape[1], len(qkv))]
    scores = sum(count * (tokens - query_start) * tokens for tokens, count in pairs)
    return products * 2 * heads * width * scores


@count_flops(torch.ops.mpdit_kernels.short_attention_backward)
def _flops_backward(d_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *rest: Any, **_: Any) -> int:
    return _flops(qkv, *rest, products=5)
