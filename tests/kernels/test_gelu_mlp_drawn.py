"""The MLP at drawn shapes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpdit_kernels.gelu_mlp import gelu_linear
from proof import leaf, prove

# No gradient is a few numbers alone: sums over many rows nearly cancel at times, and are then anyone's guess.
OUT = st.just(0) | st.integers(16, 80)
DRAWN = (st.integers(1, 150), st.integers(16, 80), st.integers(16, 200), OUT, st.booleans())


def _prove(rows: int, width: int, hidden: int, out: int, tall: bool) -> None:
    """With `out` 0 there is no second layer."""
    x = leaf(width, rows).t() if tall else leaf(rows, width)
    second = [leaf(out, hidden), leaf(out)] if out else []
    prove(gelu_linear, [x, leaf(hidden, width), leaf(hidden), *second])


@settings(max_examples=8, deadline=None)
@given(*DRAWN)
def test_any_shape(rows: int, width: int, hidden: int, out: int, tall: bool) -> None:
    _prove(rows, width, hidden, out, tall)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(*DRAWN)
def test_very_many_shapes(rows: int, width: int, hidden: int, out: int, tall: bool) -> None:
    _prove(rows, width, hidden, out, tall)
