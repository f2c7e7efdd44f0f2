"""Times a step of the optimiser with the weights' average, on all parameters of a model."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from harness import Built, Case, Group, Unavailable
from mpdit_kernels import AdamWEMA
from mpdit_kernels.adamw_ema.reference import adamw_ema_
from setting import Setting
from torch import Tensor, nn

import mpdit
from mpdit.model.presets import PRESETS
from mpdit.planning import account

SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
DECAY = 0.9999
JUDGED = 7
"""Every so manyeth parameter is judged in float64."""


def cases(setting: Setting) -> Iterator[Case]:
    for preset in setting.models_of(("MPDiT-B/4-2", "MPDiT-XL/4-2"), ("MPDiT-B/4-2",)):
        count = account(PRESETS[preset]).params_trainable
        group = partial(
            Group,
            make=partial(State.draw, preset, setting),
            exact=exact,
            reference=partial(exact, dtype=torch.float32),
            model=preset,
            bytes=36 * count,  # weights, two moments and the average read and written in fp32, gradients read
        )
        groups = [group({name: build}) for name, build in VARIANTS.items()]
        yield Case("optimizer", f"AdamW with average, {preset}, {count / 1e6:.1f} M parameters", groups)


def test_optimizer(compare: Callable[[], None]) -> None:
    compare()


@dataclass(frozen=True)
class State:
    """Parameters with gradients, and the values they began with."""

    params: list[nn.Parameter]
    start: list[Tensor]

    @classmethod
    def draw(cls, preset: str, setting: Setting) -> State:
        with torch.device("meta"):
            shapes = [parameter.shape for parameter in mpdit.create_model(preset).parameters()]
        torch.manual_seed(0)
        params = [nn.Parameter(0.02 * torch.randn(shape, device=setting.device)) for shape in shapes]
        for param in params:
            param.grad = 1e-3 * torch.randn_like(param)
        return cls(params, [param.detach().clone() for param in params[::JUDGED]])

    def copies(self) -> list[Tensor]:
        return [param.detach().clone() for param in self.params]


def exact(state: State, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return weights and averages after one step, by the definition."""
    found = []
    for start, param in zip(state.start, state.params[::JUDGED], strict=True):
        assert param.grad is not None
        weight, ema = start.to(dtype, copy=True), start.to(dtype, copy=True)
        moments = torch.zeros_like(weight), torch.zeros_like(weight)
        adamw_ema_(weight, param.grad.to(dtype), *moments, ema, 0, **SETTINGS, ema_decay=DECAY)
        found += [weight, ema]
    return found


def built(state: State, step: Callable[[], None], averages: Callable[[], list[Tensor]]) -> Built:
    def outputs() -> list[Tensor]:
        step()  # the first one
        pairs = zip(state.params[::JUDGED], averages()[::JUDGED], strict=True)
        return [x.detach().clone() for pair in pairs for x in pair]

    return Built(lambda: [step] * 3, outputs)


def ours(state: State) -> Built:
    optimizer = AdamWEMA(state.params, **SETTINGS, ema_decay=DECAY)
    return built(state, optimizer.step, lambda: [optimizer.state[param]["ema"] for param in state.params])


def separate(
    make: Callable[..., Any], average: Callable[[list[Tensor], list[nn.Parameter]], None], state: State
) -> Built:
    """Return another's optimiser, after which the average is taken."""
    optimizer, averages = make(state.params, **SETTINGS), state.copies()

    @torch.no_grad()
    def step() -> None:
        optimizer.step()
        average(averages, state.params)

    return built(state, step, lambda: averages)


def foreach(averages: list[Tensor], params: list[nn.Parameter]) -> None:
    """Average by torch's multi-tensor functions."""
    torch._foreach_lerp_(averages, params, 1 - DECAY)


def loop(averages: list[Tensor], params: list[nn.Parameter]) -> None:
    """Average as the official train.py does."""
    for average, param in zip(averages, params, strict=True):
        average.mul_(DECAY).add_(param.data, alpha=1 - DECAY)


def apex(*arguments: Any, **settings: Any) -> Any:
    try:
        return importlib.import_module("apex.optimizers").FusedAdam(*arguments, **settings, adam_w_mode=True)
    except (ImportError, AttributeError) as error:
        build = "build NVIDIA's from github.com/NVIDIA/apex with its CUDA extensions"
        raise Unavailable(f"apex.optimizers.FusedAdam can't be imported ({error}): {build}") from None


VARIANTS: dict[str, Callable[[State], Built]] = {
    "ours": ours,
    "torch fused, foreach average": partial(separate, partial(torch.optim.AdamW, fused=True), foreach),
    "apex fused, foreach average": partial(separate, apex, foreach),
    "torch default, loop over averages": partial(separate, torch.optim.AdamW, loop),
}
