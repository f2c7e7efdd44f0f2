"""The MLP: its kernels against reference and float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from mpdit_kernels import use
from mpdit_kernels.gelu_mlp import gelu_linear, op, reference, triton_impl
from proof import DEVICE, DTYPES, NIGHT, _poisoned_memory, distance, leaf, prove, strided
from torch import Tensor
from torch.nn.functional import gelu, linear


@contextmanager
def kernels(small_tiles: bool = True) -> Iterator[None]:
    """The kernels; with tiles so small that small shapes have several, and incomplete ones, each way."""
    rows = {"ROWS": 2, "COLUMNS": 64, "TOKENS": 8, "num_warps": 4, "num_stages": 1}
    with ExitStack() as stack:
        stack.enter_context(use("triton"))
        if small_tiles:
            stack.enter_context(triton_impl.PASS_BACKWARD.override(rows))
        yield


def _inputs(*shape: int, hidden: int, dtype: torch.dtype = torch.float32, out: int | None = None) -> list[Tensor]:
    """x of this shape, and weights that keep the sizes of values."""
    width = shape[-1]
    out = width if out is None else out
    weights = [leaf(*size, dtype=dtype) for size in ((hidden, width), (hidden,), (out, hidden), (out,))]
    for weight in weights:
        weight.data *= weight.shape[-1] ** -0.5
    return [leaf(*shape, dtype=dtype), *weights]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "hidden"), [((1, 1, 32), 128), ((3, 17, 72), 288), ((2, 40, 24), 97), ((33, 7), 70)], ids=str
)
def test_kernels_are_as_exact_as_pytorch(shape: tuple[int, ...], hidden: int, dtype: torch.dtype) -> None:
    with kernels():
        prove(gelu_linear, _inputs(*shape, hidden=hidden, dtype=dtype))
        prove(gelu_linear, _inputs(*shape, hidden=hidden, dtype=dtype)[:3])


WIDE = [pytest.param(*size, marks=NIGHT) for size in ((80, 768), (17, 1152))]


@pytest.mark.parametrize(("tokens", "width"), [(33, 96), *WIDE])
def test_default_configurations_are_as_exact(tokens: int, width: int) -> None:
    with kernels(small_tiles=False):
        prove(gelu_linear, _inputs(1, tokens, width, hidden=4 * width))


def test_strides_of_inputs_and_gradients() -> None:
    _, weight1, bias1, weight2, bias2 = _inputs(1, 40, hidden=96)
    tall = leaf(40, 96).t()
    with kernels():
        for x in (strided(2, 19, 40), leaf(2, 30, 40)[:, 5:24], leaf(1, 9, 40).expand(2, -1, -1)):
            prove(gelu_linear, [x, weight1, bias1, weight2, bias2], noncontiguous_gradients=True)
            prove(gelu_linear, [x, tall, bias1, strided(40, 96), strided(40)], noncontiguous_gradients=True)
        prove(gelu_linear, [strided(19, 40), tall, strided(96)], noncontiguous_gradients=True)


def test_gaps_between_rows_of_inputs_and_gradients() -> None:
    _, *weights = _inputs(1, 40, hidden=96)

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.cat([x, gelu_linear(x, *weights)], -1)  # whose gradient comes as part of wider rows

    x = torch.randn(19, 90, device=DEVICE)[:, 3:43].requires_grad_()
    with kernels():
        prove(function, [x, *weights])
        prove(function, [x, *weights[:2]])


@pytest.mark.parametrize("asked", [0, 1, 2, 3, 4])
def test_a_single_gradient(asked: int) -> None:
    inputs = [x.requires_grad_(index == asked) for index, x in enumerate(_inputs(2, 5, 24, hidden=40))]
    with kernels():
        prove(gelu_linear, inputs)


def test_without_gradients_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    forward = triton_impl.forward
    monkeypatch.setattr(triton_impl, "forward", lambda *a: kept.append(a[5]) or forward(*a))
    x, *weights = _inputs(2, 5, 24, hidden=40)
    expected = gelu_linear(x, *weights)
    with use("triton"):
        gelu_linear(x, *weights)
        with torch.no_grad():
            torch.testing.assert_close(gelu_linear(x, *weights), expected)
        torch.testing.assert_close(gelu_linear(x.detach(), *(w.detach() for w in weights)), expected)
    assert kept == [True, False, False]
    prove(gelu_linear, [value.detach() for value in (x, *weights)])


def test_large_values_are_finite() -> None:
    h = torch.tensor([-1e9, -300.0, -12.0, -1e-3, 0.0, 1e-3, 12.0, 300.0, 1e9], device=DEVICE)
    one = torch.ones(9, 1, device=DEVICE)
    x = h[:, None].clone().requires_grad_()
    with kernels():
        y = gelu_linear(x, one[:1], torch.zeros(1, device=DEVICE), one[:1], torch.zeros(1, device=DEVICE))
    (dx,) = torch.autograd.grad(y, x, one)
    exact = h.double()[:, None].requires_grad_()
    (slope,) = torch.autograd.grad(gelu(exact, approximate="tanh"), exact, one.double())
    torch.testing.assert_close(y.double(), gelu(exact, approximate="tanh").detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(dx.double(), slope, rtol=1e-5, atol=1e-6)


def test_what_is_no_number_stays_none() -> None:
    one, zero, x = torch.ones(1, 1, device=DEVICE), torch.zeros(1, device=DEVICE), leaf(3, 1)
    x.data[1] = float("nan")
    with kernels(small_tiles=False):
        y = gelu_linear(x, one, zero)
        (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.isnan().flatten().tolist() == dx.isnan().flatten().tolist() == [False, True, False]


def test_slope_is_exact_where_the_gate_saturates() -> None:
    one, zero, x = torch.ones(1, 1, device=DEVICE), torch.zeros(1, device=DEVICE), leaf(2000, 1)
    wide = 4 * x
    with kernels(small_tiles=False):
        (ours,) = torch.autograd.grad(gelu_linear(wide, one, zero, one, zero).sum(), wide)
    exact = wide.detach().double().requires_grad_()
    (slope,) = torch.autograd.grad(gelu(exact, approximate="tanh").sum(), exact)
    assert distance(ours, slope) < 2 * torch.finfo(torch.float32).eps  # s - s^2 for the gate's own slope errs by 3.3


def test_no_rows() -> None:
    inputs = _inputs(0, 5, 24, hidden=40)
    with kernels():
        y = gelu_linear(*inputs)
        gradients = torch.autograd.grad(y.sum(), inputs)
    assert y.shape == (0, 5, 24)
    assert all(not g.any() and g.shape == x.shape for g, x in zip(gradients, inputs, strict=True))


def test_backward_repeats_bit_for_bit() -> None:
    inputs = _inputs(2, 41, 48, hidden=96)
    with kernels():
        runs = [torch.autograd.grad(gelu_linear(*inputs).square().sum(), inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_reference_is_what_the_model_does() -> None:
    x, weight1, bias1, weight2, bias2 = _inputs(3, 17, 72, hidden=288)
    for enabled in (False, True):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled), use("reference"):
            today = linear(gelu(linear(x, weight1, bias1), approximate="tanh"), weight2, bias2)
            assert torch.equal(gelu_linear(x, weight1, bias1, weight2, bias2), today)
            assert today.dtype == (torch.bfloat16 if enabled else torch.float32)


def test_autocast_sets_the_dtype_of_products() -> None:
    inputs = _inputs(2, 9, 24, hidden=40)
    with kernels(), torch.autocast(DEVICE, torch.float16):  # whose products the interpreter gets right
        y = gelu_linear(*inputs)
        mixed = gelu_linear(inputs[0].half(), *inputs[1:])
        gradients = torch.autograd.grad(y.sum(), inputs)
    assert y.dtype == mixed.dtype == torch.float16
    assert torch.equal(y, mixed)
    assert all(g.dtype == torch.float32 for g in gradients)
    torch.testing.assert_close(y.float(), reference.gelu_linear(*inputs), rtol=0.01, atol=0.01)


def test_reference_passes_gradcheck() -> None:
    sizes = ((2, 3, 5), (7, 5), (7,), (4, 7), (4,))
    inputs = [torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in sizes]
    assert torch.autograd.gradcheck(reference.gelu_linear, inputs)
    assert torch.autograd.gradcheck(reference.gelu_linear, (*inputs[:3], None, None))


def test_operator_is_sound() -> None:
    x, *weights = _inputs(2, 5, 24, hidden=40)
    with kernels():
        torch.library.opcheck(op._gelu_linear.operator, (x, *weights, True))
        torch.library.opcheck(op._gelu_linear.operator, (x, *weights[:2], None, None, True))
        torch.library.opcheck(op._gelu_linear.operator, (*(value.detach() for value in (x, *weights)), False))


ALL = (True,) * 5
SINGLE = [tuple(index == asked for index in range(5)) for asked in range(5)]


@pytest.mark.parametrize("rows", [pytest.param(0, marks=NIGHT), 10])
def test_backward_operator_is_sound(rows: int) -> None:
    x, weight1, bias1, weight2, bias2 = (value.detach() for value in _inputs(rows, 24, hidden=40))
    calls = [(weight2, needs) for needs in (ALL, *SINGLE, (False,) * 5)]
    calls += [(None, (*needs[:3], False, False)) for needs in (ALL, *SINGLE[:3])]
    with kernels():
        _, hidden = op._gelu_linear(x, weight1, bias1, weight2, bias2, True)
        for second, needs in calls:
            dy = torch.randn(rows, 40 if second is None else 24, device=DEVICE)
            arguments = (dy, x, weight1, second, hidden, needs)
            torch.library.opcheck(op._gelu_linear_backward.operator, arguments)
            with _poisoned_memory():
                gradients = op._gelu_linear_backward(*arguments)
            assert [g.numel() > 0 for g in gradients] == [
                need and (rows > 0 or index > 0) for index, need in enumerate(needs)
            ]
            assert all(g.isfinite().all() for g in gradients)


def test_the_kernels_gradients_are_taken_once() -> None:
    x, *weights = _inputs(2, 16, hidden=40)
    first = []
    for mode in ("triton", "reference"):
        with use(mode):
            first += torch.autograd.grad(gelu_linear(x, *weights).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first[0].sum().backward()
    first[1].sum().backward()
    assert x.grad is not None


def test_compiles_without_a_break() -> None:
    compiled = torch.compile(gelu_linear, fullgraph=True, backend="aot_eager")
    with kernels():
        prove(compiled, _inputs(2, 5, 24, hidden=40))
        prove(compiled, [value.detach() for value in _inputs(2, 5, 24, hidden=40)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4, dtype=torch.int32)}, "x has dtype torch.int32: expected a floating-point type"),
        (
            {"x": torch.zeros(2, 4, 8).to(torch.float8_e4m3fn)},
            "x has dtype torch.float8_e4m3fn: expected a floating-point type",
        ),
        ({"x": [[0.0] * 8]}, "x is list: expected a tensor"),
        ({"weight1": None}, "weight1 is None: expected a tensor"),
        ({"bias1": None}, "bias1 is None: expected a tensor"),
        ({"weight2": [0.0]}, "weight2 is list: expected a tensor"),
        (
            {"weight2": torch.zeros(0, 6), "bias2": torch.zeros(0)},
            r"weight2 is of shape \[0, 6\]: expected at least one",
        ),
        ({"x": torch.zeros(())}, r"x is of shape \[\]: expected \[\.\.\., D\] with at least one column"),
        ({"weight1": torch.zeros(6)}, r"weight1 has shape \[6\]: expected \[H, D\]"),
        ({"weight1": torch.zeros(6, 9)}, r"weight1 has shape \[6, 9\]: expected \[6, 8\] \[H, D\]"),
        ({"weight1": torch.zeros(0, 8)}, r"weight1 is of shape \[0, 8\]: expected at least one row"),
        ({"bias1": torch.zeros(8)}, r"bias1 has shape \[8\]: expected \[6\] \[H\]"),
        ({"weight2": torch.zeros(5, 8)}, r"weight2 has shape \[5, 8\]: expected \[5, 6\] \[D2, H\]"),
        ({"bias2": torch.zeros(6)}, r"bias2 has shape \[6\]: expected \[5\] \[D2\]"),
        ({"bias2": None}, "bias2 is None: expected"),
        ({"weight2": None}, "bias2 is given: expected None"),
        ({"bias1": torch.zeros(6).half()}, "bias1 is of dtype torch.float16: expected torch.float32, as x"),
        ({"weight2": torch.zeros(5, 6, device="meta")}, "weight2 is on meta: expected cpu, where x is"),
    ],
)
def test_bad_arguments_are_one_error(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"x": torch.zeros(2, 4, 8), "weight1": torch.zeros(6, 8), "bias1": torch.zeros(6)}
    good |= {"weight2": torch.zeros(5, 6), "bias2": torch.zeros(5)}
    with pytest.raises(ValueError, match=message):
        gelu_linear(**{**good, **change})
