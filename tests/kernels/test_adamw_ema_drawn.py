"""AdamWEMA's kernels at drawn sizes, settings and histories."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpdit_kernels import AdamWEMA, use
from mpdit_kernels.adamw_ema.triton_impl import UPDATE
from proof import DEVICE, FLOOR, distance
from torch import Tensor

SMALL = {"BLOCK": 64, "TILES": 2, "HINT": 8, "num_warps": 1, "num_stages": 1}
DECAY = st.floats(0, 0.9999)
DRAWN = (
    st.lists(st.integers(0, 400), min_size=1, max_size=4),
    st.fixed_dictionaries(
        {
            "lr": st.floats(0, 0.1),
            "betas": st.tuples(DECAY, DECAY),
            "weight_decay": st.floats(0, 1),
            "ema_decay": st.floats(0, 1),
            "max_norm": st.sampled_from([0.0, 0.1, 5.0]),
        }
    ),
    st.integers(0, 3),
    st.integers(0, 2**31),
)


def _run(mode: str, dtype: torch.dtype, sizes: list[int], options: dict[str, Any], offset: int, seed: int) -> Tensor:
    """Four steps; the tensors are pieces of one, beginning `offset` elements into it."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(offset + sum(sizes), generator=generator).to(DEVICE, dtype)
    params = [torch.nn.Parameter(piece) for piece in flat[offset:].split(sizes)]
    optimizer = AdamWEMA(params, **options)
    with UPDATE.override(SMALL), use(mode):
        for _ in range(4):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).to(DEVICE, dtype)
            optimizer.step()
    states = [optimizer.state[param][name] for param in params for name in ("exp_avg", "exp_avg_sq", "ema")]
    return torch.cat([*params, *states]).detach()


def _prove(sizes: list[int], options: dict[str, Any], offset: int, seed: int) -> None:
    truth, usual, ours = (
        _run(mode, dtype, sizes, options, offset, seed)
        for mode, dtype in (("reference", torch.float64), ("reference", torch.float32), ("triton", torch.float32))
    )
    error = distance(ours, truth)
    assert error <= 2 * distance(usual, truth) + FLOOR * torch.finfo(torch.float32).eps


@settings(max_examples=8, deadline=None)
@given(*DRAWN)
def test_any_sizes_and_settings(sizes: list[int], options: dict[str, Any], offset: int, seed: int) -> None:
    _prove(sizes, options, offset, seed)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(*DRAWN)
def test_very_many_sizes_and_settings(sizes: list[int], options: dict[str, Any], offset: int, seed: int) -> None:
    _prove(sizes, options, offset, seed)
