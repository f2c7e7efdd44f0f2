"""The public function: checks, choice of implementation, and the custom operator with its gradient.

The operator sees matrices laid out for its two products: the expanding weight with rows (i, j, channel), and the
refining weight with the skip's beside it. Laying them out is left to autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mpdit_kernels.checks import autocast_dtype, check, check_eps, check_filled, check_shapes, check_tensors
from mpdit_kernels.dispatch import takes_triton, too_wide
from mpdit_kernels.operators import absent, count_flops, kernel_op
from mpdit_kernels.proof import SAMPLES
from mpdit_kernels.upsample import reference


def upsample_tokens(
    x: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    refine_weight: Tensor,
    refine_bias: Tensor,
    num_class_tokens: int,
    factor: int,
    skip: tuple[Tensor, Tensor, Tensor] | None = None,
    position: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Take coarse tokens to fine ones: MPDiT's Upsample block (section 3.1 of its paper).

    Image tokens pass a Linear D -> r*r*D, a pixel-shuffle onto the r times finer grid and tanh-GELU; class tokens join
    them unchanged; all pass a layer norm without affine part and a Linear; the skip from the input's patches and the
    finer positions are added to the image tokens.

    Args:
        x: [B, m + n0, D], class tokens first, then h * w coarse image tokens by rows; any strides.
        expand_weight, expand_bias: [D*r*r, D], [D*r*r], row d*r*r + i*r + j for channel d and offset (i, j).
        refine_weight, refine_bias: [D, D], [D].
        num_class_tokens: m, may be 0.
        factor: r.
        skip: (patches [B, n1, K], weight [D, K], bias [D]), n1 = r*r*n0.
        position: [n1, D].
        grid: (h, w); square by default.
        eps: added to the variance.

    Returns:
        [B, m + n1, D]. Products take autocast's dtype, or else x's, and accumulate in fp32; the result's dtype is the
        widest of that one, x's, the position's and the skip bias's, so an fp32 residual stream stays fp32.

    Raises:
        ValueError: shapes, devices, dtypes or types that don't fit.
    """
    check_eps(eps)
    weights = {
        "expand_weight": expand_weight,
        "expand_bias": expand_bias,
        "refine_weight": refine_weight,
        "refine_bias": refine_bias,
    }
    grid = _check(x, weights, num_class_tokens, factor, skip, position, grid)
    patches, skip_weight, skip_bias = skip or (None, None, None)
    compute = autocast_dtype(x) or x.dtype
    dtype = torch.promote_types(compute, x.dtype)
    for addend in (skip_bias, position):
        dtype = dtype if addend is None else torch.promote_types(dtype, addend.dtype)
    tensors = (x, expand_weight, expand_bias, refine_weight, refine_bias, patches, skip_weight, skip_bias, position)
    settings = (num_class_tokens, factor, grid, eps)
    trial, variant = partial(_trial, settings, x, tensors[1:]), (*settings, [value is None for value in tensors])
    if takes_triton("upsample_tokens", *tensors, refusal=too_wide(x), trial=trial, variant=variant):
        expand = _offset_major(expand_weight, factor, compute)
        refine = refine_weight
        if skip_weight is not None:
            # Rows of a multiple of 16 bytes; the added columns meet zeros.
            refine = pad(torch.cat([refine_weight, skip_weight], dim=1), (0, -skip_weight.shape[1] % 8))
        bias, refine = _offset_major(expand_bias, factor, compute), refine.to(compute)
        sizes = [num_class_tokens, factor, *grid]
        return _upsample(x, expand, bias, refine, refine_bias, patches, skip_bias, position, sizes, eps, dtype)[0]
    if not torch.is_autocast_enabled(x.device.type):  # autocast would cast by itself
        expand_weight, expand_bias = expand_weight.to(compute), expand_bias.to(compute)
        refine_weight, refine_bias = refine_weight.to(compute), refine_bias.to(compute)
        if skip is not None:
            skip = (skip[0].to(compute), skip[1].to(compute), skip[2])
    return reference.upsample_tokens(
        *(x, expand_weight, expand_bias, refine_weight, refine_bias, num_class_tokens, factor),
        *(skip, position, grid, eps, dtype),
    )


def _check(
    x: Tensor,
    weights: dict[str, Tensor],
    m: int,
    r: int,
    skip: Any,
    position: Tensor | None,
    grid: tuple[int, int] | None,
) -> tuple[int, int]:
    """Return the coarse grid, all arguments being as they should."""
    check_tensors(x=x, **weights)
    if skip is not None and not (isinstance(skip, tuple) and len(skip) == 3):
        got = f"a tuple of {len(skip)}" if isinstance(skip, tuple) else f"of type {type(skip).__name__}"
        check(False, "skip", got, "a tuple (patches, weight, bias), or None")
    patches, skip_weight, skip_bias = skip or (None, None, None)
    optional = {"position": position}
    if skip is not None:
        optional |= {"patches": patches, "skip_weight": skip_weight, "skip_bias": skip_bias}
    check_tensors(("position",), x=x, **optional)
    sizes = check_shapes({}, x=(x, "[B, m+n0, D]"))
    tokens, width = x.shape[1:]
    check_filled("x", x, 2, "at least one column")
    check(_integer(r) and r >= 1, "factor", r, "an integer of at least 1")
    if not (_integer(m) and 0 <= m < tokens):
        check(False, "num_class_tokens", m, f"an integer of at least 0, and fewer than x's {tokens} tokens")
    coarse = tokens - m
    grid = _grid(grid, coarse)
    sizes |= {"D*r*r": width * r * r, "n1": coarse * r * r}
    shapes = {"expand_weight": "[D*r*r, D]", "expand_bias": "[D*r*r]", "refine_weight": "[D, D]", "refine_bias": "[D]"}
    check_shapes(sizes, **{name: (weights[name], shape) for name, shape in shapes.items()})
    if patches is not None:
        check_shapes(sizes, patches=(patches, "[B, n1, K]"))
        check_filled("patches", patches, 2, "at least one column")
    check_shapes(sizes, skip_weight=(skip_weight, "[D, K]"), skip_bias=(skip_bias, "[D]"))
    check_shapes(sizes, position=(position, "[n1, D]"))
    return grid


def _trial(
    settings: tuple[Any, ...], x: Tensor, others: Sequence[Tensor | None]
) -> tuple[Callable[..., Tensor], list[Any]]:
    """Return what a proof calls: the same with the first samples alone."""
    num_class_tokens, factor, grid, eps = settings
    *weights, patches, skip_weight, skip_bias, position = others

    def call(x: Tensor, *others: Any) -> Tensor:
        *first, patches, skip_weight, skip_bias, position = others
        skip = None if patches is None else (patches, skip_weight, skip_bias)
        arguments = (x, *first, num_class_tokens, factor, skip, position, grid, eps)
        return upsample_tokens(*arguments)

    few = None if patches is None else patches[:SAMPLES]
    return call, [x[:SAMPLES], *weights, few, skip_weight, skip_bias, position]


def _integer(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt))


def _grid(grid: Any, coarse: int) -> tuple[int, int]:
    """Return (h, w) of the coarse image tokens."""
    if grid is None:
        # Not math.isqrt, which torch.compile can't trace where the number of tokens is dynamic. Rounded, the root of a
        # square is exact up to 2**52.
        side = int(math.sqrt(coarse) + 0.5)
        if side * side != coarse:
            check(False, "grid", None, f"(h, w), as x's {coarse} image tokens are no square")
        return side, side
    pair = isinstance(grid, (tuple, list)) and len(grid) == 2 and _integer(grid[0]) and _integer(grid[1])
    if not (pair and grid[0] * grid[1] == coarse and grid[0] > 0):
        got = grid if isinstance(grid, (tuple, list)) else f"of type {type(grid).__name__}"
        check(False, "grid", got, f"(h, w) of h * w = {coarse} image tokens, two integers")
    return grid[0], grid[1]


def _offset_major(x: Tensor, r: int, dtype: torch.dtype) -> Tensor:
    """Reorder rows as the reference does, in one copy that also casts."""
    rows = x.unflatten(0, (-1, r, r)).movedim(0, 2)
    return rows.to(dtype, memory_format=torch.contiguous_format).flatten(0, 2)


@kernel_op(
    "upsample",
    "forward",
    "upsample(Tensor x, Tensor expand, Tensor expand_bias, Tensor refine, Tensor refine_bias, Tensor? patches, "
    "Tensor? skip_bias, Tensor? position, SymInt[] sizes, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    products=True,
)
def _upsample(x, expand, expand_bias, refine, refine_bias, patches, skip_bias, position, sizes, eps, dtype):  # type: ignore[no-untyped-def]
    """Return (result, and for backward: pre_gelu [B*(m+n1), D] and image tokens [B*n0, D]), by triton_impl.forward.

    pre_gelu is all tokens before GELU; rows of class tokens come first.
    """
    (batch, _, width), (m, r, h, w) = x.shape, sizes
    return (
        x.new_empty((batch, m + h * w * r * r, width), dtype=dtype),
        expand.new_empty((batch * (m + h * w * r * r), width)),
        expand.new_empty((batch * h * w, width)),
    )


@kernel_op(
    "upsample",
    "backward",
    "upsample_backward(Tensor d_out, Tensor rows, Tensor image, Tensor expand, Tensor refine, Tensor? patches, "
    "SymInt[] sizes, float eps, ScalarType dtype, bool[] wanted) -> Tensor[]",
    products=True,
)
def _upsample_backward(d_out, pre_gelu, image, expand, refine, patches, sizes, eps, dtype, wanted):  # type: ignore[no-untyped-def]
    """Return gradients of the first eight arguments of the forward, those not wanted being empty.

    By triton_impl.backward. x's comes as `dtype`, those of matrices and patches in the products' dtype, the others in
    fp32.
    """
    (batch, _, width), (m, r, h, w) = d_out.shape, sizes
    shapes = [
        ((batch, m + h * w, width), dtype),
        (expand.shape, expand.dtype),
        (expand.shape[:1], torch.float32),
        (refine.shape, refine.dtype),
        ((width,), torch.float32),
        (None if patches is None else patches.shape, expand.dtype),
        ((width,), torch.float32),
        ((h * w * r * r, width), torch.float32),
    ]
    return [
        d_out.new_empty(shape, dtype=kind) if want else absent(d_out)
        for (shape, kind), want in zip(shapes, wanted, strict=True)
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, expand, _, refine, _, patches, _, _, ctx.sizes, ctx.eps, _ = inputs
    _, pre_gelu, image = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(pre_gelu, image, expand, refine, patches)
    ctx.dtypes = [None if value is None else value.dtype for value in inputs[:8]]


def _gradients(ctx: Any, d_out: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if d_out is None:
        return (None,) * 11
    wanted = list(ctx.needs_input_grad[:8])
    found = _upsample_backward(d_out, *ctx.saved_tensors, ctx.sizes, ctx.eps, ctx.dtypes[0], wanted)
    gradients = [x.to(dtype) if want else None for x, dtype, want in zip(found, ctx.dtypes, wanted, strict=True)]
    return *gradients, None, None, None


_upsample.register_autograd(_gradients, setup_context=_save)


@count_flops(torch.ops.mpdit_kernels.upsample)
def _flops(x: Tensor, expand: Tensor, expand_bias: Tensor, refine: Tensor, *_: Any, out_val: Any, **__: Any) -> int:
    _out, pre_gelu, image = out_val
    return 2 * (len(image) * expand.numel() + len(pre_gelu) * refine.numel())


@count_flops(torch.ops.mpdit_kernels.upsample_backward)
def _flops_backward(
    d_out: Tensor, pre_gelu: Tensor, image: Tensor, expand: Tensor, refine: Tensor, *rest: Any, **_: Any
) -> int:
    of_x, of_expand, of_bias, of_refine, _refine_bias, of_patches, *_vectors = rest[-1]  # `wanted`
    columns = refine.shape[1] if of_patches else refine.shape[0] if of_x or of_expand or of_bias else 0
    refining = len(pre_gelu) * refine.shape[0] * (columns + (refine.shape[1] if of_refine else 0))
    return 2 * (refining + len(image) * expand.numel() * (of_x + of_expand))
