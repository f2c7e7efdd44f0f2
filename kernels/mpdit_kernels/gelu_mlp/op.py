"""The public function: checks, choice of implementation, and the custom operator with its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mpdit_kernels.checks import autocast_dtype, check, check_filled, check_shapes, check_tensors
from mpdit_kernels.dispatch import takes_triton
from mpdit_kernels.gelu_mlp import reference
from mpdit_kernels.operators import absent, count_flops, kernel_op
from mpdit_kernels.proof import SAMPLES


def gelu_linear(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor | None = None, bias2: Tensor | None = None
) -> Tensor:
    """Compute gelu(x weight1^T + bias1) weight2^T + bias2: a DiT block's MLP, with the tanh form of GELU.

    GELU's tanh form is that of Hendrycks and Gimpel (arXiv 1606.08415, section 2). For backward it keeps x and the
    pre-activation, and the activation is computed again; where no gradient is asked for it keeps neither.
    Through the kernels gradients can be taken once, by torch.autograd's backward; `use("reference")` has no such limit.

    Args:
        x: [..., D]; any strides.
        weight1, bias1: [H, D] and [H].
        weight2, bias2: [D2, H] and [D2], or neither: the result is then the activation.

    Returns:
        [..., D2], or [..., H] without weight2, in the dtype of x: all tensors have the same. Under autocast they may
        differ, and are taken, and returned, in autocast's.

    Raises:
        ValueError: what is no tensor, or shapes, devices or dtypes that don't fit.
    """
    _check(x, weight1, bias1, weight2, bias2)
    tensors: Sequence[Tensor | None] = (x, weight1, bias1, weight2, bias2)
    if takes_triton("gelu_linear", *tensors, trial=lambda: (gelu_linear, [x[:SAMPLES], *tensors[1:]])):
        if (dtype := autocast_dtype(x)) is not None:
            tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
        keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
        return _gelu_linear(*tensors, keep)[0]
    return reference.gelu_linear(x, weight1, bias1, weight2, bias2)


def _check(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor | None, bias2: Tensor | None) -> None:
    weights = {"weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2}
    check_tensors(("weight2", "bias2"), x=x, **weights)
    check(x.ndim > 0, "x", "of shape []", "[..., D] with at least one column")
    check_filled("x", x, -1, "[..., D] with at least one column")
    sizes = check_shapes({"D": x.shape[-1]}, weight1=(weight1, "[H, D]"))
    check_filled("weight1", weight1, 0, "at least one row")
    check_shapes(sizes, bias1=(bias1, "[H]"))
    if (weight2 is None) != (bias2 is None):
        got = ("None", "a tensor, as weight2 is") if bias2 is None else ("given", "None, as weight2 is")
        check(False, "bias2", *got)
    check_shapes(sizes, weight2=(weight2, "[D2, H]"))
    if weight2 is not None:
        check_filled("weight2", weight2, 0, "at least one row")
    check_shapes(sizes, bias2=(bias2, "[D2]"))
    if autocast_dtype(x) is None:
        for name, tensor in weights.items():
            if tensor is not None:
                check(tensor.dtype == x.dtype, name, f"of dtype {tensor.dtype}", f"{x.dtype}, as x")


@kernel_op(
    "gelu_mlp",
    "forward",
    "gelu_linear(Tensor x, Tensor weight1, Tensor bias1, Tensor? weight2, Tensor? bias2, bool keep) "
    "-> (Tensor, Tensor)",
    products=True,
)
def _gelu_linear(x, weight1, bias1, weight2, bias2, keep):  # type: ignore[no-untyped-def]
    """Return (result, pre-activation [..., H]) by triton_impl.forward; the second is empty unless kept."""
    hidden = (*x.shape[:-1], weight1.shape[0])
    result = hidden if weight2 is None else (*x.shape[:-1], weight2.shape[0])
    return x.new_empty(result), x.new_empty(hidden) if keep else absent(x)


@kernel_op(
    "gelu_mlp",
    "backward",
    "gelu_linear_backward(Tensor dy, Tensor x, Tensor weight1, Tensor? weight2, Tensor hidden, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    products=True,
)
def _gelu_linear_backward(dy, x, weight1, weight2, hidden, needs):  # type: ignore[no-untyped-def]
    """Return gradients of x, weight1, bias1, weight2 and bias2 by triton_impl.backward; empty where not needed."""
    second = (0, 0) if weight2 is None else (weight2.shape, weight2.shape[:1])
    shapes = (x.shape, weight1.shape, weight1.shape[:1], *second)
    return tuple(x.new_empty(shape) if need else absent(x) for shape, need in zip(shapes, needs, strict=True))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight1, _, weight2, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight1, weight2, output[1])


def _gradients(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[:5]
    if dy is None:
        return (None,) * 6
    gradients = _gelu_linear_backward(dy, *ctx.saved_tensors, needs)
    return *(g if needed else None for g, needed in zip(gradients, needs, strict=True)), None


_gelu_linear.register_autograd(_gradients, setup_context=_save)


@count_flops(torch.ops.mpdit_kernels.gelu_linear)
def _flops(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor | None, *_: Any, **__: Any) -> int:
    return 2 * (x.numel() // x.shape[-1]) * (weight1.numel() + (0 if weight2 is None else weight2.numel()))


@count_flops(torch.ops.mpdit_kernels.gelu_linear_backward)
def _flops_backward(
    dy: Tensor, x: Tensor, weight1: Tensor, weight2: Tensor | None, hidden: Tensor, needs: Sequence[bool], **_: Any
) -> int:
    of_x, of_weight1, of_bias1, of_weight2, _of_bias2 = needs
    products = (of_x + of_weight1) * weight1.numel()
    if weight2 is not None:
        products += (of_weight2 + (of_x or of_weight1 or of_bias1)) * weight2.numel()
    return 2 * (x.numel() // x.shape[-1]) * products
