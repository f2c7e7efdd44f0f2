"""The public functions: checks, choice of implementation, and the custom operator with its gradient.

One operator serves the three functions, parts left out being None going in and empty coming out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mpdit_kernels.adaln import reference
from mpdit_kernels.checks import autocast_dtype, check, check_eps, check_filled, check_shapes, check_tensors
from mpdit_kernels.dispatch import takes_triton, too_wide
from mpdit_kernels.operators import absent, count_flops, kernel_op
from mpdit_kernels.proof import SAMPLES
from mpdit_kernels.varlen import Offsets, Sequences, sequences

MAX_TOKENS = 2**19
"""Fewer than fill the second axis of a CUDA grid."""


def adaln_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    *,
    dtype: torch.dtype | None = None,
    cu_seqlens: Offsets | None = None,
) -> Tensor:
    """Compute LN(x) * (1 + scale) + shift: DiT's adaptive layer norm (Peebles and Xie, ICCV 2023, section 3.2).

    Args:
        x: [B, T, D]; any strides.
        shift, scale: [B, D], of any floating-point dtypes.
        eps: added to the variance.
        dtype: of the result; by default what a matrix product on it would take: autocast's dtype, or else x's.
        cu_seqlens: cumulative lengths (0, ..., N) of S sequences: x and the result are then [N, D], one sequence after
            the other, and shift and scale [S, D].

    Returns:
        [B, T, D]. Statistics and arithmetic are fp32.

    Raises:
        ValueError: shapes, devices, dtypes or lengths that don't fit.
    """
    packed = _check(x, cu_seqlens, shift=shift, scale=scale)
    dtype = _result(x, eps, dtype)
    proof = _proof(partial(adaln_modulate, eps=eps, dtype=dtype), packed, [x], [shift, scale], dtype)
    if takes_triton("adaln_modulate", x, shift, scale, refusal=_refusal(x, packed), **proof):
        return _adaln(x, None, None, shift, scale, eps, dtype, _offsets(packed))[1]
    if packed is not None:
        return reference.packed(reference.adaln_modulate, packed.lengths, [x], [shift, scale], eps, dtype)[0]
    return reference.adaln_modulate(x, shift, scale, eps, dtype)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor, *, cu_seqlens: Offsets | None = None) -> Tensor:
    """Compute x + gate * branch in one pass, and the gradients of all three in one.

    Args:
        x, branch: [B, T, D]; any strides and dtypes.
        gate: [B, D].
        cu_seqlens: as for `adaln_modulate`: x and branch are then [N, D], gate [S, D].

    Returns:
        [B, T, D] in the dtype of x.

    Raises:
        ValueError: shapes, devices, dtypes or lengths that don't fit.
    """
    packed = _check(x, cu_seqlens, branch=branch, gate=gate)
    proof = _proof(gated_residual, packed, [x, branch], [gate])
    if takes_triton("gated_residual", x, branch, gate, refusal=_refusal(x, packed), **proof):
        return _adaln(x, branch, gate, None, None, 0.0, x.dtype, _offsets(packed))[0]
    if packed is not None:
        return reference.packed(reference.gated_residual, packed.lengths, [x, branch], [gate])[0]
    return reference.gated_residual(x, branch, gate)


def gated_residual_adaln(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    *,
    dtype: torch.dtype | None = None,
    cu_seqlens: Offsets | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the residual x + gate * branch and, of it, LN(residual) * (1 + scale) + shift: reads two, writes two.

    Args:
        x, branch: [B, T, D]; any strides and dtypes.
        gate, shift, scale: [B, D].
        eps: added to the variance.
        dtype: of the second result; by default what a matrix product would take: autocast's dtype, or else x's.
        cu_seqlens: as for `adaln_modulate`: x and branch are then [N, D], the vectors [S, D].

    Returns:
        (residual [B, T, D] in the dtype of x, modulated [B, T, D]).

    Raises:
        ValueError: shapes, devices, dtypes or lengths that don't fit.
    """
    packed = _check(x, cu_seqlens, branch=branch, gate=gate, shift=shift, scale=scale)
    dtype = _result(x, eps, dtype)
    tokens, vectors = [x, branch], [gate, shift, scale]
    proof = _proof(partial(gated_residual_adaln, eps=eps, dtype=dtype), packed, tokens, vectors, dtype)
    if takes_triton("gated_residual_adaln", *tokens, *vectors, refusal=_refusal(x, packed), **proof):
        residual, y, _ = _adaln(x, branch, gate, shift, scale, eps, dtype, _offsets(packed))
        return residual, y
    if packed is not None:
        residual, y = reference.packed(reference.gated_residual_adaln, packed.lengths, tokens, vectors, eps, dtype)
        return residual, y
    return reference.gated_residual_adaln(x, branch, gate, shift, scale, eps, dtype)


def _check(x: Tensor, cu_seqlens: Offsets | None, **others: Tensor) -> Sequences | None:
    """Return the packed sequences, None without cumulative lengths, all arguments being as they should."""
    check_tensors(x=x, **others)
    tokens, vectors = ("[B, T, D]", "[B, D]") if cu_seqlens is None else ("[N, D]", "[S, D]")
    sizes = check_shapes({}, x=(x, tokens))
    check_filled("x", x, -1, "at least one column")
    packed = None
    if cu_seqlens is not None:
        packed = sequences(cu_seqlens, x.shape[0])
        sizes["S"] = len(packed)
    check_shapes(sizes, **{name: (value, tokens if name == "branch" else vectors) for name, value in others.items()})
    return packed


def _refusal(x: Tensor, packed: Sequences | None) -> str | None:
    tokens = x.shape[1] if packed is None else packed.longest
    if tokens > MAX_TOKENS:
        return f"there are {tokens} tokens, and the kernels take {MAX_TOKENS} at most"
    return too_wide(x)


def _proof(
    call: Callable[..., Any],
    packed: Sequences | None,
    tokens: Sequence[Tensor],
    vectors: Sequence[Tensor],
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Return what `takes_triton` proves a kernel by: the same call with the first samples alone."""

    def trial() -> tuple[Callable[..., Any], list[Tensor]]:
        if packed is None:
            return call, [x[:SAMPLES] for x in (*tokens, *vectors)]
        offsets = packed.offsets[: SAMPLES + 1]
        few = [*(x[: offsets[-1]] for x in tokens), *(v[:SAMPLES] for v in vectors)]
        return partial(call, cu_seqlens=offsets), few

    return {"trial": trial, "variant": (dtype, packed is None)}


def _offsets(packed: Sequences | None) -> list[int] | None:
    """Return them as the operators take them: whole numbers, so that a compiled graph holds no copy to the device."""
    return None if packed is None else list(packed.offsets)


def _result(x: Tensor, eps: float, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of what is normalised."""
    check_eps(eps)
    dtype = dtype or autocast_dtype(x) or x.dtype
    check(dtype.is_floating_point, "dtype", dtype, "a floating-point type")
    return dtype


@kernel_op(
    "adaln",
    "forward",
    "adaln(Tensor x, Tensor? branch, Tensor? gate, Tensor? shift, Tensor? scale, float eps, ScalarType dtype, "
    "SymInt[]? offsets=None) -> (Tensor, Tensor, Tensor)",
)
def _adaln(x, branch, gate, shift, scale, eps, dtype, offsets=None):  # type: ignore[no-untyped-def]
    """Return (residual, y, statistics fp32 [2, B, T]) by triton_impl.forward, empty where arguments ask for none."""
    return (
        absent(x) if branch is None else x.new_empty(x.shape),
        absent(x) if shift is None else x.new_empty(x.shape, dtype=dtype),
        absent(x) if shift is None else x.new_empty((2, *x.shape[:-1]), dtype=torch.float32),
    )


@kernel_op(
    "adaln",
    "backward",
    "adaln_backward(Tensor? d_residual, Tensor? d_y, Tensor x, Tensor? branch, Tensor? gate, Tensor? scale, "
    "Tensor? statistics, SymInt[]? offsets=None) -> (Tensor, Tensor, Tensor)",
)
def _adaln_backward(d_residual, d_y, x, branch, gate, scale, statistics, offsets=None):  # type: ignore[no-untyped-def]
    """Return (dx, dbranch, fp32 [1 to 3, B, D]): dx is empty without d_y, dbranch without branch.

    By triton_impl.backward. The third is of the gate where there is a branch, then of shift and scale where there is
    d_y.
    """
    rows = x.shape[0] if offsets is None else len(offsets) - 1
    return (
        absent(x) if d_y is None else x.new_empty(x.shape),
        absent(x) if branch is None else branch.new_empty(x.shape),
        x.new_empty(((branch is not None) + 2 * (d_y is not None), rows, x.shape[-1]), dtype=torch.float32),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, branch, gate, shift, scale, _, _, ctx.offsets = inputs
    residual, _, statistics = output
    normalized = x if branch is None else branch if shift is None else residual  # only its shape counts without a norm
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(normalized, branch, gate, scale, statistics)
    ctx.dtypes = tuple(None if value is None else value.dtype for value in (gate, shift, scale))


def _gradients(ctx: Any, d_residual: Tensor | None, d_y: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    normalized, branch, gate, scale, statistics = ctx.saved_tensors
    d_residual, d_y = None if branch is None else d_residual, None if scale is None else d_y  # those of empty outputs
    if d_residual is None and d_y is None:
        return (None,) * 8
    dx, dbranch, sums = _adaln_backward(d_residual, d_y, normalized, branch, gate, scale, statistics, ctx.offsets)
    written = iter(sums.unbind())
    wanted = (branch is not None, d_y is not None, d_y is not None)
    vectors = [next(written).to(dtype) if want else None for dtype, want in zip(ctx.dtypes, wanted, strict=True)]
    return d_residual if d_y is None else dx, None if branch is None else dbranch, *vectors, None, None, None


_adaln.register_autograd(_gradients, setup_context=_save)


@count_flops(torch.ops.mpdit_kernels.adaln, torch.ops.mpdit_kernels.adaln_backward)
def _no_products(*_: Any, **__: Any) -> int:
    return 0
