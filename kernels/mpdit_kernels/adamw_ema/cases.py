"""A step of all of a preset's parameters as one flat partition, as ZeRO has it: bare, and with clipping and a copy."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mpdit_kernels.adamw_ema import op
from mpdit_kernels.adamw_ema.opponents import SETTINGS, opponents
from mpdit_kernels.adamw_ema.reference import Batch
from mpdit_kernels.adamw_ema.uploads import Uploads
from mpdit_kernels.cases import Case, Cost, Shape, random

_UPLOADS = Uploads()


def cases(shape: Shape) -> list[Case]:
    """fp32 gradients; and gradients in 16 bits, clipped, with a copy of the weights in 16 bits."""
    # Weights, moments and average are read and written in fp32; 4 bytes of gradient, or 2 of gradient and 2 of copy.
    cost = Cost(bytes=36 * shape.parameters)
    return [
        Case(
            "adamw_ema",
            f"{shape.name}, {label}",
            partial(_inputs, shape.parameters, full),
            adamw_ema,
            _launch,
            cost,
            opponents=opponents,
        )
        for label, full in (("flat partition", False), ("clipped, with copy", True))
    ]


def adamw_ema(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Tensor,
    step: Tensor,
    copy: Tensor | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """One step in place; returns what it wrote."""
    op.step_(_batch(param, grad, exp_avg, exp_avg_sq, ema, step, copy), SETTINGS, factor, uploads=_UPLOADS)
    return (param, exp_avg, exp_avg_sq, ema) if copy is None else (param, exp_avg, exp_avg_sq, ema, copy)


def _inputs(count: int, full: bool, device: str | torch.device, dtype: torch.dtype) -> list[Tensor]:
    state = [random(count, device=device, grad=False) for _ in range(4)]
    state[2].square_()
    grad = random(count, device=device, dtype=dtype if full else torch.float32, grad=False)
    step = torch.full((), 10.0, device=device)
    extra = [torch.empty(count, device=device, dtype=dtype), torch.full((), 0.5, device=device)]
    return [state[0], grad, *state[1:], step, *(extra if full else [])]


def _batch(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, ema: Tensor, step: Tensor, copy: Tensor | None
) -> Batch:
    return Batch([param], [grad], [exp_avg], [exp_avg_sq], [ema], [step.float()], None if copy is None else [copy])


def _launch(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Tensor,
    step: Tensor,
    copy: Tensor | None = None,
    factor: Tensor | None = None,
) -> None:
    from mpdit_kernels.adamw_ema import triton_impl

    batch = _batch(param, grad, exp_avg, exp_avg_sq, ema, step, copy)
    triton_impl.step_(batch, SETTINGS, factor, None, _UPLOADS)
