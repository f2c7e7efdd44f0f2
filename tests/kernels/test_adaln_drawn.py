"""The modulated norm and the gated residual at drawn shapes."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpdit_kernels import gated_residual_adaln
from mpdit_kernels.adaln import triton_impl
from proof import leaf, prove

DRAWN = (st.integers(1, 3), st.integers(1, 40), st.integers(16, 200), st.booleans())
PACKED = (st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(16, 64))
SMALL = {"ROWS": 8, "TOKENS": 16, "CAP": 64, "num_warps": 4, "num_stages": 1}
"""Several programs at small shapes, and rows of several tiles."""


def _prove(batch: int, tokens: int, width: int, tall: bool) -> None:
    x = leaf(batch, width, tokens).transpose(1, 2) if tall else leaf(batch, tokens, width)
    prove(gated_residual_adaln, [x, leaf(batch, tokens, width), *(leaf(batch, width) for _ in range(3))])


def _prove_packed(lengths: list[int], width: int) -> None:
    offsets, vectors = tuple(accumulate(lengths, initial=0)), [leaf(len(lengths), width) for _ in range(3)]
    inputs = [leaf(offsets[-1], width), leaf(offsets[-1], width), *vectors]
    prove(lambda *a: gated_residual_adaln(*a, cu_seqlens=offsets), inputs)


@settings(max_examples=4, deadline=None)
@given(*DRAWN)
def test_any_shape(batch: int, tokens: int, width: int, tall: bool) -> None:
    with triton_impl.FORWARD.override(SMALL), triton_impl.BACKWARD.override(SMALL):
        _prove(batch, tokens, width, tall)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(*DRAWN)
def test_very_many_shapes(batch: int, tokens: int, width: int, tall: bool) -> None:
    _prove(batch, tokens, width, tall)


@settings(max_examples=4, deadline=None)
@given(*PACKED)
def test_any_lengths(lengths: list[int], width: int) -> None:
    with triton_impl.FORWARD.override(SMALL), triton_impl.BACKWARD.override(SMALL):
        _prove_packed(lengths, width)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(*PACKED)
def test_very_many_lengths(lengths: list[int], width: int) -> None:
    _prove_packed(lengths, width)
