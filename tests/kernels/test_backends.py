"""Attention by every library that runs here: against float64, PyTorch alone, and each sequence by itself."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_choices import forget
from mpdit_kernels import dispatch, use
from mpdit_kernels.backends import BACKENDS, Call, attention, attention_varlen, choose, libraries, probe, use_attention
from mpdit_kernels.short_attn import reference
from proof import DEVICE, FLOOR, NIGHT
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

CPU = torch.device("cpu")
HERE = torch.empty(0, device=DEVICE).device
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ON_CPU = ("sdpa_flash", "sdpa_math")


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    forget()
    yield
    forget()
    dispatch.set_tuned_table("attention_cpu", None)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype).requires_grad_()


def run(out: Tensor, qkv: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    return out.detach(), torch.autograd.grad(out, qkv, gradient.to(out.dtype))[0]


def available(call: Call) -> list[str]:
    """Of all names those that serve a call; our kernel only where its interpreter doesn't take long."""
    names = [name for name in BACKENDS if name != "triton" or call.device.type == "cuda" or _quick(call)]
    return [name for name in names if probe.refusal(name, replace(call, kernels="triton")) is None]


def _quick(call: Call) -> bool:
    return call.tokens <= 20 and call.dtype == torch.float32


# The backends against float64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "query_start", "head_dim"), [(1, 0, 32), (17, 3, 72), (80, 16, 64), (81, 0, 48)])
def test_every_backend_that_runs_here_is_as_exact_as_the_reference(
    tokens: int, query_start: int, head_dim: int, dtype: torch.dtype
) -> None:
    asked = Call(tokens, head_dim, dtype, HERE, query_start)
    names = available(asked)
    assert set(names) >= ({"sdpa_math"} if DEVICE == "cuda" else set(ON_CPU))
    assert "triton" in names or DEVICE == "cuda" or not _quick(asked)
    qkv = leaf(2, tokens, 3, 3, head_dim, dtype=dtype)
    gradient = torch.randn(2, tokens - query_start, 3, head_dim, device=DEVICE)
    exact = qkv.detach().double().requires_grad_()
    for scale in (None, 0.3):
        number = head_dim**-0.5 if scale is None else scale
        truth = run(reference.attention(exact, number, query_start), exact, gradient.to(dtype).double())
        usual = run(reference.attention(qkv, number, query_start), qkv, gradient)
        for name in names:
            out = attention(qkv, scale, query_start, backend=name)
            assert (out.shape, out.dtype) == (gradient.shape, dtype)
            _judge(name, run(out, qkv, gradient), usual, truth)


def _judge(name: str, mine: tuple[Tensor, ...], usual: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> None:
    """Output, and the gradients of queries, keys and values apart. Of a lone key the scores get none, but roundings."""
    parts = [(x[0], *x[1].unbind(-3)) for x in (mine, usual, truth)]
    for what, (ours, theirs, exact) in zip("oqkv", zip(*parts, strict=True), strict=True):
        size = max(float(exact.norm()), 0.5 * float(truth[1].norm()))
        error, theirs_error = (float((x.double() - exact).norm()) / size for x in (ours, theirs))
        wide = ours.dtype in (torch.float32, torch.float64)  # float64 is no exact judge of itself; GPUs emulate fp32
        roundings = FLOOR * (4 if wide else 1)
        allowed = 2 * theirs_error + roundings * torch.finfo(ours.dtype).eps
        assert error <= allowed, f"{name}, {what}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.skipif(DEVICE == "cuda", reason="what the model computes on a CPU")
@pytest.mark.parametrize("query_start", [0, 16])
def test_fp32_on_a_cpu_is_pytorchs_own_choice_bit_for_bit(query_start: int) -> None:
    flat = torch.randn(3, 80, 3 * 2 * 48).requires_grad_()
    q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in flat.chunk(3, dim=-1))
    gradient = torch.randn(3, 80 - query_start, 2, 48)
    usual = run(scaled_dot_product_attention(q[:, :, query_start:], k, v).transpose(1, 2), flat, gradient)
    ours = run(attention(flat.unflatten(-1, (3, 2, 48)), query_start=query_start), flat, gradient)
    assert all(torch.equal(a, b) for a, b in zip(ours, usual, strict=True))


def test_queries_before_the_first_get_a_gradient_of_zero() -> None:
    qkv = leaf(2, 9, 3, 2, 32)
    (gradient,) = torch.autograd.grad(attention(qkv, query_start=4).square().sum(), qkv)
    assert not gradient[:, :4, 0].any() and gradient[:, 4:, 0].all() and gradient[:, :, 1:].all()


def test_strides() -> None:
    for name in available(Call(9, 32, torch.float32, HERE)):
        for qkv in (
            leaf(9, 3, 2, 2, 32).permute(3, 0, 1, 2, 4),  # sequences innermost but one
            leaf(2, 9, 3, 2, 65)[..., 1::2],  # columns apart, and an odd start
            leaf(2, 9, 2, 3, 32).transpose(2, 3),  # heads before queries, keys and values
            leaf(1, 9, 3, 2, 32).expand(2, -1, -1, -1, -1),
        ):
            dense = qkv.detach().clone(memory_format=torch.contiguous_format)
            assert torch.allclose(attention(qkv, backend=name), attention(dense, backend=name), atol=1e-6)


def test_nothing_to_do() -> None:
    for qkv, out in ((leaf(0, 9, 3, 2, 32), attention), (leaf(0, 3, 2, 32), lambda x: attention_varlen(x, (0,)))):
        result = out(qkv)
        assert result.shape == (*qkv.shape[:-3], 2, 32)
        assert torch.autograd.grad(result.sum(), qkv)[0].shape == qkv.shape


def test_autocast_is_heeded() -> None:
    with torch.autocast(DEVICE, torch.bfloat16):
        assert attention(leaf(1, 9, 3, 2, 32)).dtype == torch.bfloat16
        assert attention_varlen(leaf(9, 3, 2, 32), (0, 4, 9)).dtype == torch.bfloat16
        assert attention(leaf(1, 9, 3, 2, 32, dtype=torch.float64)).dtype == torch.float64


# Several lengths


LENGTHS = [(5, 17, 17, 5, 9, 5), (12, 12, 12), (7,), (33, 4, 21)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("query_start", [pytest.param(0, marks=NIGHT), 3])
def test_packed_sequences_are_each_alone(lengths: tuple[int, ...], query_start: int) -> None:
    offsets = (0, *itertools.accumulate(lengths))
    qkv = leaf(offsets[-1], 3, 2, 32)
    for name in ("auto", *available(Call(max(lengths), 32, torch.float32, HERE, query_start))):
        alone = [attention(x[None], 0.2, query_start, backend=name)[0] for x in qkv.split(list(lengths))]
        together = attention_varlen(qkv, offsets, 0.2, query_start, backend=name)
        gradient = torch.randn_like(together)
        ours, expected = run(together, qkv, gradient), run(torch.cat(alone), qkv, gradient)
        assert all(torch.allclose(a, b, atol=2e-6) for a, b in zip(ours, expected, strict=True)), name


def test_cumulative_lengths_may_be_a_tensor() -> None:
    qkv = leaf(9, 3, 2, 32)
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32, device=DEVICE)
    assert torch.equal(attention_varlen(qkv, offsets), attention_varlen(qkv, [0, 4, 9]))


def _watch(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[tuple[str, int, int]]:
    """Have calls of these backends noted as (name, batch, tokens)."""
    seen: list[tuple[str, int, int]] = []

    def watched(name: str) -> Any:
        run = BACKENDS[name].run

        def noting(qkv: Tensor, *rest: Any) -> Tensor:
            seen.append((name, *qkv.shape[:2]))
            return run(qkv, *rest)

        return replace(BACKENDS[name], run=noting)

    for name in names:
        monkeypatch.setitem(BACKENDS, name, watched(name))
    return seen


def _table(*rows: tuple[int, str, dict[str, float], dict[str, float]]) -> dict[str, Any]:
    """A measured table of rows (tokens, dtype, forward, training) for heads of 32, in seconds by backend."""
    found: list[dict[str, Any]] = []
    for tokens, dtype, *kinds in rows:
        times = ({name: [x, x, x] for name, x in kind.items()} for kind in kinds)
        shape = {"tokens": tokens, "head_dim": 32, "dtype": dtype, "batch": 4, "heads": 2}
        found.append(shape | dict(zip(("forward", "training"), times, strict=True)))
    return {"rows": found}


def test_each_length_takes_what_is_fastest_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    flash, math = {"sdpa_flash": 1.0, "sdpa_math": 2.0}, {"sdpa_flash": 2.0, "sdpa_math": 1.0}
    dispatch.set_tuned_table("attention_cpu", _table((8, "bfloat16", flash, math), (40, "bfloat16", flash, flash)))
    qkv = torch.randn(8 + 8 + 40 + 8, 3, 2, 32, dtype=torch.bfloat16).requires_grad_()
    seen = _watch(monkeypatch, *ON_CPU)
    forget()
    attention_varlen(qkv, (0, 8, 16, 56, 64))
    attention_varlen(qkv.detach(), (0, 8, 16, 56, 64))
    calls = [call for call in seen if call[1] != 2]  # probes take two
    assert calls[:2] == [("sdpa_math", 3, 8), ("sdpa_flash", 1, 40)]
    assert calls[2:] == [("sdpa_flash", 3, 8), ("sdpa_flash", 1, 40)]


# What is chosen


def test_what_is_asked_for_nearest_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = torch.randn(1, 9, 3, 2, 32)
    attention(qkv), attention(qkv, backend="sdpa_math")  # probed
    seen = _watch(monkeypatch, *ON_CPU)
    monkeypatch.setattr(choose, "_environment", "sdpa_math")
    forget()
    attention(qkv)
    with use_attention("sdpa_flash"):
        attention(qkv)
        attention(qkv, backend="sdpa_math")
        with use_attention("auto"):
            attention(qkv)
        assert choose.attention_mode() == "sdpa_flash"
    assert choose.attention_mode() == "sdpa_math"
    chosen = [name for name, batch, _ in seen if batch == 1]
    assert chosen == ["sdpa_math", "sdpa_flash", "sdpa_math", "sdpa_flash"]


def test_the_modes_of_our_own_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call(80, 64, torch.float32, CPU)
    assert choose.choice("auto", True, call) == "sdpa_flash"
    assert choose.choice("auto", True, replace(call, kernels="reference")) == "sdpa_flash"
    if DEVICE == "cpu":
        assert choose.choice("auto", True, replace(call, kernels="triton")) == "triton"
        with use("triton"):
            assert choose.choose(80, *choose.context(torch.zeros(1, 80, 3, 1, 64), 0, "auto", False)) == "triton"
    with use("reference"):
        assert choose.choose(80, *choose.context(torch.zeros(1, 80, 3, 1, 64), 0, "auto", False)) == "sdpa_flash"


def test_the_nearest_measured_shape_decides() -> None:
    fast, slow = {"sdpa_math": 1.0, "sdpa_flash": 2.0}, {"sdpa_math": 2.0, "sdpa_flash": 1.0}
    dispatch.set_tuned_table("attention_cpu", _table((80, "bfloat16", slow, fast), (272, "bfloat16", slow, slow)))
    call = Call(80, 32, torch.bfloat16, CPU)
    for tokens, head_dim, expected in ((80, 32, "math"), (100, 48, "math"), (40, 64, "math"), (200, 32, "flash"),
                                       (39, 32, "flash"), (80, 65, "flash"), (600, 32, "flash")):  # fmt: skip
        there = replace(call, tokens=tokens, head_dim=head_dim)
        assert choose.choice("auto", True, there) == f"sdpa_{expected}", there
        assert choose.choice("auto", False, there) == "sdpa_flash"
    assert choose.choice("auto", True, replace(call, dtype=torch.float32)) == "sdpa_flash"


def test_on_a_cpu_a_small_gain_moves_nothing_and_in_fp32_none_does() -> None:
    for dtype, gain, expected in (("bfloat16", 1.25, "flash"), ("bfloat16", 1.35, "math"), ("float32", 9.0, "flash")):
        times = {"sdpa_math": 1.0, "sdpa_flash": gain}
        dispatch.set_tuned_table("attention_cpu", _table((80, dtype, times, times)))
        forget()
        assert choose.choice("auto", True, Call(80, 32, getattr(torch, dtype), CPU)) == f"sdpa_{expected}"


def test_batches_measured_at_one_shape_are_added_up() -> None:
    rows = [(80, "float32", {}, {"sdpa_math": 1.0, "sdpa_flash": 3.0, "xformers": 0.1}),
            (80, "float32", {}, {"sdpa_math": 5.0, "sdpa_flash": 1.0})]  # fmt: skip
    dispatch.set_tuned_table("attention_cpu", _table(*rows))
    call = Call(80, 32, torch.float32, CPU)
    assert choose.seconds(call, "training") == {"sdpa_math": 6.0, "sdpa_flash": 4.0}
    assert choose.seconds(call, "forward") == {}


def test_what_ties_is_in_the_tables_order_in_every_process() -> None:
    names = ["b", "d", "a", "f", "c", "e", "g"]
    for order in (names, names[::-1]):
        dispatch.set_tuned_table("attention_cpu", _table((80, "float32", {}, dict.fromkeys(order, 1.0))))
        assert list(choose.seconds(Call(80, 32, torch.float32, CPU), "training")) == order


def test_committed_tables() -> None:
    for file in dispatch.TUNED.glob("attention_*.json"):
        table = dispatch.tuned_table(file.stem)
        assert table["machine"]["torch"] and table["machine"]["date"] and table["rows"], file
        for row in table["rows"]:
            assert set(row["forward"]) | set(row["training"]) | set(row["refused"]) <= set(BACKENDS)
            assert all(0 < low <= median <= high for median, low, high in row["training"].values())


def test_hopper_prefers_cudnn_and_older_gpus_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call(1040, 72, torch.bfloat16, torch.device("cuda", 0))
    for capability, better, worse in (((9, 0), "sdpa_cudnn", "sdpa_flash"), ((8, 0), "sdpa_flash", "sdpa_cudnn")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, found=capability: found)
        names = libraries.default_order(call)
        assert names.index(better) < names.index(worse) and sorted(names) == sorted(BACKENDS)
        assert call.architecture == f"sm_{capability[0]}{capability[1]}"


def test_determinism_is_refused_by_those_that_cannot_promise_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    call = Call(1040, 72, torch.bfloat16, torch.device("cuda", 0), deterministic=True)
    for name in ("sdpa_flash", "sdpa_efficient", "xformers"):
        assert "use_deterministic_algorithms" in str(BACKENDS[name].unfit(call)), name
    for name in ("sdpa_flash", "sdpa_efficient"):
        assert BACKENDS[name].unfit(replace(call, strict=True)) is None
    for strict in (False, True):
        assert "deterministic" in str(BACKENDS["sdpa_cudnn"].unfit(replace(call, strict=strict)))
    assert BACKENDS["sdpa_math"].unfit(call) is None
    for name in ON_CPU:
        assert BACKENDS[name].unfit(Call(80, 72, torch.bfloat16, CPU, deterministic=True)) is None


def test_determinism_is_torchs_unless_said(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = torch.randn(1, 9, 3, 2, 32).requires_grad_()
    asked: list[bool] = []
    run = BACKENDS["sdpa_math"].run
    noting = replace(BACKENDS["sdpa_math"], run=lambda *a: asked.append(a[-1]) or run(*a))  # type: ignore[func-returns-value]
    monkeypatch.setitem(BACKENDS, "sdpa_math", noting)
    before = torch.are_deterministic_algorithms_enabled()
    try:
        for mode, said in ((False, None), (True, None), (True, False), (False, True)):
            torch.use_deterministic_algorithms(mode)
            attention(qkv, backend="sdpa_math", deterministic=said)
            assert asked[-1] is (mode if said is None else said)
    finally:
        torch.use_deterministic_algorithms(before)


# The probe


def _broken(name: str, how: Any) -> Any:
    """A backend whose gradient is changed by `how`."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, qkv: Tensor) -> Tensor:
            return qkv.view_as(qkv)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return how(gradient.clone())

    run = BACKENDS[name].run
    return replace(BACKENDS[name], run=lambda qkv, *rest: run(Wrong.apply(qkv), *rest))


def _spoil(place: Any, value: float) -> Any:
    def how(gradient: Tensor) -> Tensor:
        gradient[place] = value
        return gradient

    return how


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda g: 1.5 * g, "wrong query gradient: a token's relative error is 0.5"),
        (
            _spoil((1, 79, 2), 0.0),
            "wrong value gradient: a token's relative error is 1, allowed",
        ),  # the very last token
        (_spoil((0, 40, 1, 1, 5), float("nan")), "wrong key gradient: a token's relative error is nan"),
        (lambda g: g[:, :3], "the probe failed: RuntimeError: .*shape"),
    ],
)
def test_a_wrong_gradient_is_a_refusal(monkeypatch: pytest.MonkeyPatch, how: Any, reason: str, caplog: Any) -> None:
    monkeypatch.setitem(BACKENDS, "sdpa_flash", _broken("sdpa_flash", how))
    qkv = torch.randn(1, 80, 3, 2, 32).requires_grad_()
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match=f"backend is 'sdpa_flash', which is refused: {reason}"):
            attention(qkv.to(dtype), backend="sdpa_flash")
    with caplog.at_level(logging.WARNING, logger="mpdit_kernels"):
        for batch in (1, 2):
            attention(qkv.expand(batch, -1, -1, -1, -1))
    (record,) = caplog.records
    assert record.getMessage().startswith("attention does without sdpa_flash at 80 tokens, head dim 32, float32, cpu: ")


def test_scores_beyond_what_fp32_can_exponentiate_are_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    def naive(qkv: Tensor, scale: float, query_start: int, deterministic: bool) -> Tensor:
        q, k, v = qkv.unbind(2)
        weights = (scale * torch.einsum("bqhd,bkhd->bhqk", q, k)).exp()
        return torch.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdim=True), v)

    monkeypatch.setitem(BACKENDS, "sdpa_flash", replace(BACKENDS["sdpa_flash"], run=naive))
    assert "relative error is nan" in str(probe.refusal("sdpa_flash", Call(80, 64, torch.float32, CPU)))


def test_the_probe_runs_once_for_each_class(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _watch(monkeypatch, "sdpa_math")
    for batch, heads in ((1, 1), (3, 2), (1, 1)):
        attention(torch.randn(batch, 9, 3, heads, 32), backend="sdpa_math")
    assert len(seen) == 4
    attention(torch.randn(1, 9, 3, 1, 32), query_start=2, backend="sdpa_math")
    assert len(seen) == 6


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "autocast", "fake"])
def test_the_probe_neither_feels_nor_changes_the_callers_modes(mode: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    around: Any = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "fake": FakeTensorMode,
    }[mode]()
    state = torch.get_rng_state()
    with around:
        dtype = torch.bfloat16 if mode == "autocast" else torch.float32
        qkv = torch.zeros(1, 80, 3, 2, 32, dtype=dtype)
        assert attention(qkv).shape == (1, 80, 2, 32)
        assert torch.is_grad_enabled() == (mode in ("autocast", "fake"))
        assert torch.is_inference_mode_enabled() == (mode == "inference_mode")
        assert torch.is_autocast_enabled("cpu") == (mode == "autocast")
    assert torch.equal(torch.get_rng_state(), state)
    names = {backend: name for name, backend in BACKENDS.items()}
    probed = {names[backend]: found for (backend, _), found in probe._probed.items()}
    assert probed == {"sdpa_flash": None} or (mode == "autocast" and probed["sdpa_math"] is None)


def test_no_probe_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = torch.randn(1, 9, 3, 2, 32)
    attention(qkv, backend="sdpa_flash")
    monkeypatch.setattr(probe, "capturing", lambda call: True)
    attention(qkv, backend="sdpa_flash"), attention(qkv)
    for arguments in ({"query_start": 1}, {"backend": "sdpa_math"}):
        with pytest.raises(ValueError, match=r"was not probed yet for 9 tokens.*run the same call once before"):
            attention(qkv, **arguments)
    with pytest.raises(ValueError, match=r"refused: for CUDA tensors only.*; available for 9 tokens.*: sdpa_flash$"):
        attention(qkv, backend="xformers")


# Compilers, imports, mistakes


@pytest.mark.skipif(DEVICE == "cuda", reason="its backends are proved on the CPU")
@pytest.mark.parametrize(
    ("dynamic", "shapes"), [(None, 1), *(pytest.param(dynamic, 2, marks=NIGHT) for dynamic in (None, True))]
)
def test_compiles_without_a_break(dynamic: bool | None, shapes: int) -> None:
    torch._dynamo.reset()

    def dense(qkv: Tensor) -> Tensor:
        return 2 * attention(qkv, query_start=3)

    def varlen(qkv: Tensor, offsets: tuple[int, ...]) -> Tensor:
        return 2 * attention_varlen(qkv, offsets, query_start=3)

    compiled = [torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic) for f in (dense, varlen)]
    cases = [(0, dense, leaf(2, 17, 3, 2, 24)), (0, dense, leaf(3, 21, 3, 2, 24))][:shapes]
    cases += [(1, varlen, leaf(40, 3, 2, 24), offsets) for offsets in ((0, 9, 18, 25, 40), (0, 12, 40))[:shapes]]
    for which, function, *arguments in cases:
        results = [
            run(f(*arguments), arguments[0], torch.ones_like(function(*arguments))) for f in (compiled[which], function)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(DEVICE == "cuda", reason="its backends are proved on the CPU")
def test_our_kernel_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    qkv = leaf(1, 17, 3, 1, 32)
    with use("triton"):
        out = torch.compile(lambda x: attention(x, query_start=3), fullgraph=True, backend="aot_eager")(qkv)
        assert torch.equal(out, attention(qkv, query_start=3, backend="triton"))


def test_another_backend_is_another_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    seen: list[str] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(str(graph.graph))
        return graph.forward

    function = torch.compile(lambda qkv: attention(qkv), fullgraph=True, backend=keep)
    qkv = leaf(1, 9, 3, 2, 32)
    for name in ("sdpa_flash", "sdpa_math"):
        with use_attention(name):
            assert torch.equal(function(qkv), attention(qkv))
    assert len(seen) == 2


FRESH = """
import sys, torch
from mpdit_kernels import AdamWEMA
from mpdit_kernels.backends import attention, use_attention
AdamWEMA([torch.ones(1, requires_grad=True)]).step()
qkv = torch.zeros(1, 9, 3, 2, 32)
with use_attention("auto"):
    attention(qkv)
others = ("triton", "flash_attn", "xformers", "mpdit", "deepspeed", "torch._dynamo", "sympy")
print([name for name in others if name in sys.modules])
try:
    attention(qkv)
except ValueError as error:
    print(error)
"""


def test_the_environment_is_read_and_the_kernels_need_torch_alone_until_another_library_may_serve() -> None:
    environment = os.environ | {"MPDIT_ATTENTION": "xformers", "TRITON_INTERPRET": "0"}
    imported, error = subprocess.check_output([sys.executable, "-c", FRESH], env=environment, text=True).splitlines()
    assert imported == "[]"
    assert error == (
        "MPDIT_ATTENTION is 'xformers', which is refused: for CUDA tensors only, and these are on cpu; "
        "available for 9 tokens, head dim 32, float32, cpu: sdpa_flash, sdpa_math"
    )


def test_the_environment_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "_environment", "flosh")
    with pytest.raises(ValueError, match="MPDIT_ATTENTION is 'flosh': choose auto or one of triton, "):
        attention(torch.zeros(1, 9, 3, 2, 32))


QKV = torch.zeros(2, 5, 3, 2, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": None}, "qkv is None: expected a tensor"),
        ({"qkv": QKV[0]}, r"qkv has shape \[5, 3, 2, 8\]: expected \[B, T, 3, H, d\]"),
        ({"qkv": QKV[:, :, :2]}, r"qkv is of shape \[2, 5, 2, 2, 8\]: expected 3 in front of"),
        ({"qkv": QKV[..., :0]}, "at least one column"),
        ({"qkv": QKV[:, :, :, :0]}, "at least one head"),
        ({"qkv": QKV[:, :0]}, r"qkv is of shape .*: expected at least one token"),
        ({"qkv": QKV.long()}, "qkv has dtype torch.int64: expected a floating-point type"),
        ({"query_start": 5}, "query_start is 5: expected"),
        ({"query_start": -1}, "query_start is -1: expected"),
        ({"query_start": 1.0}, "query_start is 1.0: expected a whole number"),
        ({"scale": 0.0}, "scale is 0.0: expected a finite number above 0"),
        ({"scale": float("inf")}, "scale is inf: expected"),
        ({"scale": "1"}, "scale is 1: expected"),
        ({"deterministic": "yes"}, "deterministic is 'yes': expected True, False or None"),
        (
            {"backend": "flash"},
            "backend is 'flash': choose auto or one of triton, .*; available for 5 tokens, .*: sdpa_",
        ),
        ({"backend": None}, "backend is None: choose auto or one of"),
    ],
)
def test_bad_arguments_are_one_error(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(**{"qkv": QKV, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": QKV}, r"expected \[N, 3, H, d\]"),
        ({"cu_seqlens": (0, 4)}, "expected cumulative lengths, rising from 0 to the 10 rows there are"),
        ({"cu_seqlens": (0, 4, 4, 10)}, "expected cumulative lengths, rising"),
        ({"cu_seqlens": (0, 4.0, 10)}, "expected whole numbers"),
        ({"query_start": 4}, "query_start is 4: expected"),
        ({"backend": "flash"}, "backend is 'flash': choose auto or one of"),
    ],
)
def test_bad_arguments_with_several_lengths(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_varlen(**{"qkv": QKV.flatten(0, 1), "cu_seqlens": (0, 4, 10), **change})


def test_use_attention_names_the_choices() -> None:
    with pytest.raises(ValueError, match=r"use_attention's backend is 'math': choose auto or one of triton, "):
        use_attention("math").__enter__()


def test_threads_leave_the_processs_switches_as_they_were() -> None:
    qkv = torch.randn(2, 20, 3, 2, 32)
    interval = sys.getswitchinterval()

    def work(name: str) -> None:
        for _ in range(300):
            attention(qkv, backend=name)

    switches = [enabled for enabled, _ in libraries.SWITCHES.values()]
    before = [enabled() for enabled in switches], dispatch.mode()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, ["sdpa_math", "sdpa_flash", "sdpa_math", "sdpa_flash"]))
    finally:
        sys.setswitchinterval(interval)
    assert ([enabled() for enabled in switches], dispatch.mode()) == before


def test_no_tokens_and_no_name_are_named() -> None:
    with pytest.raises(ValueError, match=r"qkv is of shape \[2, 0, 3, 1, 8\]: expected at least one token"):
        attention(torch.zeros(2, 0, 3, 1, 8))
    with pytest.raises(ValueError, match=r"backend is \['a'\]: choose auto or one of triton"):
        attention(torch.zeros(2, 4, 3, 1, 8), backend=["a"])  # type: ignore[arg-type]
