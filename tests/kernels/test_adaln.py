"""The modulated norm and the gated residual: kernels against reference and float64."""

from __future__ import annotations

import logging

import pytest
import torch
from mpdit_kernels import adaln_modulate, dispatch, gated_residual, gated_residual_adaln, use
from mpdit_kernels.adaln import op, reference
from proof import DEVICE, DTYPES, MOSTLY_FP32, NIGHT, leaf, prove, strided
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

SHAPES = [(1, 1, 32), (3, 17, 72), (2, 41, 32), (1, 17, 1152), (1, 3, 97)]
SHAPES += [pytest.param(shape, marks=NIGHT) for shape in ((1, 272, 32), (1, 80, 768), (2, 41, 96), (2, 81, 96))]


def _vectors(batch: int, width: int, count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Slices of one modulation [B, 6D], as the model passes them."""
    modulation = torch.randn(batch, 6 * width, device=DEVICE, dtype=dtype).chunk(6, dim=-1)
    return [vector.requires_grad_() for vector in modulation[:count]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_are_as_exact_as_pytorch(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    batch, _, width = shape
    x, branch = leaf(*shape, dtype=dtype), leaf(*shape, dtype=dtype)
    prove(gated_residual_adaln, [x, branch, *_vectors(batch, width, 3)])


@pytest.mark.parametrize("dtype", MOSTLY_FP32, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_part_is_as_exact_as_pytorch(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    batch, _, width = shape
    x, branch = leaf(*shape, dtype=dtype), leaf(*shape, dtype=dtype)
    prove(adaln_modulate, [x, *_vectors(batch, width, 2)])
    prove(gated_residual, [x, branch, *_vectors(batch, width, 1, dtype)])


@pytest.mark.parametrize("rows", [2, 4])
def test_several_rows_at_a_time(rows: int) -> None:
    from mpdit_kernels.adaln import triton_impl

    config = {"ROWS": rows, "TOKENS": 8, "CAP": 32, "num_warps": 4, "num_stages": 1}
    inputs = [leaf(2, 19, 72), leaf(2, 19, 72), *_vectors(2, 72, 3)]
    with triton_impl.FORWARD.override(config), triton_impl.BACKWARD.override(config):
        prove(gated_residual_adaln, inputs)
        prove(adaln_modulate, [inputs[0], *inputs[3:]])
        prove(gated_residual, inputs[:3])


def test_rows_whose_variance_is_of_the_size_of_eps() -> None:
    x = (1e-3 * torch.randn(2, 5, 24, device=DEVICE)).requires_grad_()
    prove(lambda *inputs: adaln_modulate(*inputs, eps=1e-6), [x, *_vectors(2, 24, 2)])


def test_strides_of_inputs_and_gradients() -> None:
    x, branch = strided(2, 19, 40), leaf(2, 30, 40)[:, 5:24]
    prove(gated_residual_adaln, [x, branch, strided(2, 40), *_vectors(2, 40, 2)], noncontiguous_gradients=True)
    shared = leaf(1, 19, 40).expand(2, -1, -1)
    prove(gated_residual_adaln, [shared, x, *_vectors(2, 40, 3)])


def test_an_output_that_nobody_differentiates() -> None:
    inputs = [leaf(2, 5, 24), leaf(2, 5, 24), *_vectors(2, 24, 3)]
    prove(lambda *a: gated_residual_adaln(*a)[0], inputs)
    prove(lambda *a: gated_residual_adaln(*a)[1], inputs)


@pytest.mark.parametrize("shape", [(0, 5, 24), (2, 0, 24)], ids=str)
def test_nothing_to_do(shape: tuple[int, int, int]) -> None:
    inputs = [leaf(*shape), leaf(*shape), *_vectors(shape[0], 24, 3)]
    with use("triton"):
        residual, y = gated_residual_adaln(*inputs)
        gradients = torch.autograd.grad(residual.sum() + y.sum() + gated_residual(*inputs[:3]).sum(), inputs)
    assert residual.shape == y.shape == shape
    assert not any(gradient.any() for gradient in gradients)


def test_backward_repeats_bit_for_bit() -> None:
    inputs = [leaf(2, 41, 32), leaf(2, 41, 32), *_vectors(2, 32, 3)]
    with use("triton"):
        runs = [torch.autograd.grad(gated_residual_adaln(*inputs)[1].square().sum(), inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_dtypes_of_results() -> None:
    x, vectors = leaf(1, 4, 16), _vectors(1, 16, 3)
    for mode in ("reference", "triton"):
        with use(mode):
            assert adaln_modulate(x, *vectors[:2]).dtype == torch.float32
            assert adaln_modulate(x, *vectors[:2], dtype=torch.bfloat16).dtype == torch.bfloat16
            with torch.autocast(DEVICE, torch.bfloat16):
                residual, y = gated_residual_adaln(x, x.bfloat16(), *vectors)
            assert (residual.dtype, y.dtype) == (torch.float32, torch.bfloat16)
            assert gated_residual(x.bfloat16(), x, vectors[0]).dtype == torch.bfloat16


def test_references_pass_gradcheck() -> None:
    def double(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    tokens, vectors = [double(2, 3, 5), double(2, 3, 5)], [double(2, 5) for _ in range(3)]
    for function in (
        lambda x, _, gate, shift, scale: reference.adaln_modulate(x, shift, scale, 1e-6, x.dtype),
        lambda *inputs: reference.gated_residual_adaln(*inputs, 1e-6, torch.float64),
    ):
        assert torch.autograd.gradcheck(function, (*tokens, *vectors))


@pytest.mark.parametrize("parts", [*(pytest.param(part, marks=NIGHT) for part in ("norm", "residual")), "both"])
def test_operator_is_sound(parts: str) -> None:
    x, branch = leaf(2, 5, 24), leaf(2, 5, 24)
    gate, shift, scale = _vectors(2, 24, 3)
    residual = (branch, gate) if parts != "norm" else (None, None)
    norm = (shift, scale) if parts != "residual" else (None, None)
    torch.library.opcheck(op._adaln.operator, (x, *residual, *norm, 1e-6, torch.float32))
    residual_gradient, norm_gradient = (x if parts != "norm" else None), (x if parts != "residual" else None)
    statistics = torch.rand(2, 2, 5, device=DEVICE) if norm_gradient is not None else None
    backward = (residual_gradient, norm_gradient, x, *residual, norm[1], statistics)
    torch.library.opcheck(op._adaln_backward.operator, tuple(None if v is None else v.detach() for v in backward))


def test_compiles_without_a_break() -> None:
    def function(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        residual, y = gated_residual_adaln(gated_residual(x, branch, gate), branch, gate, shift, scale)
        return residual * adaln_modulate(y, shift, scale)

    inputs = [leaf(2, 5, 24), leaf(2, 5, 24), *_vectors(2, 24, 3)]
    with use("triton"):
        prove(torch.compile(function, fullgraph=True, backend="aot_eager"), inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8)}, r"x has shape \[2, 8\]: expected \[B, T, D\]"),
        ({"x": torch.zeros(2, 4, 8, dtype=torch.int32)}, "x has dtype torch.int32: expected a floating-point type"),
        ({"branch": torch.zeros(2, 3, 8)}, r"branch has shape \[2, 3, 8\]: expected \[2, 4, 8\]"),
        ({"gate": torch.zeros(2, 9)}, r"gate has shape \[2, 9\]: expected \[2, 8\] \[B, D\]"),
        ({"scale": torch.zeros(2, 8, device="meta")}, "scale is on meta: expected cpu, where x is"),
        ({"eps": -1.0}, "eps is -1.0: expected a number of at least 0"),
        ({"shift": None}, "shift is None: expected a tensor"),
        ({"x": [[[1.0]]]}, "x is list: expected a tensor"),
        ({"x": torch.zeros(2, 4, 8).to(torch.float8_e4m3fn)}, "x has dtype torch.float8_e4m3fn: expected a floating"),
        ({"dtype": torch.int32}, "dtype is torch.int32: expected a floating-point type"),
    ],
)
def test_bad_arguments_are_one_error(change: dict[str, object], message: str) -> None:
    good = {"x": torch.zeros(2, 4, 8), "branch": torch.zeros(2, 4, 8)}
    good |= {name: torch.zeros(2, 8) for name in ("gate", "shift", "scale")}
    with pytest.raises(ValueError, match=message):
        gated_residual_adaln(**{**good, **change})  # type: ignore[arg-type]


def test_a_refusal_is_told_once_and_under_compilation_too(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._told.clear()
    wide = [torch.zeros(1, 1, 5000), torch.zeros(1, 5000), torch.zeros(1, 5000)]
    double = [value.double() for value in wide]
    with use("triton"), caplog.at_level(logging.INFO, logger="mpdit_kernels"):
        for _ in range(2):
            adaln_modulate(*wide)
            torch.compile(adaln_modulate, fullgraph=True, backend="aot_eager")(*double)
    assert [record.getMessage() for record in caplog.records] == [
        "adaln_modulate takes its reference: rows are 5000 wide, and the kernels hold 4096 at most",
        "adaln_modulate takes its reference: a tensor is torch.float64, and the kernels take torch.float32, "
        "torch.bfloat16, torch.float16",
    ]


def test_an_eager_call_is_an_autograd_function_and_one_that_is_watched_the_operator() -> None:
    x, (shift, scale) = leaf(2, 5, 24), _vectors(2, 24, 2)
    with use("triton"):
        assert type(adaln_modulate(x, shift, scale).grad_fn).__name__ == "adalnBackward"
        with FlopCounterMode(display=False) as counter:
            adaln_modulate(x, shift, scale).sum().backward()
    names = {str(name) for name in counter.get_flop_counts()["Global"]}
    assert {"mpdit_kernels.adaln", "mpdit_kernels.adaln_backward"} <= names
