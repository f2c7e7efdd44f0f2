"""The bench files: what they time on a CPU and on a GPU, and that their gates tell a wrong model."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tools import timing

from mpdit.model.presets import PRESETS
from mpdit.planning import account

PARTS = ("kernels", "block", "forward", "step", "sampling", "optimizer", "loader")
DIGITS = "MPDiT-Digits/4-2"


def cases(helpers: Any, part: str, device: str = "cpu", **fields: Any) -> list[Any]:
    setting = helpers.setting.Setting(device, fields.pop("checkouts", {}), **fields)
    return list(importlib.import_module(f"bench_{part}").cases(setting))


def small(helpers: Any, part: str) -> Any:
    return cases(helpers, part, models=(DIGITS,), batches=(2,))[0]


def judged(helpers: Any, case: Any, ways: list[str]) -> Any:
    return helpers.harness.Comparison(case, timing.WallClock(), quick=True).run(ways)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_case_has_ours_first_and_a_name_of_its_own(helpers: Any, device: str, tmp_path: Path) -> None:
    checkouts = dict.fromkeys(helpers.peers.PEERS, tmp_path)  # nothing is read before it is timed
    found = [case for part in PARTS for case in cases(helpers, part, device, checkouts=checkouts)]
    assert len({case.name for case in found}) == len(found)
    assert list(dict.fromkeys(case.part for case in found)) == list(PARTS)
    for case in found:
        names = case.variants
        assert names[0] == "ours" and len(set(names)) == len(names) > (1 if device == "cuda" else 0)
        for group in case.groups:
            assert group.dtype in helpers.harness.ROUNDING


def test_a_gpu_s_step_has_every_opponent(helpers: Any, tmp_path: Path) -> None:
    checkouts = dict.fromkeys(helpers.peers.PEERS, tmp_path)
    found = cases(helpers, "step", "cuda", checkouts=checkouts, models=("MPDiT-XL/4-2",))
    assert [case.images for case in found] == [128, 64, 32]
    assert [case.smaller_than for case in found] == [None, found[0].name, found[1].name]
    assert found[0].name == "training step, MPDiT-XL/4-2 at 32x32, 128 images, bf16"
    dit = ["DiT-XL/2", "DiT-XL/2, compiled", "DiT-XL/2, eager", "DiT-XL/2, compile"]
    peers = ["official MPDiT", "official MPDiT, compiled", "official DiT, DiT-XL/2", "fast-DiT, DiT-XL/2"]
    assert found[0].variants == ["ours", "ours, compiled", "eager", "compile", *dit, *peers]
    assert [found[0].group(way).dtype for way in peers] == ["bf16", "bf16", "tf32", "fp16"]
    for way, model in (
        ("eager", "MPDiT-XL/4-2"),
        ("official MPDiT", "MPDiT-XL/4-2"),
        ("fast-DiT, DiT-XL/2", "DiT-XL/2"),
    ):
        assert found[0].group(way).flops == 128 * 6 * account(PRESETS[model]).macs


def test_flops_are_those_of_the_account(helpers: Any) -> None:
    macs = account(PRESETS["MPDiT-XL/4-2"]).macs
    (forward,) = cases(helpers, "forward", "cuda", models=("MPDiT-XL/4-2",))
    assert forward.groups[0].flops == 128 * 2 * macs
    one, many = cases(helpers, "sampling", "cuda", batches=(1, 32))
    assert one.groups[0].flops == 250 * 2 * 2 * macs and many.groups[0].flops == 32 * one.groups[0].flops
    coarse, fine = cases(helpers, "block", "cuda", models=("MPDiT-XL/4-2",))
    assert "80 tokens" in coarse.name and "272 tokens" in fine.name
    for case, tokens in ((coarse, 80), (fine, 272)):
        assert case.groups[0].flops == 6 * 128 * (12 * tokens * 1152**2 + 2 * tokens**2 * 1152)
    (optimizer,) = cases(helpers, "optimizer", "cuda", models=("MPDiT-XL/4-2",))
    assert optimizer.groups[0].bytes == 36 * 480_839_216


@pytest.mark.parametrize("part", ["block", "forward", "step", "sampling", "optimizer"])
def test_our_models_pass_their_gates(helpers: Any, part: str) -> None:
    case = small(helpers, part)
    ways = [way for way in case.variants if "compile" not in way and "apex" not in way]
    for way, outcome in judged(helpers, case, ways).items():
        assert outcome.failed is None and outcome.skipped is None, way
        assert 0 <= outcome.gate["error"] <= outcome.gate["allowed"] < 1e-4, way


@pytest.mark.parametrize("part", ["forward", "step"])
def test_a_slightly_wrong_model_is_found(helpers: Any, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models = helpers.models
    monkeypatch.setattr(models, "in_variant", lambda model, way: lambda x, t, y: 1.0001 * model(x, t, y))
    found = judged(helpers, small(helpers, part), ["ours"])["ours"]
    assert found.failed is not None and found.failed.startswith("its gate is red") and found.samples == []


def test_kernels_are_judged_forward_and_backward(helpers: Any) -> None:
    for case in cases(helpers, "kernels"):
        if case.name.startswith("gated_residual_adaln"):
            found = judged(helpers, case, ["ours", "eager"])
            assert all(outcome.failed is None and outcome.gate is not None for outcome in found.values())


def test_it_is_the_compiled_kernel_that_is_judged(helpers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here by a compiler whose results are slightly off."""
    slightly = torch.tensor(1.001)

    def scaled(x: Any) -> Any:
        return tuple(map(scaled, x)) if isinstance(x, tuple) else x * slightly

    monkeypatch.setattr(torch, "compile", lambda call, **_: lambda *inputs: scaled(call(*inputs)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    case = next(case for case in cases(helpers, "kernels") if case.name.startswith("gated_residual_adaln"))
    build = case.groups[0].variants["eager"].func
    group = dataclasses.replace(case.groups[0], variants={"compile": lambda state: build("compile", state)})
    found = judged(helpers, helpers.harness.Case("kernels", "a kernel", [group]), ["compile"])["compile"]
    assert found.failed is not None and found.failed.startswith("its gate is red")


def test_backward_is_outside_autocast(helpers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in training, where the engine's forward alone is in it."""
    bench, models = importlib.import_module("bench_step"), helpers.models
    seen = []

    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return gradients[0]

    setting = helpers.setting.Setting("cpu", {})
    monkeypatch.setattr(helpers.setting.Setting, "dtype", "bf16")
    model = models.new_model(DIGITS, setting)
    trainer = bench.Trainer(model, models.Batch.draw(model.config, 2, "cpu"))
    watched = lambda x, t, y: Seen.apply(model(x, t, y))  # noqa: E731
    trainer.step(watched, "ours", setting)
    with models.running("ours", setting):
        models.velocity_and_gradients(watched, list(model.parameters()), trainer.batch)
    assert seen == [True, False, True, False]


def test_loaders_give_the_samples_themselves(helpers: Any) -> None:
    (case,) = cases(helpers, "loader", batches=(8,))
    ways = [way for way in case.variants if "DALI" not in way]  # which need not be there
    assert len(ways) == 3
    for way, outcome in judged(helpers, case, ways).items():
        assert outcome.failed is None
        if "drawn" in way:
            assert 0 < outcome.gate["error"] < outcome.gate["allowed"]
        else:
            assert outcome.gate == {"same": True}


def test_ways_share_parameters(helpers: Any) -> None:
    models = helpers.models
    model = models.new_model(DIGITS, helpers.setting.Setting("cpu", {}))
    twin = models.in_variant(model, "ours, compiled")
    assert twin is not model
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert one is other
    assert not any(parameter.count_nonzero() == 0 for parameter in model.parameters()), "gates are open"


def test_peers_are_loaded_side_by_side(helpers: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "diffusion").mkdir(parents=True)
        (tmp_path / name / "models.py").write_text(f"NAME = {name!r}")
        (tmp_path / name / "diffusion" / "__init__.py").write_text("from .inner import NAME")
        (tmp_path / name / "diffusion" / "inner.py").write_text(f"NAME = {name!r}")
    peers = helpers.peers
    for peer, name in (("dit", "one"), ("fast-dit", "two")):
        assert name == peers.load(peer, tmp_path / name, "models").NAME
        assert name == peers.load(peer, tmp_path / name, "diffusion").NAME
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mpdit.py").write_text("from a_package_nobody_has.layers import Attention")
    with pytest.raises(helpers.harness.Unavailable, match="MPDiT needs a_package_nobody_has: pip install a_package"):
        peers.load("official", tmp_path, "models/mpdit")


@pytest.fixture
def run(helpers: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Session with options by name."""
    session = importlib.import_module("session")
    monkeypatch.setattr(session.timing, "ceilings", lambda *_: {"copy": 1.0})
    return lambda **given: session.Session(
        SimpleNamespace(getoption=lambda name: given.get(name.removeprefix("--").replace("-", "_")))
    )


def toy_cases(helpers: Any) -> list[Any]:
    harness = helpers.harness

    def build(state: Any) -> Any:
        return harness.Built(lambda: [lambda: None])

    def large(state: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    first = harness.Case("step", "128", [harness.Group({"ours": build, "eager": build}), harness.Group({"dit": large})])
    ways = {"ours": build, "eager": build}
    second = harness.Case("step", "64", [harness.Group(ways), harness.Group({"dit": build})], smaller_than="128")
    return [first, second, harness.Case("step", "32", second.groups, smaller_than="64")]


def test_only_the_largest_that_fits(helpers: Any, run: Any) -> None:
    session = run(largest=True, rounds=3)
    session.cases = {case.name: case for case in toy_cases(helpers)}
    session.selected = {name: ["ours", "eager", "dit"] for name in session.cases}
    found = {
        (case.name, way): session.outcome(case, way, quick=False).skipped
        for case in session.cases.values()
        for way in ("ours", "eager", "dit")
    }
    assert found["128", "dit"] == "out of memory" and found["128", "ours"] is None
    assert found["64", "dit"] is None and found["64", "ours"] is None, "ours is timed again, to compare with"
    assert found["64", "eager"] == "128 fits"
    assert [found["32", way] for way in ("ours", "eager", "dit")] == ["64 fits"] * 3


def test_no_case_is_begun_when_time_is_up(helpers: Any, run: Any) -> None:
    session = run(minutes=1e-9)
    (case, *_) = toy_cases(helpers)
    session.selected = {"128": ["ours"]}
    assert session.outcome(case, "ours", quick=False).skipped == helpers.harness.NO_TIME
