"""The Upsample block at drawn shapes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpdit_kernels.upsample import triton_impl, upsample_tokens
from proof import leaf, prove

SIDE = st.integers(1, 3)
VALUES = st.just(0) | st.integers(4, 20)
"""No fewer: the gradient of a single one is a sum that may cancel, and then its relative error says nothing."""
DRAWN = (st.integers(1, 3), SIDE, SIDE, st.integers(1, 3), st.integers(0, 9), st.integers(16, 96), VALUES)
SMALL = {"ROWS": 4, "TOKENS": 8, "CAP": 32, "num_warps": 4, "num_stages": 1}
"""Several programs at small shapes, and rows of several tiles."""


def _prove(batch: int, h: int, w: int, r: int, m: int, width: int, values: int) -> None:
    fine, scale = h * w * r * r, width**-0.5
    weights = [leaf(width * r * r, width), leaf(width * r * r), leaf(width, width), leaf(width)]
    skip = [leaf(batch, fine, values), leaf(width, values), leaf(width)] if values else []
    position = leaf(fine, width)

    def call(x, expand, expand_bias, refine, refine_bias, position, *skip):  # type: ignore[no-untyped-def]
        expand, refine = expand * scale, refine * scale
        return upsample_tokens(x, expand, expand_bias, refine, refine_bias, m, r, skip or None, position, (h, w))

    prove(call, [leaf(batch, m + h * w, width), *weights, position, *skip])


@settings(max_examples=3, deadline=None)
@given(*DRAWN)
def test_any_shape(batch: int, h: int, w: int, r: int, m: int, width: int, values: int) -> None:
    with triton_impl.FORWARD.override(SMALL), triton_impl.BACKWARD.override(SMALL):
        _prove(batch, h, w, r, m, width, values)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(*DRAWN)
def test_very_many_shapes(batch: int, h: int, w: int, r: int, m: int, width: int, values: int) -> None:
    _prove(batch, h, w, r, m, width, values)
