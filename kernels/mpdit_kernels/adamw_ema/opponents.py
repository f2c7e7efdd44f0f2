"""What AdamWEMA is timed against besides its reference: fused optimisers of others, with the same average.

Nothing of them is imported before `opponents` is called: the package needs torch alone.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from mpdit_kernels.adamw_ema.reference import Settings, adamw_ema_

Maker = Callable[[Sequence[Tensor]], Callable[[], None]]
"""Builds, from a case's inputs, the step to be timed, which writes those inputs."""

SETTINGS = Settings(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, ema_decay=0.999)
"""Of every timed step, ours too."""

MODULES = {"apex": "apex.optimizers", "deepspeed": "deepspeed.ops.adam", "torch": "torch.optim"}
"""Where each opponent's optimiser is: FusedAdam, in torch AdamW."""


def opponents(device: str = "cuda") -> dict[str, Maker]:
    """Those of MODULES that can be imported, built and stepped right on this device; the first call probes.

    DeepSpeed compiles its own in the probe, which can take a minute or two.
    """
    return {name: maker for name in MODULES if not isinstance(maker := _probed(name, device), str)}


def left_out(device: str = "cuda") -> dict[str, str]:
    """The others, and why each is left out."""
    return {name: reason for name in MODULES if isinstance(reason := _probed(name, device), str)}


@functools.cache
def _probed(name: str, device: str) -> Maker | str:
    if device == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA GPU"
    try:
        module = importlib.import_module(MODULES[name])
        maker = functools.partial(_make, module.AdamW if name == "torch" else module.FusedAdam)
        off = _error(maker, device)
    except Exception as error:  # imports, compilers and drivers fail in many ways, and none of them is our bug
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return maker if off < 1e-5 else f"its step on a small tensor is off by {off:.3g}"


def _make(kind: Callable[..., torch.optim.Optimizer], inputs: Sequence[Tensor]) -> Callable[[], None]:
    """A step of this optimiser, with the average and where the inputs have them the factor and the copy."""
    value, grad, exp_avg, exp_avg_sq, ema, step, *extra = inputs
    copy, factor = extra or (None, None)
    fused = kind is torch.optim.AdamW
    param = torch.nn.Parameter(value.detach())
    # FusedAdam takes gradients of the parameter's dtype alone.
    param.grad = grad if factor is None else torch.empty_like(value)
    settings = asdict(SETTINGS)
    decay = settings.pop("ema_decay")
    optimizer = kind([param], **settings, **({"fused": True} if fused else {"adam_w_mode": True}))
    # torch's count is a tensor; apex keeps a number in the group, and DeepSpeed one in the state.
    count: Any = step.float().clone() if fused else int(step)
    optimizer.state[param].update(step=count, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    if not fused:
        optimizer.param_groups[0]["step"] = count

    @torch.no_grad()
    def run() -> None:
        if factor is not None:
            torch.mul(grad, factor.reshape(1), out=param.grad)  # [1] and not a scalar: multiplied in fp32
        optimizer.step()
        torch._foreach_lerp_([ema], [param], 1 - decay)
        if copy is not None:
            copy.copy_(param)

    return run


def _error(maker: Maker, device: str) -> float:
    """The largest of two steps' errors against the definition in fp64, in weights, moments and average."""
    start = [torch.linspace(a, b, 37) for a, b in ((-2, 2), (3, -1), (1, -1), (0.5, 2), (2, -2))]
    value, grad, mean, square, ema = exact = [x.double() for x in start]
    ours = [x.to(device, copy=True) for x in start]
    run = maker([*ours, torch.full((), 10.0, device=device)])
    for step in (11, 12):
        run()
        adamw_ema_(value, grad, mean, square, ema, step, **asdict(SETTINGS))
    found = [(mine.cpu() - theirs).abs().max() for mine, theirs in zip(ours, exact, strict=True)]
    return float(torch.stack(found).max())
