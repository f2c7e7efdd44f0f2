"""The FNO time embedding at drawn shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpdit_kernels.fno import fno_time_embedding, reference
from proof import DEVICE, prove
from tools.cases import fno_shapes
from torch import Tensor

DRAWN = (st.integers(1, 12), st.sampled_from([16, 32]), st.integers(16, 300), st.sampled_from([0.1, 0.5]))
FEW = 8
"""Below as many samples t's gradient is no fair comparison: a few sums may nearly cancel, to anyone's guess."""


def _prove(batch: int, channels: int, width: int, scale: float) -> None:
    def call(t: Tensor, *weights: Tensor) -> Tensor:
        return fno_time_embedding(t, dict(zip(reference.names(3), weights, strict=True)))

    weights = [(scale * torch.randn(size, device=DEVICE)).requires_grad_() for size in fno_shapes(channels, width)]
    prove(call, [torch.rand(batch, device=DEVICE).requires_grad_(batch >= FEW), *weights])


@settings(max_examples=3, deadline=None)
@given(*DRAWN)
def test_any_shape(batch: int, channels: int, width: int, scale: float) -> None:
    _prove(batch, channels, width, scale)


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(*DRAWN)
def test_very_many_shapes(batch: int, channels: int, width: int, scale: float) -> None:
    _prove(batch, channels, width, scale)
