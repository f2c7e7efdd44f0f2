"""The public functions: checks, choice of implementation, and the custom operator with its gradient.

One operator serves the three functions, parts left out being None going in and empty coming out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpdit_kernels.adaln import reference
from mpdit_kernels.checks import (
    autocast_dtype,
    check,
    check_alike,
    check_dims,
    check_eps,
    check_filled,
    check_shape,
    check_tensors,
)
from mpdit_kernels.dispatch import takes_triton, too_wide

MAX_TOKENS = 2**19
"""Fewer than fill the second axis of a CUDA grid."""


def adaln_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, dtype: torch.dtype | None = None
) -> Tensor:
    """LN(x) * (1 + scale) + shift: DiT's adaptive layer norm (Peebles and Xie, ICCV 2023, section 3.2).

    Args:
        x: [B, T, D]; any strides.
        shift, scale: [B, D], of any floating-point dtypes.
        eps: added to the variance.
        dtype: of the result; by default what a matrix product on it would take: autocast's dtype, or else x's.

    Returns:
        [B, T, D]. Statistics and arithmetic are fp32.

    Raises:
        ValueError: shapes, devices or dtypes that don't fit.
    """
    _check(x, shift=shift, scale=scale)
    dtype = _result(x, eps, dtype)
    if takes_triton("adaln_modulate", x, shift, scale, refusal=_refusal(x)):
        return _adaln(x, None, None, shift, scale, eps, dtype)[1]
    return reference.adaln_modulate(x, shift, scale, eps, dtype)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """x + gate * branch in one pass, and one for the gradients of all three.

    Args:
        x, branch: [B, T, D]; any strides and dtypes.
        gate: [B, D].

    Returns:
        [B, T, D] in the dtype of x.

    Raises:
        ValueError: shapes, devices or dtypes that don't fit.
    """
    _check(x, branch=branch, gate=gate)
    if takes_triton("gated_residual", x, branch, gate, refusal=_refusal(x)):
        return _adaln(x, branch, gate, None, None, 0.0, x.dtype)[0]
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
) -> tuple[Tensor, Tensor]:
    """The residual x + gate * branch and, of it, LN(residual) * (1 + scale) + shift: reads two, writes two.

    Args:
        x, branch: [B, T, D]; any strides and dtypes.
        gate, shift, scale: [B, D].
        eps: added to the variance.
        dtype: of the second result; by default what a matrix product would take: autocast's dtype, or else x's.

    Returns:
        (residual [B, T, D] in the dtype of x, modulated [B, T, D]).

    Raises:
        ValueError: shapes, devices or dtypes that don't fit.
    """
    _check(x, branch=branch, gate=gate, shift=shift, scale=scale)
    dtype = _result(x, eps, dtype)
    if takes_triton("gated_residual_adaln", x, branch, gate, shift, scale, refusal=_refusal(x)):
        residual, y, _ = _adaln(x, branch, gate, shift, scale, eps, dtype)
        return residual, y
    return reference.gated_residual_adaln(x, branch, gate, shift, scale, eps, dtype)


def _check(x: Tensor, **others: Tensor) -> None:
    check_tensors(x=x, **others)
    check_dims("x", x, "[B, T, D]")
    check_alike(x=x, **others)
    check_filled("x", x, -1, "at least one column")
    if "branch" in others:
        check_shape("branch", others.pop("branch"), x.shape, "[B, T, D] as x")
    for name, vector in others.items():
        check_shape(name, vector, (x.shape[0], x.shape[2]), "[B, D]")


def _refusal(x: Tensor) -> str | None:
    if x.shape[1] > MAX_TOKENS:
        return f"there are {x.shape[1]} tokens, and the kernels take {MAX_TOKENS} at most"
    return too_wide(x)


def _result(x: Tensor, eps: float, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of what is normalised."""
    check_eps(eps)
    dtype = dtype or autocast_dtype(x) or x.dtype
    check(dtype.is_floating_point, "dtype", dtype, "a floating-point type")
    return dtype


@torch.library.custom_op("mpdit_kernels::adaln", mutates_args=())
def _adaln(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(residual, modulated, statistics fp32 [2,B,T]); empty where the arguments ask for none."""
    from mpdit_kernels.adaln import triton_impl

    outputs = triton_impl.forward(x, branch, gate, shift, scale, eps, dtype)
    return tuple(x.new_empty(0) if out is None else out for out in outputs)  # type: ignore[return-value]


@_adaln.register_fake
def _(x, branch, gate, shift, scale, eps, dtype):  # type: ignore[no-untyped-def]
    return (
        x.new_empty(0 if branch is None else x.shape),
        x.new_empty(0 if shift is None else x.shape, dtype=x.dtype if shift is None else dtype),
        x.new_empty(0, dtype=x.dtype) if shift is None else x.new_empty((2, *x.shape[:2]), dtype=torch.float32),
    )


@torch.library.custom_op("mpdit_kernels::adaln_backward", mutates_args=())
def _adaln_backward(
    d_residual: Tensor | None,
    d_y: Tensor | None,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    statistics: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dbranch, fp32 [1 to 3, B, D]); dx is empty without d_y, dbranch without branch.

    The third is of the gate where there is a branch, then of shift and scale where there is d_y.
    """
    from mpdit_kernels.adaln import triton_impl

    outputs = triton_impl.backward(d_residual, d_y, x, branch, gate, scale, statistics)
    return tuple(x.new_empty(0) if out is None else out for out in outputs)  # type: ignore[return-value]


@_adaln_backward.register_fake
def _(d_residual, d_y, x, branch, gate, scale, statistics):  # type: ignore[no-untyped-def]
    return (
        x.new_empty(0 if d_y is None else x.shape),
        x.new_empty(0) if branch is None else branch.new_empty(x.shape),
        x.new_empty(((branch is not None) + 2 * (d_y is not None), x.shape[0], x.shape[2]), dtype=torch.float32),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, branch, gate, shift, scale, *_ = inputs
    residual, _, statistics = output
    normalized = x if branch is None else branch if shift is None else residual  # only its shape counts without a norm
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(normalized, branch, gate, scale, statistics)
    ctx.dtypes = tuple(None if value is None else value.dtype for value in (gate, shift, scale))


def _gradients(ctx: Any, d_residual: Tensor | None, d_y: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    normalized, branch, gate, scale, statistics = ctx.saved_tensors
    d_residual, d_y = None if branch is None else d_residual, None if scale is None else d_y  # those of empty outputs
    if d_residual is None and d_y is None:
        return (None,) * 7
    dx, dbranch, sums = _adaln_backward(d_residual, d_y, normalized, branch, gate, scale, statistics)
    written = iter(sums.unbind())
    asked = (branch is not None, d_y is not None, d_y is not None)
    vectors = [next(written).to(dtype) if wanted else None for dtype, wanted in zip(ctx.dtypes, asked, strict=True)]
    return d_residual if d_y is None else dx, None if branch is None else dbranch, *vectors, None, None


_adaln.register_autograd(_gradients, setup_context=_save)
