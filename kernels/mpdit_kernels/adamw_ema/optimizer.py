"""AdamW that also keeps the moving average of its weights, as state that is sharded and saved with the moments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT


class AdamWEMA(torch.optim.Optimizer):
    """`torch.optim.AdamW` plus an exponential moving average (EMA) of the weights; reference.py is the definition.

    The average is `state[param]["ema"]`, shaped like its parameter, a copy of the parameter before the first step.
    Being optimiser state it follows the optimiser wherever that goes: under DeepSpeed's ZeRO the optimiser sees its
    rank's flat fp32 partition, so the average costs 4 bytes a parameter divided by the ranks, is checkpointed with
    the moments, and `deepspeed.utils.safe_get_full_optimizer_state(param, "ema")` gathers it.

    Weights and average are fp32 (fp64 works too) and never less: with a decay of 0.9999 the average moves by 1e-4 of
    the difference, which a bf16 sum rounds away. The learning rate is read from `param_groups` at every step.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, scaled by lr.
        ema_decay: share of the old average in the new one, in [0, 1].

    Raises:
        ValueError: a setting out of its range, or at a step a parameter of less than fp32 or a sparse gradient.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        ema_decay: float = 0.9999,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name} is {value}: give a number of at least 0")
        for name, value in (("betas[0]", betas[0]), ("betas[1]", betas[1])):
            if not 0 <= value < 1:
                raise ValueError(f"{name} is {value}: give a number in [0, 1)")
        if not 0 <= ema_decay <= 1:
            raise ValueError(f"ema_decay is {ema_decay}: give a number in [0, 1]")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "ema_decay": ema_decay}
        # torch reads "fused" when it loads a state: `step` then returns to its parameter's device.
        super().__init__(params, {**defaults, "fused": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; no synchronisation with the device.

        Returns what `closure` returned, when one is given.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            states = [self._state(param) for param in params]
            emas = [state["ema"] for state in states]
            beta1, beta2 = group["betas"]
            adamw(
                params,
                [param.grad for param in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                maximize=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
            )
            torch._foreach_lerp_(emas, params, 1 - group["ema_decay"])
        return result

    def _state(self, param: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        if not state:
            if param.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"a parameter is {param.dtype}: AdamWEMA needs fp32 master weights")
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["ema"] = param.detach().clone(memory_format=torch.preserve_format)
        return state
