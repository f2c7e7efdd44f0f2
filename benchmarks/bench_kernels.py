"""Times each kernel at the sizes of a training step, forward and backward, beside eager PyTorch and torch.compile.

On a CPU the shapes are tiny and "ours" is the reference itself: what is tried there is the suite, not the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import models
import torch
from harness import Built, Case, Group
from mpdit_kernels import launch
from setting import Setting
from tools import cases as kernels
from tools import measure
from tools.timing import GpuClock, WallClock
from torch import Tensor


def cases(setting: Setting) -> Iterator[Case]:
    shapes = kernels.SHAPES if setting.on_gpu else kernels.TINY
    for case in kernels.all_cases(shapes):
        for direction, cost in (("forward", case.forward), ("backward", case.backward)):
            if cost is not None:
                group = kernel_group(case, direction, cost, setting)
                yield Case("kernels", f"{case.name}, {direction}, {setting.dtype}", [group], on_gpu=True)


def test_kernels(compare: Callable[[], None]) -> None:
    compare()


@dataclass
class State:
    """Inputs for one bracket of calls, and what the gate needs to draw the same ones again."""

    bench: measure.Bench
    sets: list[Sequence[Any]]
    seed: int = 0
    gradients: list[Tensor] | None = None


def kernel_group(case: kernels.Case, direction: str, cost: kernels.Cost, setting: Setting) -> Group:
    """Return the variants of a case's "forward" or "backward", which must move and compute `cost`."""
    calls = measure.forwards if direction == "forward" else measure.backwards

    def make() -> State:
        clock, dtype = (GpuClock(), torch.bfloat16) if setting.on_gpu else (WallClock(), torch.float32)
        bench = measure.Bench(clock, setting.device, dtype, torch.compile)
        return State(bench, bench.input_sets(case))

    def exact(state: State) -> list[Tensor]:
        found, state.gradients = measure.results(case, state.bench, "reference", state.seed, widen=True)
        return [x for x in found if x is not None]

    def outputs(mode: str, state: State, call: Callable[..., Any] | None = None) -> list[Tensor]:
        with launch.picks() as picked:
            found, _ = measure.results(case, state.bench, mode, state.seed, state.gradients, call=call)
        if mode == "triton" and not picked:
            raise RuntimeError("the call took its reference, not its kernels")
        return [x for x in found if x is not None]

    def build(variant: str, state: State) -> Built:
        mode, call = ("triton" if variant == "ours" and setting.on_gpu else models.MODES[variant]), case.call
        if variant == "compile":
            inner = case.call
            call = torch.compile(lambda *inputs: inner(*inputs), dynamic=False, mode="max-autotune-no-cudagraphs")
            models.try_compiled(True, lambda: [run() for run in calls(mode, call, state.sets[:1])])
        return Built(partial(calls, mode, call, state.sets), partial(outputs, mode, state, call))

    names = ("ours", "eager", "compile") if setting.on_gpu else ("ours", "eager")  # minutes, for shapes nobody uses
    return Group(
        {name: partial(build, name) for name in names},
        make,
        exact=exact,
        reference=partial(outputs, "reference"),
        flops=cost.flops + cost.flops32 or None,
        bytes=cost.bytes,
        dtype="fp32" if cost.flops32 and not cost.flops else setting.dtype,
    )
