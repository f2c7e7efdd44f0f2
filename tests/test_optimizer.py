"""AdamWEMA against its definition, torch's AdamW, and the closed form of the average."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from mpdit_kernels import AdamWEMA
from mpdit_kernels.adamw_ema.reference import adamw_ema_
from torch import Tensor

SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
STATES = ("step", "exp_avg", "exp_avg_sq", "ema")


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
            adamw_ema_(value, param.grad, mean, square, ema, step - 1, **SETTINGS, ema_decay=0.9)
            torch.testing.assert_close(param.detach(), value, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(optimizer.state[param]["ema"], ema, rtol=1e-12, atol=1e-12)


def test_is_its_definition_with_clipping_and_a_copy() -> None:
    param = torch.nn.Parameter(torch.randn(50, dtype=torch.float64))
    value, copies = param.detach().clone(), [torch.empty(50), torch.empty(50)]
    mean, square, ema = torch.zeros_like(value), torch.zeros_like(value), value.clone()
    optimizer = AdamWEMA([param], **SETTINGS, ema_decay=0.9, max_norm=0.5)
    optimizer.attach_copies({param: copies[0]})
    for step in range(1, 6):
        _train([param], optimizer, range(step, step + 1))
        assert param.grad is not None
        factor = 0.5 / (float(param.grad.norm()) + 1e-6)
        options: dict[str, Any] = {**SETTINGS, "ema_decay": 0.9, "factor": factor, "copy": copies[1]}
        adamw_ema_(value, param.grad, mean, square, ema, step - 1, **options)
        torch.testing.assert_close(param.detach(), value, rtol=1e-6, atol=1e-7)  # the norm is fp32
        torch.testing.assert_close(optimizer.state[param]["ema"], ema, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(*copies, rtol=1e-6, atol=1e-7)


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


BAD = [
    ({"lr": -1.0}, "lr is -1.0: give a number of at least 0"),
    ({"lr": "x"}, "lr is 'x': give a number"),
    ({"lr": torch.ones(2)}, r"lr has shape \[2\]"),
    ({"lr": torch.tensor(-1.0)}, "lr is -1.0: give a number"),
    ({"betas": (1.0, 0.9)}, r"betas\[0\] is 1.0: give a number in \[0, 1\)"),
    ({"betas": (2.0, 3.0)}, r"betas\[0\] is 2.0"),
    ({"betas": (0.9, "x")}, r"betas\[1\] is 'x'"),
    ({"betas": (0.9,)}, r"betas is \(0.9,\): give two numbers in \[0, 1\)"),
    ({"betas": 0.9}, "betas is 0.9: give two numbers"),
    ({"ema_decay": 1.5}, r"ema_decay is 1.5: give a number in \[0, 1\]"),
    ({"ema_decay": None}, "ema_decay is None"),
    ({"eps": -1}, "eps is -1: give a number of at least 0"),
    ({"weight_decay": "x"}, "weight_decay is 'x': give a number of at least 0"),
]


@pytest.mark.parametrize(
    ("bad", "message"),
    [*BAD, ({"max_norm": -1.0}, "max_norm"), ({"max_norm": float("nan")}, "max_norm"), ({"max_norm": "x"}, "max_norm")],
)
def test_refuses_settings_out_of_range(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamWEMA(_parameters(), **bad)


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_refuses_settings_of_a_group_out_of_range(bad: dict[str, Any], message: str) -> None:
    params = _parameters()
    with pytest.raises(ValueError, match=message):
        AdamWEMA([{"params": params[:1]}, {"params": params[1:], **bad}])
    optimizer = AdamWEMA(params[:1])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": params[1:], **bad})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": params[1:], "lr": torch.tensor(0.1), "betas": [0, 0.5], "ema_decay": 1})


@pytest.mark.parametrize("fused", [True, None])
def test_warm_starts_from_torch_adamw(fused: bool | None) -> None:
    """Moments and settings continue as there; the average starts at the parameters as they are at the next step."""
    params, others = _parameters(), _parameters()
    theirs = torch.optim.AdamW(others, **SETTINGS, fused=fused)
    _train(others, theirs, range(3))
    optimizer = AdamWEMA(params, lr=1.0, ema_decay=0.75)
    optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert optimizer.param_groups[0]["ema_decay"] == 0.75 and optimizer.param_groups[0]["lr"] == SETTINGS["lr"]
    for param, other in zip(params, others, strict=True):  # as usual, the weights may be loaded after
        param.data.copy_(other.data)
    start = [param.detach().clone() for param in params]
    ours_history, theirs_history = _train(params, optimizer, range(3, 5)), _train(others, theirs, range(3, 5))
    for index, param in enumerate(params):
        torch.testing.assert_close(ours_history[-1][index], theirs_history[-1][index], rtol=1e-6, atol=1e-7)
        expected = 0.5625 * start[index] + 0.1875 * ours_history[0][index] + 0.25 * ours_history[1][index]
        torch.testing.assert_close(optimizer.state[param]["ema"], expected, rtol=1e-6, atol=1e-7)
    # What it saves now is complete, and later loads keep the step beside its parameter.
    restored = AdamWEMA(_parameters())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert restored.param_groups[0]["ema_decay"] == 0.75 and restored.param_groups[0]["fused"] is True
    assert torch.equal(restored.state[restored.param_groups[0]["params"][0]]["ema"], optimizer.state[params[0]]["ema"])


def test_loads_counts_that_are_numbers() -> None:
    params = _parameters()
    optimizer = AdamWEMA(params, **SETTINGS)
    _train(params, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = int(state["step"])
    optimizer.load_state_dict(saved)
    _train(params, optimizer, range(2, 3))
    assert float(optimizer.state[params[0]]["step"]) == 3


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda params: torch.optim.SGD(params, momentum=0.9), r"has \['momentum_buffer'\]: expected AdamW's"),
        (lambda params: torch.optim.AdamW(params, amsgrad=True), "amsgrad is True in a loaded group: expected False"),
        (lambda params: torch.optim.AdamW(params, maximize=True), "maximize is True"),
    ],
)
def test_refuses_states_that_it_cannot_continue_before_changing_anything(other: Any, message: str) -> None:
    params, others = _parameters(), _parameters()
    theirs = other(others)
    _train(others, theirs, range(1))
    optimizer = AdamWEMA(params, **SETTINGS)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(theirs.state_dict())
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == SETTINGS["lr"]


def test_refuses_low_precision_weights() -> None:
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="fp32 master weights"):
        AdamWEMA([param]).step()
    # A loaded state makes no difference: the kernel would take 16 bits for 32.
    other = torch.optim.AdamW([param])
    other.step()
    optimizer = AdamWEMA([param])
    optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="fp32 master weights"):
        optimizer.step()


def test_refuses_sparse_gradients_before_changing_anything() -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    params[0].grad, params[1].grad = torch.ones(3), torch.ones(3).to_sparse()
    with pytest.raises(ValueError, match="a gradient is sparse"):
        AdamWEMA([{"params": params[:1]}, {"params": params[1:]}]).step()
    assert torch.equal(params[0].detach(), torch.ones(3))


@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_clips_as_torch_does_and_leaves_the_gradients_alone(max_norm: float) -> None:
    ours, theirs = _parameters(torch.float64), _parameters(torch.float64)
    first = AdamWEMA([{"params": ours[:2]}, {"params": ours[2:]}], **SETTINGS, max_norm=max_norm)
    second = AdamWEMA(theirs, **SETTINGS)
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator).double()
            other.grad = mine.grad.clone()
        before = [param.grad.clone() for param in theirs]  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        first.step()
        second.step()
        assert all(torch.equal(param.grad, grad) for param, grad in zip(ours, before, strict=True))  # type: ignore[arg-type]
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)  # the norm is fp32


def test_skips_a_step_that_is_not_finite_and_remembers_it() -> None:
    params, steady = _parameters(), _parameters()
    optimizer, other = AdamWEMA(params, **SETTINGS, skip_nonfinite=True), AdamWEMA(steady, **SETTINGS)
    _train(params, optimizer, range(3))
    _train(steady, other, range(3))
    for param in params:
        param.grad = torch.full_like(param, float("inf"))
    optimizer.step()
    for mine, theirs in zip(params, steady, strict=True):
        assert torch.equal(mine, theirs)
        for name, value in other.state[theirs].items():
            assert torch.equal(optimizer.state[mine][name], value), name
    restored = AdamWEMA(_parameters(), skip_nonfinite=True)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert (int(optimizer.skipped), int(restored.skipped)) == (1, 1)
    assert "skipped" not in other.state_dict()


def test_skips_to_the_bit_while_it_is_told_to() -> None:
    params, steady = _parameters(), _parameters()
    optimizer, other = AdamWEMA(params, **SETTINGS, max_norm=1.0), AdamWEMA(steady, **SETTINGS, max_norm=1.0)
    optimizer.skip = torch.zeros((), dtype=torch.bool)
    _train(params, optimizer, range(3))
    _train(steady, other, range(3))
    for average in (optimizer.state[params[0]]["ema"], other.state[steady[0]]["ema"]):
        average[0, 0] = -0.0
    optimizer.skip.fill_(True)
    _train(params, optimizer, range(3, 6))
    for mine, theirs in zip(params, steady, strict=True):
        for ours, wanted in ((mine, theirs), *((optimizer.state[mine][k], other.state[theirs][k]) for k in STATES)):
            assert ours.detach().numpy().tobytes() == wanted.detach().numpy().tobytes()
    assert int(optimizer.skipped) == 0  # these are counted by who asked for them
    assert copy.deepcopy(optimizer).skip is None
    optimizer.skip.fill_(False)
    _train(params, optimizer, range(6, 8))
    _train(steady, other, range(6, 8))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(params, steady, strict=True))


def test_writes_copies() -> None:
    params = _parameters()
    copies = {param: torch.empty_like(param, dtype=torch.bfloat16, requires_grad=False) for param in params[:2]}
    optimizer = AdamWEMA(params, **SETTINGS)
    optimizer.attach_copies(copies)
    for steps in (range(0), range(1)):
        _train(params, optimizer, steps)
        assert all(torch.equal(written, param.detach().bfloat16()) for param, written in copies.items())
    assert not torch.equal(params[0], _parameters()[0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.empty(4), r"a copy has shape \[4\]: expected \[7, 5\]"),
        (torch.empty(7, 5, dtype=torch.int32), "a copy is torch.int32"),
        (torch.empty(7, 5, device="meta"), "on meta"),
        (torch.empty(7, 5, requires_grad=True), "with gradient"),
    ],
)
def test_refuses_copies_that_do_not_fit(wrong: Tensor, message: str) -> None:
    params = _parameters()
    with pytest.raises(ValueError, match=message):
        AdamWEMA(params).attach_copies({params[0]: wrong})


def test_refuses_copies_of_strangers() -> None:
    with pytest.raises(ValueError, match="not among the optimiser's"):
        AdamWEMA(_parameters()).attach_copies({torch.ones(3): torch.ones(3)})


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_can_be_copied_and_pickled(clone: Any) -> None:
    params = _parameters()
    optimizer = AdamWEMA(params, **SETTINGS, max_norm=0.1, skip_nonfinite=True)
    _train(params, optimizer, range(2))
    other = clone(optimizer)
    others = other.param_groups[0]["params"]
    _train(params, optimizer, range(2, 4))
    _train(others, other, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
