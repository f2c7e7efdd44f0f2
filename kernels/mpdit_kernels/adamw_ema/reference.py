"""The definition: one step of AdamW with the weights' moving average, on one tensor and on many."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw


@dataclass(frozen=True)
class Settings:
    """Settings of a step; `lr` may be a 0-dim tensor on the parameters' device."""

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    ema_decay: float


@dataclass(frozen=True)
class Batch:
    """Tensors that are stepped together, of one device and one set of dtypes: the i-th of each list belong together.

    Attributes:
        params, exp_avgs, exp_avg_sqs, emas: fp32 (or fp64), updated in place.
        grads: of any floating-point dtype.
        steps: fp32 scalars, steps taken so far; counted up.
        copies: tensors that receive the new weights in their own dtype, or None.
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    emas: list[Tensor]
    steps: list[Tensor]
    copies: list[Tensor] | None


@torch.no_grad()
def adamw_ema_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema_decay: float,
    factor: float = 1.0,
    copy: Tensor | None = None,
) -> None:
    """Update param, both moments and ema in place; all fp32 (or fp64) of one shape.

    AdamW is Loshchilov & Hutter, "Decoupled weight decay regularization" (ICLR 2019), algorithm 2, as torch defines
    it: the decay is scaled by lr. `step` counts from 1. The gradient is taken times `factor`, which clips its norm.
    The average follows the updated weights: ema <- ema_decay * ema + (1 - ema_decay) * param. `copy`, of any dtype,
    receives the updated weights.
    """
    beta1, beta2 = betas
    grad = grad.to(param.dtype) * factor
    param.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    mean = exp_avg / (1 - beta1**step)
    deviation = (exp_avg_sq / (1 - beta2**step)).sqrt_()
    param.addcdiv_(mean, deviation.add_(eps), value=-lr)
    ema.lerp_(param, 1 - ema_decay)
    if copy is not None:
        copy.copy_(param)


@torch.no_grad()
def update_(batch: Batch, settings: Settings, factor: Tensor | None, skip: Tensor | None) -> None:
    """Do the same for a batch, by torch's fused AdamW and multi-tensor functions: what CPUs train with.

    `factor` and `skip` are fp32 scalars on the device or None; where skip is 1 nothing changes, to the bit.
    """
    if skip is not None and skip.device.type == "cpu":  # nothing to wait for
        if skip:
            return
        skip = None
    dtype = batch.params[0].dtype
    grads = [grad.to(dtype) for grad in batch.grads]
    if factor is not None:
        grads = list(torch._foreach_mul(grads, factor))
    adamw(
        batch.params,
        grads,
        batch.exp_avgs,
        batch.exp_avg_sqs,
        [],
        batch.steps,
        fused=True,
        amsgrad=False,
        maximize=False,
        beta1=settings.betas[0],
        beta2=settings.betas[1],
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        eps=settings.eps,
        found_inf=skip,
    )
    share = 1 - settings.ema_decay
    if skip is None:
        torch._foreach_lerp_(batch.emas, batch.params, share)
    else:  # a share of 0 would turn an average of -0 into 0
        for ema, moved in zip(batch.emas, torch._foreach_lerp(batch.emas, batch.params, share), strict=True):
            torch.where(skip.bool(), ema, moved, out=ema)
    if batch.copies is not None:
        torch._foreach_copy_(batch.copies, batch.params)
