"""The definition: one step of AdamW with the weights' moving average, on one tensor."""

from __future__ import annotations

import torch
from torch import Tensor


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
) -> None:
    """Update param, both moments and ema in place; all fp32 (or fp64) of one shape.

    AdamW is Loshchilov & Hutter, "Decoupled weight decay regularization" (ICLR 2019), algorithm 2, as torch defines
    it: the decay is scaled by lr. `step` counts from 1. The average follows the updated weights:
    ema <- ema_decay * ema + (1 - ema_decay) * param.
    """
    beta1, beta2 = betas
    param.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    mean = exp_avg / (1 - beta1**step)
    deviation = (exp_avg_sq / (1 - beta2**step)).sqrt_()
    param.addcdiv_(mean, deviation.add_(eps), value=-lr)
    ema.lerp_(param, 1 - ema_decay)
