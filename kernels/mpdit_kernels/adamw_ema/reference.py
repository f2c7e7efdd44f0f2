"""The definition: one step of AdamW with the weights' moving average. Before it what a step of many tensors is told."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
    steps: int,
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
    it: the decay is scaled by lr. The average follows the updated weights:
    ema <- ema_decay * ema + (1 - ema_decay) * param.

    Args:
        param, exp_avg, exp_avg_sq, ema: weights, first and second moment, average.
        grad: their gradient, of any dtype.
        steps: that were taken before.
        lr, betas, eps, weight_decay: as of torch.optim.AdamW.
        ema_decay: share of the average that a step keeps.
        factor: multiplies the gradient, to clip its norm.
        copy: of any dtype, receives the updated weights.
    """
    beta1, beta2 = betas
    grad = grad.to(param.dtype) * factor
    param.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    mean = exp_avg / (1 - beta1 ** (steps + 1))
    deviation = (exp_avg_sq / (1 - beta2 ** (steps + 1))).sqrt_()
    param.addcdiv_(mean, deviation.add_(eps), value=-lr)
    ema.lerp_(param, 1 - ema_decay)
    if copy is not None:
        copy.copy_(param)
