"""Says how far a result may be from float64; without triton, as benchmarks of other projects' code need none."""

from __future__ import annotations

from torch import Tensor

FLOOR = 8
"""Roundings of a result's own dtype that are always allowed, as PyTorch can be exact by luck."""


def allowed_error(usual: Tensor, exact: Tensor, rounding: float) -> float:
    """Return the greatest distance from `exact` that passes: twice that of PyTorch's result, and FLOOR roundings."""
    return 2 * distance(usual, exact) + FLOOR * rounding


def distance(x: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference over the norm of `exact`."""
    x, exact = x.detach().double(), exact.detach().double()
    return float((x - exact).norm() / exact.norm().clamp_min(1e-30))
