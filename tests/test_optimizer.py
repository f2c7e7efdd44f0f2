"""AdamWEMA against its definition, torch's AdamW, and the closed form of the average."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from mpdit_kernels import AdamWEMA
from mpdit_kernels.adamw_ema.reference import adamw_ema_
from torch import Tensor

SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def _parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (1000,), (2, 3, 4), ()]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def _train(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> list[list[Tensor]]:
    """Steps with gradients that depend on the step alone; returns the parameters after each."""
    history = []
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()
        history.append([param.detach().clone() for param in params])
    return history


def test_is_torch_adamw_bitwise() -> None:
    ours, theirs = _parameters(), _parameters()
    ours_history = _train(ours, AdamWEMA(ours, **SETTINGS, ema_decay=0.9), range(25))
    theirs_history = _train(theirs, torch.optim.AdamW(theirs, **SETTINGS, fused=True), range(25))
    for mine, other in zip(ours_history, theirs_history, strict=True):
        for a, b in zip(mine, other, strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(ours[0], _parameters()[0])


def test_is_its_definition() -> None:
    params = _parameters(torch.float64)
    optimizer = AdamWEMA(params, **SETTINGS, ema_decay=0.9)
    expected = [param.detach().clone() for param in params]
    state = [[torch.zeros_like(p), torch.zeros_like(p), p.clone()] for p in expected]
    for step in range(1, 11):
        _train(params, optimizer, range(step, step + 1))
        for param, value, (mean, square, ema) in zip(params, expected, state, strict=True):
            assert param.grad is not None
            adamw_ema_(value, param.grad, mean, square, ema, step, **SETTINGS, ema_decay=0.9)
            torch.testing.assert_close(param.detach(), value, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(optimizer.state[param]["ema"], ema, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.75, 1.0])
def test_average_is_the_weighted_sum_of_all_weights_so_far(decay: float) -> None:
    params = _parameters()
    first = [param.detach().clone() for param in params]
    optimizer = AdamWEMA(params, **SETTINGS, ema_decay=decay)
    history = _train(params, optimizer, range(12))
    for index, param in enumerate(params):
        expected = decay**12 * first[index].double()
        for k, weights in enumerate(history, start=1):
            expected += (1 - decay) * decay ** (12 - k) * weights[index].double()
        torch.testing.assert_close(optimizer.state[param]["ema"].double(), expected, rtol=1e-5, atol=1e-6)


def test_reads_the_learning_rate_at_each_step_and_skips_parameters_without_gradient() -> None:
    param, still = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = AdamWEMA([param, still], lr=0.5)
    optimizer.param_groups[0]["lr"] = 0.0
    param.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(param.detach(), torch.ones(3))
    assert optimizer.state[param]["step"].item() == 1
    assert still not in optimizer.state


def test_resumes_bitwise_from_its_state_dict() -> None:
    whole = _parameters()
    whole_history = _train(whole, AdamWEMA(whole, **SETTINGS), range(8))
    first = _parameters()
    optimizer = AdamWEMA(first, **SETTINGS)
    _train(first, optimizer, range(4))
    saved = copy.deepcopy(optimizer.state_dict())
    second = [torch.nn.Parameter(param.detach().clone()) for param in first]
    restored = AdamWEMA(second, lr=1.0)
    restored.load_state_dict(saved)
    for mine, other in zip(_train(second, restored, range(4, 8)), whole_history[4:], strict=True):
        for a, b in zip(mine, other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("bad", "message"),
    [({"lr": -1.0}, "lr"), ({"betas": (1.0, 0.9)}, "betas"), ({"ema_decay": 1.5}, "ema_decay"), ({"eps": -1}, "eps")],
)
def test_refuses_settings_out_of_range(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamWEMA(_parameters(), **bad)


def test_refuses_low_precision_weights() -> None:
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="fp32 master weights"):
        AdamWEMA([param]).step()


def test_needs_torch_alone() -> None:
    code = "import sys, mpdit_kernels; print(sorted({'deepspeed', 'mpdit', 'triton'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "[]"
