"""DeepSpeed's flops profiler beside our accounting: they agree, once it is shown all that it could count."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from mpdit_kernels import dispatch, use_attention
from mpdit_kernels.fno.reference import MODES
from torch.nn import functional
from variants import VARIANTS

import mpdit
from mpdit.model.config import ModelConfig
from mpdit.planning import account

profiler = pytest.importorskip("deepspeed.profiling.flops_profiler")

BATCH = 2
HIDDEN = {"modulation", "final modulation", "attention", "MLP", "expand", "skip", "final layer"}
"""Parts whose products go through functions that our modules imported by name: it replaces those of torch.nn.functional
later, and never sees these calls."""


def counted(config: ModelConfig, prepare: Callable[[], None] = lambda: None, fusions: bool = False) -> tuple[int, int]:
    """(MACs of a forward pass of BATCH images, parameters) as DeepSpeed's profiler has them."""
    model = mpdit.MPDiT(config).use_exact_fusions(fusions)
    x, t = torch.randn(BATCH, config.channels, config.input_size, config.input_size), torch.rand(BATCH)
    classes = torch.zeros(BATCH, dtype=torch.long)
    with dispatch.use("reference"), use_attention("sdpa_math"), torch.no_grad():
        model(x, t, classes)  # the attention is tried once on every new shape, which would be counted
        profile = profiler.FlopsProfiler(model)
        profile.start_profile()
        try:
            prepare()
            model(x, t, classes)
            return profile.get_total_macs(), profile.get_total_params()
        finally:
            profile.end_profile()


def spectral(config: ModelConfig) -> int:
    """The complex mixing of the time embedding: an einsum, for which the profiler counts FLOP but no MACs."""
    return config.time_layers * MODES * config.time_width**2 if config.time_embedding == "fno" else 0


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Gives our modules what the profiler put into torch.nn.functional, under the names they imported."""
    names = ("linear", "conv1d", "conv2d", "conv_transpose2d", "scaled_dot_product_attention")
    plain = {name: getattr(functional, name) for name in names}

    def rebind() -> None:
        for module in [m for key, m in sys.modules.items() if key.startswith(("mpdit.", "mpdit_kernels."))]:
            for name, function in plain.items():
                if getattr(module, name, None) is function:
                    monkeypatch.setattr(module, name, getattr(functional, name))

    return rebind


@pytest.mark.parametrize("name", VARIANTS)
def test_it_agrees_on_all_that_it_is_shown(name: str, show: Callable[[], None]) -> None:
    config = VARIANTS[name]
    macs, params = counted(config, show)
    assert macs == BATCH * (account(config).macs - spectral(config))
    assert params == account(config).params_trainable


@pytest.mark.parametrize("name", ["two stages", "three stages", "DiT"])
def test_what_it_misses_as_it_is_are_whole_parts(name: str) -> None:
    config = VARIANTS[name]
    seen = sum(part.macs for part in account(config).parts if part.name not in HIDDEN)
    macs, _ = counted(config)
    assert macs == BATCH * (seen - spectral(config))
    assert macs < BATCH * 0.5 * account(config).macs, "far too little to be of use"


@pytest.mark.parametrize("name", ["two stages", "three stages", "DiT"])
def test_of_a_model_as_it_is_trained_it_sees_the_projections(name: str) -> None:
    config = VARIANTS[name]
    parts = account(config).parts
    linears = {"attention projections", "patch embedding"} | ({"time embedding"} if name == "DiT" else set())
    seen = sum(part.macs if part.executed is None else part.executed for part in parts if part.name in linears)
    # The skip's two Linears are multiplied once a call, by an operator that the profiler replaces too.
    composed = sum(config.width**2 * config.channels * stage.patch**2 for stage in config.stages[1:])
    macs, _ = counted(config, fusions=True)
    assert macs == BATCH * seen + composed


def test_it_leaves_torch_as_it_was() -> None:
    before = functional.linear, functional.scaled_dot_product_attention, torch.einsum
    counted(VARIANTS["DiT"])
    assert before == (functional.linear, functional.scaled_dot_product_attention, torch.einsum)
