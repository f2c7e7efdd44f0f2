"""The choice of optimiser: FusedAdam with our average equals AdamWEMA, and only what really runs is accepted."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from mpdit_kernels import AdamWEMA
from mpdit_kernels.hardware import GPUS
from torch import Tensor
from training_runs import ds_config

import mpdit
from mpdit.core.dist_env import DistEnv
from mpdit.core.errors import ConfigError
from mpdit.planning.plan import Request, plan
from mpdit.training import optimizers
from mpdit.training.arguments import parse_arguments
from mpdit.training.config import TrainConfig
from mpdit.training.engine import build_optimizer
from mpdit.training.optimizers import OPTIMIZERS, check, probed, with_ema
from mpdit.training.setup import check_folder, prepare

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1}


class ApexLike(torch.optim.Optimizer):
    """Behaves as apex's FusedAdam, on a CPU: states set up where they are empty, one step count for a whole group."""

    keeps_count_in_group = True
    bias_correction = True

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, adam_w_mode: bool
    ) -> None:
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def step(self, closure: Any = None, grads: Any = None, scale: Any = None) -> None:
        assert closure is grads is scale is None
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + self.keeps_count_in_group
            states = []
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state[param]
                    if len(state) == 0:
                        state["exp_avg"], state["exp_avg_sq"] = (
                            torch.zeros_like(param.data),
                            torch.zeros_like(param.data),
                        )
                        if not self.keeps_count_in_group:
                            state["step"] = group["step"]
                    states.append((param.data, param.grad, state))
            if states:
                self._update(group, states)

    def _update(self, group: dict[str, Any], states: list[tuple[Tensor, Tensor, dict[str, Any]]]) -> None:
        if self.keeps_count_in_group:
            count = group["step"]
        else:
            states[-1][2]["step"] += 1  # the last one's alone
            count = states[-1][2]["step"]
        beta1, beta2 = group["betas"]
        scales = (1 - beta1**count, 1 - beta2**count) if self.bias_correction else (1.0, 1.0)
        for param, grad, state in states:
            mean, square = state["exp_avg"], state["exp_avg_sq"]
            mean.mul_(beta1).add_(grad, alpha=1 - beta1)
            square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            change = mean / scales[0] / ((square / scales[1]).sqrt() + group["eps"]) + group["weight_decay"] * param
            param.sub_(change, alpha=group["lr"])


class DeepSpeedLike(ApexLike):
    """Behaves as DeepSpeed's: a count in each state, of which it moves the last one's."""

    keeps_count_in_group = False


class Forgetful(ApexLike):
    bias_correction = False


class Broken(ApexLike):
    def step(self, *_: Any) -> None:
        raise RuntimeError("Error building extension 'fused_adam'\nninja: build stopped")


FAKES = pytest.mark.parametrize("fake", [ApexLike, DeepSpeedLike])


def _parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(7, 5), (30,), ()]]


def _train(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 + step)
        optimizer.step()


def _assert_same(
    ours: torch.optim.Optimizer, params: list[torch.nn.Parameter], theirs: AdamWEMA, others: list[torch.nn.Parameter]
) -> None:
    for mine, other in zip(params, others, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
        for name in ("exp_avg", "exp_avg_sq", "ema"):
            torch.testing.assert_close(ours.state[mine][name], theirs.state[other][name], rtol=1e-5, atol=1e-6)
        assert ours.state[mine]["step"] == int(theirs.state[other]["step"])


@FAKES
def test_fused_adam_with_our_average_equals_adamwema(fake: type[torch.optim.Optimizer]) -> None:
    params, others = _parameters(), _parameters()
    ours = with_ema(fake)(params, **SETTINGS, adam_w_mode=True, ema_decay=0.9)
    theirs = AdamWEMA(others, **SETTINGS, ema_decay=0.9)
    _train(ours, params, range(10))
    _train(theirs, others, range(10))
    _assert_same(ours, params, theirs, others)
    assert not torch.allclose(params[0], _parameters()[0])


@FAKES
def test_state_dict_round_trip(fake: type[torch.optim.Optimizer]) -> None:
    whole, params = _parameters(), _parameters()
    uninterrupted = with_ema(fake)(whole, **SETTINGS, adam_w_mode=True, ema_decay=0.9)
    _train(uninterrupted, whole, range(8))
    first = with_ema(fake)(params, **SETTINGS, adam_w_mode=True, ema_decay=0.9)
    _train(first, params, range(4))
    saved = copy.deepcopy(first.state_dict())
    again = [torch.nn.Parameter(param.detach().clone()) for param in params]
    second = with_ema(fake)(again, **{**SETTINGS, "lr": 1.0}, adam_w_mode=True, ema_decay=0.0)
    second.load_state_dict(saved)
    _train(second, again, range(4, 8))
    for mine, other in zip(again, whole, strict=True):
        assert torch.equal(mine, other)
        assert torch.equal(second.state[mine]["ema"], uninterrupted.state[other]["ema"])


@FAKES
def test_pieces_of_a_group_stepped_one_after_another_as_zero_3_does(fake: type[torch.optim.Optimizer]) -> None:
    params, others = _parameters(), _parameters()
    ours = with_ema(fake)(params, **SETTINGS, adam_w_mode=True, ema_decay=0.9)
    theirs = AdamWEMA(others, **SETTINGS, ema_decay=0.9)
    _train(theirs, others, range(5))
    for step in range(5):
        for param, other in zip(params, others, strict=True):
            ours.param_groups[0]["params"] = [param]
            generator = torch.Generator().manual_seed(step)
            grads = [torch.randn(p.shape, generator=generator) for p in others]
            param.grad = next(g for g, p in zip(grads, others, strict=True) if p is other)
            ours.param_groups[0]["lr"] = 1e-3 * (1 + step)
            ours.step()
    _assert_same(ours, params, theirs, others)


@FAKES
def test_nothing_changes_while_it_is_told_to_skip(fake: type[torch.optim.Optimizer]) -> None:
    params, others = _parameters(), _parameters()
    ours = with_ema(fake)(params, **SETTINGS, adam_w_mode=True, ema_decay=0.9)
    theirs = with_ema(fake)(others, **SETTINGS, adam_w_mode=True, ema_decay=0.9)
    ours.skip = torch.tensor(True)
    for steps, skip in ((range(2), True), (range(2, 4), False), (range(4, 6), True)):
        ours.skip.fill_(skip)
        _train(ours, params, steps)
        if not skip:
            _train(theirs, others, steps)
    for mine, other in zip(params, others, strict=True):
        assert torch.equal(mine, other)
        for name in ("step", "exp_avg", "exp_avg_sq", "ema"):
            assert torch.equal(torch.as_tensor(ours.state[mine][name]), torch.as_tensor(theirs.state[other][name]))


def test_unequal_counts_in_a_group_are_refused() -> None:
    params = _parameters()
    optimizer = with_ema(ApexLike)(params, **SETTINGS, adam_w_mode=True, ema_decay=0.9)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    params[1].grad = torch.ones_like(params[1])
    with pytest.raises(ValueError, match=r"were stepped \[0, 1\] times"):
        optimizer.step()


@FAKES
def test_the_probe_accepts_what_computes_adamw(fake: type[torch.optim.Optimizer]) -> None:
    check(fake, "apex", CPU)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Forgetful, "is wrong: a step on a small tensor is off by"),
        (Broken, r"can't be built and run \(Error building extension 'fused_adam'\): build NVIDIA's"),
    ],
)
def test_the_probe_refuses_what_does_not(kind: type[torch.optim.Optimizer], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        check(kind, "apex", CPU)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("optimizer is apex, but apex's FusedAdam ")


@pytest.mark.parametrize("name", ["apex", "deepspeed"])
def test_both_are_refused_without_a_gpu(name: str) -> None:
    told = f"optimizer is {name}, .* needs a CUDA GPU, and this run is on cpu: leave --optimizer out"
    with pytest.raises(ConfigError, match=told):
        build_optimizer(TrainConfig(optimizer=name), _parameters(), CPU, {})


def test_pypis_apex_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise ImportError('no pyramid')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match=r"can't be imported \(no pyramid\): build NVIDIA's.*PyPI's apex is another"):
        probed("apex", torch.device("cuda"))


def test_a_missing_apex_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"can't be imported \(No module named .*\): build NVIDIA's"):
        probed("apex", torch.device("cuda"))


def test_the_chosen_class_is_probed_and_built(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("apex.optimizers")
    module.FusedAdam = ApexLike  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)
    monkeypatch.setattr(optimizers.importlib, "import_module", sys.modules.__getitem__)
    tried: list[torch.device] = []
    monkeypatch.setattr(optimizers, "check", lambda kind, name, device: tried.append(device))
    config = TrainConfig(optimizer="apex", lr=0.5, betas=(0.1, 0.2), weight_decay=0.3, ema_decay=0.4)
    optimizer = build_optimizer(config, _parameters(), torch.device("cuda"), {"zero_optimization": {"stage": 2}})
    group = optimizer.param_groups[0]
    assert isinstance(optimizer, ApexLike)
    assert tried == [torch.device("cuda")]
    assert [group[name] for name in ("lr", "betas", "weight_decay", "ema_decay", "eps")] == [
        0.5,
        (0.1, 0.2),
        0.3,
        0.4,
        1e-8,
    ]
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    with pytest.raises(ConfigError, match="can't step what offload_optimizer puts on cpu: leave --optimizer"):
        build_optimizer(config, _parameters(), torch.device("cuda"), offload)


def test_one_table_has_what_can_be_chosen_what_it_costs_and_what_help_says(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    config, gpu = mpdit.PRESETS["MPDiT-B/4-2"], GPUS["h100"]
    usual = plan(config, Request(gpu)).time.optimizer
    for name, kind in OPTIMIZERS.items():
        assert parse_arguments(["--optimizer", name]) == {"optimizer": name}
        assert f"{name} ({kind.help})" in told
        planned = plan(config, Request(gpu, optimizer_bytes=kind.step_bytes)).time.optimizer
        assert planned == pytest.approx(usual * kind.step_bytes / OPTIMIZERS["adamw_ema"].step_bytes)
    with pytest.raises(ConfigError, match="invalid choice: 'adam'"):
        parse_arguments(["--optimizer", "adam"])
    with pytest.raises(ConfigError, match=r"optimizer is 'adam': choose one of adamw_ema \(our"):
        build_optimizer(TrainConfig(optimizer="adam"), _parameters(), CPU, {})


def test_the_default_is_adamwema() -> None:
    optimizer = build_optimizer(TrainConfig(ema_decay=0.4), _parameters(), CPU, {})
    assert type(optimizer) is AdamWEMA
    assert optimizer.param_groups[0]["ema_decay"] == 0.4


def test_the_choice_identifies_a_run(tmp_path: Path) -> None:
    def identity(*arguments: str) -> dict[str, Any]:
        line = ["--ds_config", ds_config(2), "--out", str(tmp_path / "none"), *arguments]
        return prepare(line, DistEnv()).identity

    ours, other = identity(), identity("--optimizer", "apex")
    (tmp_path / "config.json").write_text(json.dumps({"identity": ours}))
    check_folder(tmp_path, ours, "auto")
    with pytest.raises(ConfigError, match="optimizer adamw_ema there, apex here"):
        check_folder(tmp_path, other, "auto")
    # A run from before there was a choice goes on.
    earlier = {name: value for name, value in ours.items() if name != "optimizer"}
    (tmp_path / "config.json").write_text(json.dumps({"identity": earlier}))
    check_folder(tmp_path, ours, "auto")
    with pytest.raises(ConfigError, match="optimizer adamw_ema there, apex here"):
        check_folder(tmp_path, other, "auto")
