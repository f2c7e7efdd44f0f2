"""The FNO time embedding: kernels against reference and float64."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from mpdit_kernels import use
from mpdit_kernels.fno import fno_time_embedding, op, reference, triton_impl
from proof import DEVICE, NIGHT, _poisoned_memory, prove
from tools import measure
from tools.cases import CHANNELS, SHAPES, Shape, all_cases, fno_shapes
from torch import Tensor

NAMES = reference.names(3)


def draw(channels: int, width: int, layers: int = 3, scale: float = 0.3) -> dict[str, Tensor]:
    """Weights in the official layout."""
    values = (scale * torch.randn(size, device=DEVICE) for size in fno_shapes(channels, width, layers))
    return {name: value.requires_grad_() for name, value in zip(reference.names(layers), values, strict=True)}


FEW = 8
"""Below as many samples t's gradient is no fair comparison: a few sums may nearly cancel, to anyone's guess."""


def times(batch: int) -> Tensor:
    return torch.rand(batch, device=DEVICE).requires_grad_()


def call(t: Tensor, *weights: Tensor) -> Tensor:
    return fno_time_embedding(t, dict(zip(reference.names((len(weights) - 4) // 4), weights, strict=True)))


@pytest.mark.parametrize(("batch", "channels", "width"), [(1, 32, 72), (3, 32, 768), (1, 16, 1152), (8, 16, 33)])
def test_kernels_are_as_exact_as_pytorch(batch: int, channels: int, width: int) -> None:
    prove(call, [times(batch).requires_grad_(batch >= FEW), *draw(channels, width).values()])


def test_the_widest_in_another_configuration() -> None:
    inputs = [times(FEW), *draw(64, 72).values()]
    samples = {"BLOCK": 8, "ROWS": 64, "STAGES": 1, "num_warps": 8, "num_stages": 1}
    weights = {"BATCH": 2, "OUT": 64, "ROWS": 64, "STAGES": 1, "num_warps": 8, "num_stages": 1}
    with ExitStack() as stack:
        for tunable in (triton_impl.FORWARD, triton_impl.BACKWARD_SAMPLES):
            stack.enter_context(tunable.override(samples))
        stack.enter_context(triton_impl.BACKWARD_WEIGHTS.override(weights))
        prove(call, inputs)


def test_a_batch_beyond_one_block_of_samples() -> None:
    prove(call, [times(35), *draw(16, 72).values()])


def test_strides_of_inputs_and_gradients() -> None:
    weights = {name: torch.stack([x, x], -1)[..., 0].detach().requires_grad_() for name, x in draw(16, 72).items()}
    t = torch.rand(3 * FEW, device=DEVICE)[::3].requires_grad_()
    assert not t.is_contiguous() and not weights["conv0.weights_real"].is_contiguous()
    prove(call, [t, *weights.values()], noncontiguous_gradients=True)
    shared = torch.rand(1, device=DEVICE).expand(3)
    prove(lambda *inputs: call(*inputs).sum(dim=0), [shared, *weights.values()])  # whose gradient is expanded, too


@pytest.mark.parametrize("mode", ["reference", "triton"])
@pytest.mark.parametrize("layers", [2, 3, 4])
def test_the_definition(layers: int, mode: str) -> None:
    """As the paper has it: every layer by FFT on every sample's own grid, in float64."""
    weights, t = draw(16, 24, layers), times(3)
    with use(mode):
        out = fno_time_embedding(t, weights)
    exact = {name: value.double() for name, value in weights.items()}
    x = ((torch.linspace(-1, 1, 32, device=DEVICE) + t[:, None]).double()[..., None]) @ exact["fc0.weight"].T
    x = (x + exact["fc0.bias"]).transpose(1, 2)
    for i in range(layers):
        mixing = torch.complex(exact[f"conv{i}.weights_real"], exact[f"conv{i}.weights_imag"])
        spectrum = torch.einsum("bim,iom->bom", torch.fft.rfft(x)[..., :16], mixing)
        x = torch.fft.irfft(spectrum, n=32) + exact[f"w{i}.weight"][..., 0] @ x + exact[f"w{i}.bias"][:, None]
        if i < layers - 1:
            x = torch.nn.functional.gelu(x)
    expected = x.mean(dim=-1) @ exact["fc1.weight"].T + exact["fc1.bias"]
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("mode", ["reference", "triton"])
def test_gradients_of_what_does_not_act_are_zero(mode: str) -> None:
    weights = draw(16, 24)
    with use(mode):
        fno_time_embedding(times(2), weights).square().sum().backward()
    real, imag = weights["conv2.weights_real"].grad, weights["conv2.weights_imag"].grad
    assert real is not None and imag is not None
    assert real[..., 0].abs().min() > 0 and torch.all(real[..., 1:] == 0) and torch.all(imag == 0)
    assert torch.all(weights["conv1.weights_imag"].grad[..., 0] == 0)  # type: ignore[index]


@pytest.mark.parametrize("mode", ["reference", "triton"])
def test_an_empty_batch(mode: str) -> None:
    weights, t = draw(16, 24), times(0)
    with use(mode):
        out = fno_time_embedding(t, weights)
        gradients = torch.autograd.grad(out.sum(), [t, *weights.values()])
    assert out.shape == (0, 24)
    assert all(torch.all(gradient == 0) for gradient in gradients)


def test_backward_repeats_bit_for_bit() -> None:
    inputs = [times(9), *draw(16, 72).values()]
    with use("triton"):
        runs = [torch.autograd.grad(call(*inputs).square().sum(), inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_only_gradients_asked_for() -> None:
    t, weights = times(2), draw(16, 24)
    values = list(weights.values())
    with use("triton"):
        of_t, of_bias = torch.autograd.grad(call(t, *values).sum(), [t, weights["w1.bias"]])
        frozen = [value.detach() for value in values]
        (alone,) = torch.autograd.grad(call(t, *frozen).sum(), t)
        frozen[NAMES.index("w1.bias")] = weights["w1.bias"]
        (only,) = torch.autograd.grad(call(t.detach(), *frozen).sum(), weights["w1.bias"])
        assert not call(t.detach(), *(value.detach() for value in values)).requires_grad
    assert torch.equal(alone, of_t) and torch.equal(only, of_bias)


@pytest.mark.parametrize("mode", ["reference", "triton"])
def test_narrow_weights_and_autocast_leave_fp32(mode: str) -> None:
    t = times(2)
    narrow = {name: value.detach().bfloat16().requires_grad_() for name, value in draw(16, 24).items()}
    wide = {name: value.detach().float().requires_grad_() for name, value in narrow.items()}
    with use(mode):
        with torch.autocast(DEVICE, torch.bfloat16):
            out = fno_time_embedding(t, narrow)
        out.sum().backward()
        expected = fno_time_embedding(t, wide)
        expected.sum().backward()
    assert out.dtype == torch.float32 and torch.equal(out, expected)
    for name, value in narrow.items():
        assert value.grad is not None and value.grad.dtype == torch.bfloat16
        assert torch.equal(value.grad, wide[name].grad.bfloat16()), name  # type: ignore[union-attr]


def test_float64_takes_the_reference() -> None:
    weights = {name: value.double() for name, value in draw(16, 24).items()}
    with use("triton"):
        assert fno_time_embedding(times(2), weights).dtype == torch.float64


@pytest.mark.parametrize(
    ("channels", "layers", "message"), [(8, 3, "there are 8 channels"), (16, 4, "there are 4 layers")]
)
def test_other_sizes_are_refused_with_a_reason(
    channels: int, layers: int, message: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpdit_kernels.dispatch._told", set())
    with use("triton"):
        fno_time_embedding(times(1), draw(channels, 8, layers))
    assert message in caplog.text


@pytest.mark.parametrize("layers", [2, pytest.param(3, marks=NIGHT)])
def test_reference_passes_gradcheck(layers: int) -> None:
    sizes = [torch.Size((2,)), *fno_shapes(2, 3, layers)]
    inputs = [torch.randn(size, dtype=torch.float64).mul(0.5).requires_grad_() for size in sizes]
    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("batch", [2, pytest.param(0, marks=NIGHT)])
def test_operator_is_sound(batch: int) -> None:
    torch.library.opcheck(op._fno.operator, (times(batch), list(draw(16, 24).values())))


BACKWARDS = [(batch, of_t, of_weights) for batch in (0, 3) for of_t in (False, True) for of_weights in (False, True)]
BY_DAY = ((0, False, True), (3, True, True))


@pytest.mark.parametrize(
    ("batch", "of_t", "of_weights"), [pytest.param(*case, marks=() if case in BY_DAY else NIGHT) for case in BACKWARDS]
)
def test_backward_operator_is_sound(batch: int, of_t: bool, of_weights: bool) -> None:
    t, weights = times(batch).detach(), [value.detach() for value in draw(16, 24).values()]
    with _poisoned_memory():
        out, *saved = op._fno(t, weights)
        arguments = (torch.randn_like(out), t, weights, *saved, of_t, of_weights)
        found = op._fno_backward(*arguments)
    assert all(x.isfinite().all() for x in (out, *saved, *found))
    assert [x.numel() > 0 for x in found] == [of_t and batch > 0, *[of_weights] * len(weights)]
    torch.library.opcheck(op._fno_backward.operator, arguments)


def test_the_kernels_gradients_are_taken_once() -> None:
    inputs = [times(2), *draw(16, 24).values()]
    first = []
    for mode in ("triton", "reference"):
        with use(mode):
            first += torch.autograd.grad(call(*inputs).sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first[0].sum().backward()
    first[1].sum().backward()
    assert inputs[0].grad is not None


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_costs_count_what_the_launches_are_given(shape: Shape) -> None:
    """Each pass's distinct tensors, and twice what one backward launch hands the other, but not the table."""
    (case,) = all_cases([shape], ["fno"])
    launches = measure.launches(case, "sm_90", torch.bfloat16)
    passes = [
        {id(x): x for launch in some for x in launch.args if isinstance(x, Tensor)}
        for some in (launches[:1], launches[1:])
    ]
    tables, unread = 4 * 34 * 32, 4 * 15 * CHANNELS**2  # of conv2.weights_real only one frequency acts
    forward, backward = (sum(x.numel() * x.element_size() for x in used.values()) - tables - unread for used in passes)
    passed = 4 * shape.batch * CHANNELS * (32 + 32 + 1)
    assert case.backward is not None
    assert (case.forward.bytes, case.backward.bytes) == (forward, backward + passed)
    assert case.forward.flops == case.backward.flops == 0 < case.forward.flops32 < case.backward.flops32


@pytest.mark.parametrize("mode", [pytest.param("reference", marks=NIGHT), "triton"])
def test_compiles_without_a_break(mode: str) -> None:
    torch.compiler.reset()
    weights, t = draw(16, 24), times(2)

    def function(t: Tensor, weights: dict[str, Tensor]) -> Tensor:
        return fno_time_embedding(2 * t, weights).square()

    with use(mode):
        out = torch.compile(function, fullgraph=True, backend="aot_eager")(t, weights)
        expected = function(t, weights)
        found = torch.autograd.grad(out.sum(), [t, *weights.values()])
        wanted = torch.autograd.grad(expected.sum(), [t, *weights.values()])
    assert torch.equal(out, expected)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_constants_made_while_sampling_serve_training() -> None:
    built = reference.per_device(reference.fourier_matrices)
    with torch.inference_mode():
        first = built(torch.device("cpu"), torch.float32)
    assert not first[0].is_inference() and built(torch.device("cpu"), torch.float32)[0] is first[0]


WEIGHTS = {name: torch.zeros(size) for name, size in zip(NAMES, fno_shapes(16, 24), strict=True)}


@pytest.mark.parametrize(
    ("t", "change", "message"),
    [
        (torch.zeros(2, 1), {}, r"t has shape \[2, 1\]: expected \[B\]"),
        (torch.zeros(2, dtype=torch.int64), {}, "t has dtype torch.int64: expected a floating-point type"),
        (torch.zeros(2).to(torch.float8_e5m2), {}, "t has dtype torch.float8_e5m2: expected a floating-point type"),
        ([0.0], {}, "t is list: expected a tensor"),
        (None, {}, "t is None: expected a tensor"),
        (torch.zeros(2), {"w1.bias": [0.0]}, "w1.bias is list: expected a tensor"),
        (torch.zeros(2), {3: torch.zeros(16)}, "weights is with 3: expected only fc0.weight"),
        (torch.zeros(2), {"w1.bias": None}, "weights is without w1.bias: expected fc0.weight, fc0.bias, conv0"),
        (torch.zeros(2), {"conv1.weights_real": None}, "weights is without conv1.weights_real: expected fc0"),
        (torch.zeros(2), {"w9.bias": torch.zeros(16)}, "weights is with w9.bias: expected only fc0.weight"),
        (torch.zeros(2), {name: None for name in NAMES if name[-6] != "0" and name[:4] != "fc0."}, "weights is"),
        (torch.zeros(2), {"fc0.weight": torch.zeros(16)}, r"fc0.weight has shape \[16\]: expected \[W, 1\]"),
        (torch.zeros(2), {"fc0.weight": torch.zeros(16, 2)}, r"fc0.weight has shape \[16, 2\]: expected \[16, 1\]"),
        (torch.zeros(2), {"fc1.weight": torch.zeros(24, 8)}, r"fc1.weight has shape \[24, 8\]: expected \[24, 16\]"),
        (torch.zeros(2), {"w2.weight": torch.zeros(16, 16)}, r"w2.weight has shape \[16, 16\]: expected \[16, 16, 1\]"),
        (torch.zeros(2), {"conv0.weights_imag": torch.zeros(16, 16, 15)}, r"expected \[16, 16, 16\] \[W in, W out"),
        (torch.zeros(2), {"fc1.bias": torch.zeros(24, device="meta")}, "fc1.bias is on meta: expected cpu, where t is"),
        (torch.zeros(2), {"fc1.weight": torch.zeros(0, 16), "fc1.bias": torch.zeros(0)}, "16 channels and width 0"),
    ],
)
def test_bad_arguments_are_one_error(t: Any, change: dict[Any, Any], message: str) -> None:
    weights = {name: value for name, value in {**WEIGHTS, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        fno_time_embedding(t, weights)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (list(WEIGHTS.values()), "weights is list: expected a mapping from names to tensors"),
        (None, "weights is NoneType: expected a mapping"),
        ({**WEIGHTS, "conv0.weights_real": None}, "conv0.weights_real is None: expected a tensor"),
    ],
)
def test_weights_that_are_none(weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fno_time_embedding(torch.zeros(2), weights)


def test_one_layer_is_too_few() -> None:
    names = reference.names(1)
    with pytest.raises(ValueError, match="weights is of 1 layers, by its conv"):
        fno_time_embedding(torch.zeros(2), {name: WEIGHTS[name] for name in names})
