"""AdamWEMA's kernels against its reference and float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from mpdit_kernels import AdamWEMA, use
from mpdit_kernels.adamw_ema import uploads
from mpdit_kernels.adamw_ema.reference import adamw_ema_
from mpdit_kernels.adamw_ema.triton_impl import UPDATE
from mpdit_kernels.adamw_ema.uploads import Uploads
from mpdit_kernels.launch import record
from proof import DEVICE, FLOOR, distance, prove
from torch import Tensor

SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "ema_decay": 0.99}
SMALL = {"BLOCK": 64, "TILES": 2, "HINT": 8, "num_warps": 1, "num_stages": 1}
STATES = ("exp_avg", "exp_avg_sq", "ema", "step")
SHAPES: list[tuple[int, ...]] = [(300,), (7, 5), (128,), (), (0,), (2, 3, 44), (131,)]


@pytest.fixture(autouse=True)
def _several_chunks() -> Iterator[None]:
    """Chunks of 128 elements, so that small tensors have several."""
    with UPDATE.override(SMALL):
        yield


def _parameter(value: Tensor, grad: Tensor | None) -> torch.nn.Parameter:
    param = torch.nn.Parameter(value)
    if grad is not None and grad.dtype != param.dtype:
        param.grad_dtype = None  # type: ignore[attr-defined]
    param.grad = grad
    return param


def _step(
    value: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, ema: Tensor, *, done: float, **options: Any
) -> list[Tensor]:
    """One step from this state, on copies."""
    dtype = options.pop("copy", None)
    param = _parameter(value.clone(), grad)
    optimizer = AdamWEMA([param], **{**SETTINGS, **options})
    written = torch.empty_like(value, dtype=value.dtype if value.dtype == torch.float64 else dtype or torch.float32)
    if dtype is not None:
        optimizer.attach_copies({param: written})
    step = torch.tensor(done, dtype=torch.float32, device=DEVICE)
    optimizer.state[param] = dict(zip(STATES, (exp_avg.clone(), exp_avg_sq.clone(), ema.clone(), step), strict=True))
    optimizer.step()
    tensors = [param.detach(), *(optimizer.state[param][name] for name in STATES)]
    return [*tensors, written] if dtype is not None else tensors


def _inputs(count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    values = [torch.randn(count, device=DEVICE) for _ in range(5)]
    values[1], values[3] = values[1].to(dtype), values[3].square()
    return values


@pytest.mark.parametrize("done", [0.0, 2.0, 1e5])
def test_a_step_is_as_exact_as_pytorchs(done: float) -> None:
    for count in (1, 7, 128, 300):
        prove(lambda *tensors: _step(*tensors, done=done), _inputs(count))
    # Nothing but the update itself, where a wrong bias correction would show in every digit.
    value, grad, *_ = _inputs(256)
    zero = torch.zeros_like(value)
    prove(lambda *tensors: _step(*tensors, done=done, weight_decay=0.0), [zero, grad, zero, zero, zero])


@pytest.mark.filterwarnings("error::RuntimeWarning")  # the interpreter's, of the logarithm of 0
@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.1, 0.4), (0.9, 0.99999)])
@pytest.mark.parametrize("ema_decay", [0.0, 0.9999, 1.0])
def test_extreme_decays(betas: tuple[float, float], ema_decay: float) -> None:
    prove(lambda *tensors: _step(*tensors, done=3.0, betas=betas, ema_decay=ema_decay), _inputs(200))


@pytest.mark.parametrize("grad", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradients_and_copies_of_every_dtype(grad: torch.dtype) -> None:
    for written in (torch.float32, torch.float16, torch.bfloat16):
        prove(lambda *tensors, dtype=written: _step(*tensors, done=3.0, copy=dtype), _inputs(300, grad))


def test_clipping_and_finite_check_in_the_pass() -> None:
    for norm in (1e-3, 1e6):
        prove(lambda *tensors, n=norm: _step(*tensors, done=3.0, max_norm=n, skip_nonfinite=True), _inputs(300))


def _parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    values[2].zero_()
    return [torch.nn.Parameter(value.to(DEVICE, dtype)) for value in values]


def _give_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    """New tensors each time, none for one parameter in turn."""
    generator = torch.Generator().manual_seed(100 + step)
    for index, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator).to(param)
        param.grad = None if (index + step) % len(params) == 0 else grad


def _trained(mode: str, dtype: torch.dtype, steps: int = 18, **options: Any) -> list[Tensor]:
    """Weights and states after a history: two groups, one parameter added on the way, a state dict loaded."""
    params = _parameters(dtype)
    optimizer = AdamWEMA([{"params": params[:3]}, {"params": params[3:5], "lr": 1e-2}], **{**SETTINGS, **options})
    with use(mode):
        for step in range(steps):
            if step == 5:
                optimizer.add_param_group({"params": params[5:], "weight_decay": 0.0})
            if step == 10:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = AdamWEMA(
                    [{"params": params[:3]}, {"params": params[3:5]}, {"params": params[5:]}], **options
                )
                optimizer.load_state_dict(saved)
            if step == 15:
                params[0].data = params[0].data.clone()
            _give_gradients(params, step)
            optimizer.step()
    states = [tensor for param in params for tensor in optimizer.state[param].values()]
    return [param.detach() for param in params] + states


@pytest.mark.parametrize("options", [{}, {"max_norm": 3.0}], ids=["plain", "clipped"])
def test_a_training_run_is_as_exact_as_pytorchs(options: dict[str, Any]) -> None:
    truth = _trained("reference", torch.float64, **options)
    usual = _trained("reference", torch.float32, **options)
    ours = _trained("triton", torch.float32, **options)
    floor = FLOOR if DEVICE == "cuda" else 1  # there torch computes in fp64
    for mine, theirs, exact in zip(ours, usual, truth, strict=True):
        assert distance(mine, exact) <= 2 * distance(theirs, exact) + floor * torch.finfo(torch.float32).eps
    assert any(not torch.equal(mine, theirs) for mine, theirs in zip(ours, usual, strict=True)), "the same code ran"


def test_repeats_bit_for_bit() -> None:
    runs = [_trained("triton", torch.float32, 3, max_norm=3.0, skip_nonfinite=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_one_launch_for_all_tensors_of_a_group() -> None:
    params = _parameters()
    optimizer = AdamWEMA([{"params": params[:5]}, {"params": params[5:]}])
    _give_gradients(params, 1)
    with use("triton"), record() as launches:
        optimizer.step()
    assert [launch.kernel.__name__ for launch in launches] == ["_advance", "_update"] * 2
    assert all(launch.constants["ALIGNED"] for launch in launches[1::2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_skips_the_step(bad: float) -> None:
    params = _parameters()
    copies = {param: torch.empty_like(param, dtype=torch.float16, requires_grad=False) for param in params}
    optimizer = AdamWEMA(params, **SETTINGS, max_norm=1.0, skip_nonfinite=True)
    optimizer.attach_copies(copies)
    with use("triton"):
        for step in (1, 2):
            _give_gradients(params, step)
            optimizer.step()
        before = copy.deepcopy((params, optimizer.state_dict(), list(copies.values())))
        assert params[6].grad is not None
        params[6].grad[130] = bad
        optimizer.step()
        assert (int(before[1]["skipped"]), int(optimizer.skipped)) == (0, 1)
        assert all(torch.equal(a, b) for a, b in zip(before[0], params, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(before[2], copies.values(), strict=True))
        for index, state in optimizer.state_dict()["state"].items():
            assert all(torch.equal(state[name], before[1]["state"][index][name]) for name in STATES)
        params[6].grad[130] = 0.0
        optimizer.step()
    assert not torch.equal(before[0][0], params[0])
    assert int(optimizer.skipped) == 1


@pytest.mark.parametrize("mode", ["triton", "reference"])
@pytest.mark.parametrize("check", [False, True], ids=["told", "told or not finite"])
def test_skips_while_it_is_told_to(mode: str, check: bool) -> None:
    params, steady = _parameters(), _parameters()
    optimizer, other = AdamWEMA(params, **SETTINGS, skip_nonfinite=check), AdamWEMA(steady, **SETTINGS)
    optimizer.skip = torch.zeros((), dtype=torch.bool, device=DEVICE)
    with use(mode):
        for step, skip in ((1, False), (2, True), (3, False), (4, True)):
            optimizer.skip.fill_(skip)
            _give_gradients(params, step)
            optimizer.step()
            if not skip:
                _give_gradients(steady, step)
                other.step()
                for average in (optimizer.state[params[0]]["ema"], other.state[steady[0]]["ema"]):
                    average[0] = -0.0
    assert int(optimizer.skipped) == 0
    for mine, theirs in zip(params, steady, strict=True):
        for ours, wanted in ((mine, theirs), *((optimizer.state[mine][k], other.state[theirs][k]) for k in STATES)):
            assert ours.detach().cpu().numpy().tobytes() == wanted.detach().cpu().numpy().tobytes()


def _compare_with_definition(values: list[Tensor], grads: list[Tensor]) -> None:
    """One step of these, views and all, by the kernel, by the reference and by the definition on contiguous copies."""
    results = []
    for mode in ("triton", "reference"):
        params = [_parameter(_same_strides(value), grad) for value, grad in zip(values, grads, strict=True)]
        optimizer = AdamWEMA(params, **SETTINGS)
        with use(mode):
            optimizer.step()
        results.append([(param.detach(), *(optimizer.state[param][name] for name in STATES[:3])) for param in params])
    for value, grad, *found in zip(values, grads, *results, strict=True):
        exact = [
            value.contiguous().clone(),
            torch.zeros_like(value),
            torch.zeros_like(value),
            value.contiguous().clone(),
        ]
        adamw_ema_(exact[0], grad.contiguous(), *exact[1:], 0, **SETTINGS)
        for tensors in found:
            for mine, theirs in zip(tensors, exact, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def _same_strides(x: Tensor) -> Tensor:
    """A copy in a storage of its own."""
    whole = torch.empty(x.untyped_storage().nbytes() // x.element_size(), device=x.device)
    return whole.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)


def test_tensors_that_begin_anywhere() -> None:
    flat = torch.randn(1000, device=DEVICE)
    grads = torch.randn(1000, device=DEVICE)
    _compare_with_definition([flat[1:302], flat[303:500]], [grads[3:304], grads[500:697]])


def test_layouts() -> None:
    tall, other, grad = (torch.randn(20, 30, device=DEVICE) for _ in range(3))
    _compare_with_definition([tall.t(), other], [grad.t(), torch.randn(30, 20, device=DEVICE).t()])
    _compare_with_definition([tall.t()], [torch.randn(30, 20, device=DEVICE)])
    images = torch.randn(2, 3, 4, 5, device=DEVICE)
    _compare_with_definition([images.to(memory_format=torch.channels_last)], [images])


def test_gaps_in_memory() -> None:
    wide, grad = torch.randn(20, 30, device=DEVICE), torch.randn(20, 7, device=DEVICE)
    _compare_with_definition([wide[:, :7], torch.randn(5, device=DEVICE)], [grad, torch.randn(5, device=DEVICE)])


def test_double_precision_takes_the_reference() -> None:
    param = _parameter(torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    with use("triton"), record() as launches:
        AdamWEMA([param]).step()
    assert not launches and bool((param < 1).all())


def test_a_learning_rate_on_the_device_is_read_there() -> None:
    rate = torch.tensor(0.0, device=DEVICE)
    param = _parameter(torch.ones(5, device=DEVICE), torch.ones(5, device=DEVICE))
    optimizer = AdamWEMA([param], lr=rate, weight_decay=0.0)
    with use("triton"):
        optimizer.step()
        assert torch.equal(param.detach(), torch.ones_like(param))
        rate.fill_(0.25)
        optimizer.step()
        with record() as launches:
            optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full_like(param, 0.75))
    assert any(argument is rate for argument in launches[0].args)
    assert not any(isinstance(x, float) and x == 0.25 for launch in launches for x in launch.args)


def test_states_pass_between_the_implementations() -> None:
    """What the kernels leave, the reference continues, and the other way round."""
    results = []
    for modes in (("triton", "reference"), ("reference", "triton"), ("reference", "reference")):
        params = _parameters()
        optimizer = AdamWEMA(params, **SETTINGS)
        for step, mode in enumerate(modes * 2):
            _give_gradients(params, step)
            with use(mode):
                optimizer.step()
        results.append([param.detach() for param in params])
    for mixed in results[:2]:
        for mine, theirs in zip(mixed, results[2], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_the_default_configuration() -> None:
    with UPDATE.override(UPDATE.default(narrow=False)):
        prove(lambda *tensors: _step(*tensors, done=3.0), _inputs(9001))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_captured_step_replays_as_a_new_one() -> None:
    runs = []
    for captured in (False, True):
        torch.manual_seed(0)
        params = [_parameter(torch.randn(n, device=DEVICE), torch.zeros(n, device=DEVICE)) for n in (1000, 37)]
        rate = torch.tensor(1e-3, device=DEVICE)
        optimizer = AdamWEMA(params, lr=rate, max_norm=1.0, skip_nonfinite=True)
        optimizer.step()
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
        for step in range(5):
            rate.fill_(1e-3 * (step + 1))
            for param in params:
                assert param.grad is not None
                param.grad.normal_().add_(float("nan") if step == 2 else 0.0)
            graph.replay() if captured else optimizer.step()
        runs.append([param.detach() for param in params] + [optimizer.skipped, optimizer.state[params[0]]["step"]])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert int(runs[0][2]) == 1


def test_each_stream_has_tables_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, kept, built = torch.device("cpu"), Uploads(), []

    def table(stream: int, capturing: bool = False, key: str = "key") -> Tensor:
        monkeypatch.setattr(uploads, "_stream", lambda device: (stream, capturing))
        return kept.get(key, cpu, lambda: built.append(stream) or torch.ones(1))  # type: ignore[func-returns-value]

    first, second = table(1), table(2)
    assert built == [1, 2] and first is not second
    assert table(1) is first and table(2) is second
    # A capture has a stream of its own, and takes what the step before it used.
    assert table(3, capturing=True) is second and built == [1, 2]
    table(3, capturing=True, key="other")
    table(3, key="other")
    assert built == [1, 2, 3, 3], "only replays fill a table made in a capture"


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_steps_on_two_streams() -> None:
    """The second step doesn't wait for the first, whose tables are uploaded late, and shares their content."""
    params = [_parameter(torch.ones(1000, device=DEVICE), torch.ones(1000, device=DEVICE)) for _ in range(2)]
    optimizer = AdamWEMA([{"params": params[:1]}, {"params": params[1:]}])
    grads = [param.grad for param in params]
    streams = [torch.cuda.Stream() for _ in params]
    torch.cuda.synchronize()
    for index, stream in enumerate(streams):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad if param is params[index] else None
        with torch.cuda.stream(stream), use("triton"):
            if index == 0:
                torch.cuda._sleep(200_000_000)
            optimizer.step()
    torch.cuda.synchronize()
    assert torch.equal(*params) and bool((params[0] < 1).all())
