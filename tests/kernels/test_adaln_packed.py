"""The modulated norm and the gated residual of sequences of several lengths, packed one after the other."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from interpreter import few_programs
from mpdit_kernels import adaln_modulate, gated_residual, gated_residual_adaln, use
from mpdit_kernels.adaln import op, reference
from proof import DEVICE, DTYPES, NIGHT, leaf, prove, strided
from torch import Tensor

LENGTHS = (80, 1, 272, 17, 81)
SHORT = (5, 41, 1, 16, 16)
"""Of several programs each where the longest is."""


def _packed(function: Callable[..., Any], lengths: tuple[int, ...]) -> Callable[..., Any]:
    return lambda *inputs: function(*inputs, cu_seqlens=_offsets(lengths))


def _offsets(lengths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(accumulate(lengths, initial=0))


def _vectors(count: int, width: int, which: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Slices of one modulation [S, 6D], as the model passes them."""
    modulation = torch.randn(count, 6 * width, device=DEVICE, dtype=dtype).chunk(6, dim=-1)
    return [vector.requires_grad_() for vector in modulation[:which]]


def _inputs(lengths: tuple[int, ...], width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, branch, gate, shift, scale."""
    rows = sum(lengths)
    return [leaf(rows, width, dtype=dtype), leaf(rows, width, dtype=dtype), *_vectors(len(lengths), width, 3)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lengths", "width"), [(LENGTHS, 32), ((3,), 97), ((1, 1), 72)], ids=str)
def test_kernels_are_as_exact_as_pytorch(lengths: tuple[int, ...], width: int, dtype: torch.dtype) -> None:
    x, branch, gate, shift, scale = _inputs(lengths, width, dtype)
    with few_programs():
        prove(_packed(adaln_modulate, lengths), [x, shift, scale])
        prove(_packed(gated_residual, lengths), [x, branch, gate])
        prove(_packed(gated_residual_adaln, lengths), [x, branch, gate, shift, scale])


def test_programs_beyond_the_end_of_a_sequence_add_nothing() -> None:
    """As configured by default, the longest has several programs, and all of them write into poisoned memory."""
    prove(_packed(gated_residual_adaln, SHORT), _inputs(SHORT, 40))


def test_strides_of_inputs_and_gradients() -> None:
    lengths = (7, 12)
    x, branch = strided(19, 40), leaf(30, 40)[5:24]
    vectors = [strided(2, 40), *_vectors(2, 40, 2)]
    prove(_packed(gated_residual_adaln, lengths), [x, branch, *vectors], noncontiguous_gradients=True)
    shared = leaf(1, 40).expand(19, -1)
    prove(_packed(gated_residual_adaln, lengths), [shared, x, *_vectors(2, 40, 3)])


def test_an_output_that_nobody_differentiates() -> None:
    inputs = _inputs((4, 2, 4), 24)
    for part in range(2):
        prove(lambda *a, part=part: _packed(gated_residual_adaln, (4, 2, 4))(*a)[part], inputs)


@pytest.mark.parametrize("mode", ["reference", "triton"])
def test_each_sequence_comes_out_as_it_would_alone(mode: str) -> None:
    x, branch, *vectors = _inputs(SHORT, 24)
    with use(mode):
        together = _packed(gated_residual_adaln, SHORT)(x, branch, *vectors)
        for i, (start, end) in enumerate(pairwise(_offsets(SHORT))):
            alone = gated_residual_adaln(x[None, start:end], branch[None, start:end], *(v[i : i + 1] for v in vectors))
            for mine, theirs in zip(together, alone, strict=True):
                assert torch.equal(mine[start:end], theirs[0])


@pytest.mark.parametrize("mode", ["reference", "triton"])
def test_nothing_to_do(mode: str) -> None:
    inputs = _inputs((), 24)
    with use(mode):
        residual, y = _packed(gated_residual_adaln, ())(*inputs)
        gradients = torch.autograd.grad(residual.sum() + y.sum(), inputs)
    assert residual.shape == y.shape == (0, 24)
    assert [gradient.shape for gradient in gradients] == [x.shape for x in inputs]


def test_backward_repeats_bit_for_bit() -> None:
    inputs, call = _inputs(SHORT, 24), _packed(gated_residual_adaln, SHORT)
    with use("triton"):
        runs = [torch.autograd.grad(call(*inputs)[1].square().sum(), inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_lengths_may_be_a_tensor() -> None:
    inputs, offsets = _inputs(SHORT, 24), _offsets(SHORT)
    for dtype in (torch.int32, torch.int64):
        found = gated_residual_adaln(*inputs, cu_seqlens=torch.tensor(offsets, dtype=dtype, device=DEVICE))
        assert torch.equal(found[1], gated_residual_adaln(*inputs, cu_seqlens=offsets)[1])


def test_the_reference_passes_gradcheck() -> None:
    tokens = [torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    vectors = [torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def function(x: Tensor, branch: Tensor, *vectors: Tensor) -> list[Tensor]:
        rest = (1e-6, torch.float64)
        return reference.packed(reference.gated_residual_adaln, (2, 2, 1, 1), [x, branch], list(vectors), *rest)

    assert torch.autograd.gradcheck(function, (*tokens, *vectors))


@pytest.mark.parametrize("parts", [*(pytest.param(part, marks=NIGHT) for part in ("norm", "residual")), "both"])
def test_operator_is_sound(parts: str) -> None:
    x, branch, gate, shift, scale = _inputs((3, 5), 24)
    residual = (branch, gate) if parts != "norm" else (None, None)
    norm = (shift, scale) if parts != "residual" else (None, None)
    torch.library.opcheck(op._adaln.operator, (x, *residual, *norm, 1e-6, torch.float32, [0, 3, 8]))
    residual_gradient, norm_gradient = (x if parts != "norm" else None), (x if parts != "residual" else None)
    statistics = torch.rand(2, 8, device=DEVICE) if norm_gradient is not None else None
    backward = (residual_gradient, norm_gradient, x, *residual, norm[1], statistics)
    detached = [None if v is None else v.detach() for v in backward]
    torch.library.opcheck(op._adaln_backward.operator, (*detached, [0, 3, 8]))


@pytest.mark.parametrize("mode", [pytest.param("reference", marks=NIGHT), "triton"])
def test_compiles_without_a_break(mode: str) -> None:
    def function(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        residual, y = packed(gated_residual(x, branch, gate, cu_seqlens=offsets), branch, gate, shift, scale)
        return residual * adaln_modulate(y, shift, scale, cu_seqlens=offsets)

    packed, offsets = _packed(gated_residual_adaln, (3, 5)), _offsets((3, 5))
    inputs = _inputs((3, 5), 24)
    with use(mode):
        expected = function(*inputs)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
        assert torch.equal(compiled, expected)
        for mine, theirs in zip(*(torch.autograd.grad(y.sum(), inputs) for y in (compiled, expected)), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4, 8)}, r"x has shape \[2, 4, 8\]: expected \[N, D\]"),
        ({"branch": torch.zeros(5, 8)}, r"branch has shape \[5, 8\]: expected \[6, 8\] \[N, D\]"),
        ({"gate": torch.zeros(6, 8)}, r"gate has shape \[6, 8\]: expected \[2, 8\] \[S, D\]"),
        ({"cu_seqlens": (0, 4, 7)}, r"cu_seqlens is \(0, 4, 7\): expected cumulative lengths, rising from 0 to the 6"),
        ({"cu_seqlens": (0, 0, 6)}, r"cu_seqlens is \(0, 0, 6\): expected cumulative lengths"),
        ({"cu_seqlens": (0.0, 6.0)}, r"cu_seqlens is \(0.0, 6.0\): expected whole numbers"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, r"cu_seqlens is torch.float32 \[2\]: expected int32 \[S\+1\]"),
    ],
)
def test_bad_arguments_are_one_error(change: dict[str, object], message: str) -> None:
    good = {"x": torch.zeros(6, 8), "branch": torch.zeros(6, 8), "cu_seqlens": (0, 4, 6)}
    good |= {name: torch.zeros(2, 8) for name in ("gate", "shift", "scale")}
    with pytest.raises(ValueError, match=message):
        gated_residual_adaln(**{**good, **change})  # type: ignore[arg-type]
