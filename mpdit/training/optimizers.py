"""Builds a run's optimiser, AdamW with the average of the weights (EMA), by one of OPTIMIZERS.

FusedAdam of apex or DeepSpeed is built once it has stepped right here, with the average that AdamWEMA keeps.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from mpdit_kernels import AdamWEMA
from torch import Tensor
from torch.optim import Optimizer

from mpdit.core.errors import ConfigError, first_line
from mpdit.model.kinds import entry_of
from mpdit.planning.time import ADAMW_EMA_BYTES


class OptimizerKind(NamedTuple):
    """Describes an optimiser: an entry of OPTIMIZERS.

    Attributes:
        help: what it is.
        step_bytes: what a step reads and writes for each parameter, all fp32, for the planner.
        module: where another package's FusedAdam is; "" for AdamWEMA.
        install: what it takes to have that.
    """

    help: str
    step_bytes: int
    module: str = ""
    install: str = ""


_FUSED_BYTES = 40
"""Gradient read, weight and two moments read and written; then weight read, average read and written."""

DEFAULT = "adamw_ema"
"""The one that runs took which don't say."""

OPTIMIZERS = {
    DEFAULT: OptimizerKind("our AdamW with its average", ADAMW_EMA_BYTES),
    "apex": OptimizerKind(
        "apex's FusedAdam with the same average, on GPUs and once it has been tried there",
        _FUSED_BYTES,
        "apex.optimizers",
        "build NVIDIA's, with its CUDA extensions, from https://github.com/NVIDIA/apex (PyPI's apex is another)",
    ),
    "deepspeed": OptimizerKind(
        "DeepSpeed's, likewise",
        _FUSED_BYTES,
        "deepspeed.ops.adam",
        "DeepSpeed compiles it on first use, which needs ninja and a CUDA toolkit of torch's version",
    ),
}


def build(
    name: str, params: Iterable[Tensor], settings: Mapping[str, Any], device: torch.device, ds: Mapping[str, Any]
) -> Optimizer:
    """Build an entry of OPTIMIZERS, which steps the average of the weights (EMA) too, for a run on `device`.

    Args:
        name: the entry's.
        params: fp32 tensors.
        settings: AdamWEMA's: lr, betas, eps, weight_decay, ema_decay.
        device: where weights are stepped.
        ds: the run's DeepSpeed configuration.

    Raises:
        ConfigError: another package's fails its probe, or would have to step weights that are offloaded to the CPU.
    """
    if not entry_of(OPTIMIZERS, "optimizer", name).module:
        return AdamWEMA(params, **settings)
    offload = ds.get("zero_optimization", {}).get("offload_optimizer") or {}
    if offload.get("device", "none") != "none":
        problem = f"can't step what offload_optimizer puts on {offload['device']}"
        raise _refusal(name, problem, "leave --optimizer out, or remove offload_optimizer")
    return with_ema(probed(name, device))(params, **settings, adam_w_mode=True)


def with_ema(base: type[Optimizer]) -> Callable[..., Optimizer]:
    """Return a subclass of a FusedAdam that takes `ema_decay` and keeps the average of the weights, as AdamWEMA does.

    The average is the state "ema", in the parameter's dtype. The step count is the state "step", a number: apex keeps
    one for a whole group, which would count every piece that ZeRO-3 steps, and DeepSpeed counts the last parameter's
    alone. Parameters of one group that are stepped together must have been stepped equally often, as always under
    ZeRO, which makes one tensor of a group. `skip` is AdamWEMA's, but waits for the device: FusedAdam can't read it
    there.
    """

    class FusedAdamEMA(base):  # type: ignore[misc, valid-type]
        def __init__(self, params: Any, *, ema_decay: float, **settings: Any) -> None:
            super().__init__(params, **settings)
            self.skip: Tensor | None = None
            # In the groups, so that a state dict restores it, and DeepSpeed carries it along.
            self.defaults["ema_decay"] = ema_decay
            for group in self.param_groups:
                group["ema_decay"] = ema_decay

        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            if self.skip is not None and self.skip:
                return
            stepped = [[param for param in group["params"] if param.grad is not None] for group in self.param_groups]
            done = []
            for group, params in zip(self.param_groups, stepped, strict=True):
                counts = {self.state[param]["step"] if self.state[param] else 0 for param in params}
                if len(counts) > 1:
                    raise ValueError(f"parameters of one group were stepped {sorted(counts)} times: give each its own")
                group["step"] = counts.pop() if counts else 0
                done.append(group["step"])
            # Copied before the step, but kept out of the state, which FusedAdam sets up only where it is empty.
            first = {param: param.clone() for param in itertools.chain(*stepped) if not self.state[param]}
            super().step()
            for group, params, count in zip(self.param_groups, stepped, done, strict=True):
                for param in params:
                    state = self.state[param]
                    state["step"] = count + 1
                    if param in first:
                        state["ema"] = first[param]
                if params:
                    emas = [self.state[param]["ema"] for param in params]
                    torch._foreach_lerp_(emas, params, 1 - group["ema_decay"])

    return FusedAdamEMA


def probed(name: str, device: torch.device) -> type[Optimizer]:
    """Return the FusedAdam of "apex" or "deepspeed", once it has been built and has stepped right on this device.

    Raises ConfigError, saying what failed and what to do.
    """
    if device.type != "cuda":
        raise _refusal(name, f"needs a CUDA GPU, and this run is on {device.type}", "leave --optimizer out")
    kind = OPTIMIZERS[name]
    try:
        fused: type[Optimizer] = importlib.import_module(kind.module).FusedAdam
    except Exception as error:  # PyPI's apex, another project, fails in many ways when it is imported
        raise _refusal(name, f"can't be imported ({first_line(error)})", kind.install) from error
    check(fused, name, device)
    return fused


def check(kind: type[Optimizer], name: str, device: torch.device) -> None:
    """Compare two steps on a small tensor with torch's AdamW in fp64. Raises ConfigError unless they agree."""
    settings: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.5}
    start, grad = torch.linspace(-2, 2, 37), torch.linspace(3, -1, 37)
    exact = torch.nn.Parameter(start.double())
    ours = torch.nn.Parameter(start.to(device))
    reference = torch.optim.AdamW([exact], **settings)
    try:
        optimizer = with_ema(kind)([ours], **settings, adam_w_mode=True, ema_decay=0.5)
        for factor in (1.0, -0.5):
            exact.grad, ours.grad = (factor * grad).double(), (factor * grad).to(device)
            reference.step()
            optimizer.step()
        found = ours.detach().cpu().double()
    except Exception as error:  # compilers, linkers and drivers fail in many ways, and none of them is our bug
        raise _refusal(name, f"can't be built and run ({first_line(error)})", OPTIMIZERS[name].install) from error
    off = float((found - exact.detach()).abs().max())
    if not off < 1e-5:
        wrong = f"is wrong: a step on a small tensor is off by {off:.3g}"
        raise _refusal(name, wrong, "update it, or leave --optimizer out")


def _refusal(name: str, problem: str, remedy: str) -> ConfigError:
    return ConfigError(f"optimizer is {name}, but {name}'s FusedAdam {problem}: {remedy}")
