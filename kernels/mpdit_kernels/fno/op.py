"""The public function: checks, choice of implementation, and the custom operator with its gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mpdit_kernels.checks import check, check_shapes, check_tensors
from mpdit_kernels.dispatch import takes_triton
from mpdit_kernels.fno import reference
from mpdit_kernels.operators import absent, count_flops, kernel_op
from mpdit_kernels.proof import SAMPLES

LAYERS = 3
"""Layers that the kernels are written for."""
WIDTHS = (16, 32, 64)
"""Channels that the kernels take."""


def fno_time_embedding(t: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Compute MPDiT's time embedding: a Fourier neural operator on the grid linspace(-1, 1, 32) + t (section 3.3).

    Through the kernels gradients can be taken once, by torch.autograd's backward; `use("reference")` has no such limit.
    The first call on a device copies tables there, which a CUDA graph can't capture: call it once before a capture.

    Args:
        t: [B].
        weights: named and laid out as in the official checkpoints, for two layers or more, i = 0, 1, ...:
            "fc0.weight" [W, 1], "fc0.bias" [W]; "conv{i}.weights_real" and "conv{i}.weights_imag" [W in, W out, 16],
            "w{i}.weight" [W out, W in, 1], "w{i}.bias" [W]; "fc1.weight" [D, W], "fc1.bias" [D].

    Returns:
        [B, D] in fp32, or in float64 if any input is: autocast and narrow weights change nothing of the arithmetic.
        Weights of the last layer's frequencies other than zero don't act; their gradients are zero, not None.

    Raises:
        ValueError: what is no tensor, entries missing or unknown, or shapes, devices or dtypes that don't fit.
    """
    layers, ordered = _check(t, weights)
    double = torch.float64 in (t.dtype, *(value.dtype for value in ordered))
    dtype = torch.float64 if double else torch.float32
    width = ordered[0].shape[0]
    trial = partial(_trial, t, weights)
    takes = takes_triton("fno_time_embedding", t, *ordered, refusal=_refusal(layers, width), trial=trial)
    t, ordered = t.to(dtype), [value.to(dtype) for value in ordered]
    if takes:
        return _fno(t, ordered)[0]
    with torch.autocast(t.device.type, enabled=False):
        return reference.fno_time_embedding(t, dict(zip(reference.names(layers), ordered, strict=True)))


def _check(t: Tensor, weights: Mapping[str, Tensor]) -> tuple[int, list[Tensor]]:
    """Return the number of layers, and the weights in order."""
    check_tensors(t=t)
    sizes = check_shapes({"1": 1, "modes": reference.MODES}, t=(t, "[B]"))
    check(isinstance(weights, Mapping), "weights", type(weights).__name__, "a mapping from names to tensors")
    layers = max(sum(str(name).endswith(part) for name in weights) for part in (".weights_real", ".weights_imag"))
    check(layers >= 2, "weights", f"of {layers} layers, by its conv{{i}}.weights_real", "at least 2 layers")
    names = reference.names(layers)
    missing = [name for name in names if name not in weights]
    unknown = [name for name in weights if name not in names]
    check(not missing, "weights", f"without {', '.join(missing)}", f"{', '.join(names)}")
    check(not unknown, "weights", f"with {', '.join(map(str, unknown))}", f"only {', '.join(names)}")
    check_tensors(t=t, **{name: weights[name] for name in names})
    ends = {"fc0.weight": "[W, 1]", "fc0.bias": "[W]", "fc1.weight": "[D, W]", "fc1.bias": "[D]"}
    check_shapes(sizes, **{name: (weights[name], shape) for name, shape in ends.items()})
    channels, width = sizes["W"], sizes["D"]
    check(min(channels, width) > 0, "weights", f"of {channels} channels and width {width}", "at least one of each")
    sizes |= {"W in": channels, "W out": channels}
    mixing = "[W in, W out, modes]"
    parts = {
        "conv{}.weights_real": mixing,
        "conv{}.weights_imag": mixing,
        "w{}.weight": "[W out, W in, 1]",
        "w{}.bias": "[W]",
    }
    layer = {name.format(i): shape for i in range(layers) for name, shape in parts.items()}
    check_shapes(sizes, **{name: (weights[name], shape) for name, shape in layer.items()})
    return layers, [weights[name] for name in names]


def _trial(t: Tensor, weights: Mapping[str, Tensor]) -> tuple[Callable[..., Any], list[Tensor]]:
    """Return what a proof calls: the same with the first samples alone."""
    return lambda t, *values: fno_time_embedding(t, dict(zip(weights, values, strict=True))), [
        t[:SAMPLES],
        *weights.values(),
    ]


def _refusal(layers: int, width: int) -> str | None:
    if layers != LAYERS:
        return f"there are {layers} layers, and the kernels are for {LAYERS}"
    if width not in WIDTHS:
        return f"there are {width} channels, and the kernels take {', '.join(map(str, WIDTHS))}"
    return None


@kernel_op("fno", "forward", "fno(Tensor t, Tensor[] weights) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
def _fno(t, weights):  # type: ignore[no-untyped-def]
    """Return (out [B, D], spectrum, derivative, means, start, slope), all fp32, by triton_impl.forward."""
    batch, channels, width = t.shape[0], weights[0].shape[0], weights[-1].shape[0]
    per_sample = (batch, channels, reference.GRID)
    shapes = ((batch, width), per_sample, per_sample, (2, batch, channels), (channels, reference.GRID), (channels,))
    return tuple(t.new_empty(shape) for shape in shapes)


@kernel_op(
    "fno",
    "backward",
    "fno_backward(Tensor d_out, Tensor t, Tensor[] weights, Tensor spectrum, Tensor derivative, Tensor means, "
    "Tensor start, Tensor slope, bool of_t, bool of_weights) -> Tensor[]",
)
def _fno_backward(d_out, t, weights, spectrum, derivative, means, start, slope, of_t, of_weights):  # type: ignore[no-untyped-def]
    """Return the gradients of t and, in order, of the weights, by triton_impl.backward; empty where not asked for."""
    wanted = [(t, of_t), *((value, of_weights) for value in weights)]
    return [value.new_empty(value.shape) if asked else absent(t) for value, asked in wanted]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    t, weights = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(t, *weights, *output[1:])


def _gradients(ctx: Any, d_out: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    t, *others = ctx.saved_tensors
    weights, saved = others[:-5], others[-5:]
    of_t, of_each = ctx.needs_input_grad
    if d_out is None:
        return None, [None] * len(weights)
    d_t, *found = _fno_backward(d_out, t, weights, *saved, of_t, any(of_each))
    return d_t if of_t else None, [x if asked else None for x, asked in zip(found, of_each, strict=True)]


_fno.register_autograd(_gradients, setup_context=_save)


@count_flops(torch.ops.mpdit_kernels.fno)
def _flops(t: Tensor, weights: Sequence[Tensor], **_: Any) -> int:
    once, each = reference.macs(len(weights[0]), len(weights[-1]), (len(weights) - 4) // 4)
    return 2 * (once + len(t) * each)


@count_flops(torch.ops.mpdit_kernels.fno_backward)
def _flops_backward(d_out: Tensor, t: Tensor, weights: Sequence[Tensor], *_: Any, **__: Any) -> int:
    return 2 * _flops(t, weights)
