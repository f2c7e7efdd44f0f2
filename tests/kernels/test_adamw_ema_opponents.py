"""The fused optimisers that AdamWEMA is timed against: only what really steps right, and by the same definition."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import asdict
from types import ModuleType
from typing import Any

import pytest
import torch
from mpdit_kernels.adamw_ema import opponents as module
from mpdit_kernels.adamw_ema.cases import cases
from mpdit_kernels.adamw_ema.opponents import MODULES, SETTINGS, left_out, opponents
from mpdit_kernels.adamw_ema.reference import adamw_ema_
from mpdit_kernels.cases import Shape

SMALL = Shape("B", 64, 2, 500)


class ApexLike(torch.optim.Optimizer):
    """As apex's FusedAdam: one count in the group, and gradients of the parameter's dtype."""

    decoupled = True

    def __init__(self, params: Any, adam_w_mode: bool, **settings: Any) -> None:
        assert adam_w_mode
        super().__init__(params, settings)

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                assert param.grad.dtype == param.dtype
                state = self.state[param]
                count = self.count(group, state)
                beta1, beta2 = group["betas"]
                if self.decoupled:
                    param.data.mul_(1 - group["lr"] * group["weight_decay"])
                state["exp_avg"].lerp_(param.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(param.grad, param.grad, value=1 - beta2)
                root = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt() + group["eps"]
                param.data.addcdiv_(state["exp_avg"] / (1 - beta1**count), root, value=-group["lr"])

    def count(self, group: dict[str, Any], state: dict[str, Any]) -> int:
        group["step"] = group.get("step", 0) + 1
        return int(group["step"])


class DeepSpeedLike(ApexLike):
    """As DeepSpeed's: the count in the state."""

    def count(self, group: dict[str, Any], state: dict[str, Any]) -> int:
        state["step"] += 1
        return int(state["step"])


class Wrong(ApexLike):
    decoupled = False


class Broken(ApexLike):
    def __init__(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("Error building extension 'fused_adam'\nninja: build stopped")


@pytest.fixture(autouse=True)
def _fresh_probes() -> Iterator[None]:
    module._probed.cache_clear()
    yield
    module._probed.cache_clear()


def _install(monkeypatch: pytest.MonkeyPatch, **kinds: type | None) -> None:
    for name, kind in kinds.items():
        fake = ModuleType(MODULES[name])
        if kind is not None:
            fake.FusedAdam = kind  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, MODULES[name].partition(".")[0], ModuleType(name))
        monkeypatch.setitem(sys.modules, MODULES[name], fake)


@pytest.mark.parametrize("case", cases(SMALL), ids=lambda case: case.label)
def test_each_steps_as_the_definition(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, apex=ApexLike, deepspeed=DeepSpeedLike)
    makers = opponents("cpu")
    assert list(makers) == ["apex", "deepspeed", "torch"] and not left_out("cpu")
    assert case.opponents is opponents
    for name, maker in makers.items():
        inputs = case.inputs("cpu", torch.bfloat16)
        value, grad, mean, square, ema, step, *extra = (x.clone() for x in inputs)
        exact = [x.double() for x in (value, grad, mean, square, ema)]
        run = maker(inputs)
        factor = float(extra[1]) if extra else 1.0
        for count in (1, 2):
            run()
            adamw_ema_(*exact, int(step) + count, **asdict(SETTINGS), factor=factor)
        for index in (0, 2, 3, 4):
            torch.testing.assert_close(inputs[index].double(), exact[index], rtol=1e-5, atol=1e-6, msg=name)
        assert torch.equal(inputs[1], grad)
        if extra:
            assert torch.equal(inputs[6], inputs[0].bfloat16()), name


def test_what_fails_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, apex=Wrong, deepspeed=Broken)
    assert list(opponents("cpu")) == ["torch"]
    reasons = left_out("cpu")
    assert reasons["apex"].startswith("its step on a small tensor is off by")
    assert reasons["deepspeed"] == "RuntimeError: Error building extension 'fused_adam'"


def test_what_is_not_there_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    _install(monkeypatch, deepspeed=None)
    reasons = left_out("cpu")
    assert list(reasons) == ["apex", "deepspeed"]
    assert "ModuleNotFoundError" in reasons["apex"] and "no attribute 'FusedAdam'" in reasons["deepspeed"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_without_a_gpu_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("apex", "deepspeed"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    importlib.reload(module)
    assert module.opponents() == {}
    assert set(module.left_out().values()) == {"there is no CUDA GPU"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_torchs_runs_here() -> None:
    assert "torch" in opponents(), left_out()
