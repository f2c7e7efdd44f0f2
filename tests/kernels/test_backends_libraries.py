"""The adapters of libraries that need a GPU, on stand-ins with their documented signatures that compute on the CPU."""

from __future__ import annotations

import builtins
import itertools
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from attention_choices import forget
from mpdit_kernels import dispatch
from mpdit_kernels.backends import BACKENDS, Call, attention, attention_varlen, choose, probe
from torch import Tensor

CPU = torch.device("cpu")
LIBRARIES = ("flash_attn", "flash_attn_cute", "xformers")
WAYS = [("flash_attn", False), ("flash_attn", True), ("flash_attn_cute", False), ("flash_attn_cute", True),
        ("xformers", False)]  # fmt: skip
"""Each with and without determinism, if it has it."""

calls: list[tuple[str, dict[str, Any]]] = []
"""What the stand-ins were asked: their function, and the arguments that say how."""


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[B, T, H, d] each."""
    assert q.ndim == k.ndim == v.ndim == 4 and k.shape == v.shape and q.shape[-2:] == k.shape[-2:]
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16 and all(x.stride(-1) == 1 for x in (q, k, v))
    wide = (x.float().transpose(1, 2) for x in (q, k, v))
    q, k, v = wide
    return ((scale * q @ k.transpose(2, 3)).softmax(-1) @ v).transpose(1, 2).bfloat16()


def _attend_packed(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """[N, H, d] each, by int32 cumulative lengths."""
    assert queries.dtype == keys.dtype == torch.int32 and queries.ndim == keys.ndim == 1
    ends = [x.tolist() for x in (queries, keys)]
    assert ends[0][-1] == q.shape[0] and ends[1][-1] == k.shape[0] == v.shape[0]
    parts = [(slice(*a), slice(*b)) for a, b in zip(*map(itertools.pairwise, ends), strict=True)]
    return torch.cat([_attend(q[None, a], k[None, b], v[None, b], scale)[0] for a, b in parts])


def _longest(offsets: Tensor) -> int:
    return int(offsets.diff().max())


def _plain(function: str, **options: Any) -> None:
    """Note a call; nothing but scale and determinism may be asked for."""
    scale, deterministic = options.pop("softmax_scale"), options.pop("deterministic", None)
    assert isinstance(scale, float) and not any(value for value in options.values()), options
    calls.append((function, {"scale": scale, "deterministic": deterministic}))


# The stand-ins have flash-attn 2.8's, flash-attn-4's and xformers 0.0.35's parameters in their order.


def flash_attn_qkvpacked_func(
    qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    assert window_size == (-1, -1) and qkv.shape[2] == 3
    _plain("qkvpacked", softmax_scale=softmax_scale, deterministic=deterministic, dropout=dropout_p, causal=causal,
           cap=softcap, slopes=alibi_slopes, probabilities=return_attn_probs)  # fmt: skip
    return _attend(*qkv.unbind(2), softmax_scale)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    assert window_size == (-1, -1)
    _plain("dense", softmax_scale=softmax_scale, deterministic=deterministic, dropout=dropout_p, causal=causal,
           cap=softcap, slopes=alibi_slopes, probabilities=return_attn_probs)  # fmt: skip
    return _attend(q, k, v, softmax_scale)


def flash_attn_varlen_qkvpacked_func(
    qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    assert window_size == (-1, -1) and qkv.shape[1] == 3 and max_seqlen == _longest(cu_seqlens)
    _plain("varlen_qkvpacked", softmax_scale=softmax_scale, deterministic=deterministic, dropout=dropout_p,
           causal=causal, cap=softcap, slopes=alibi_slopes, probabilities=return_attn_probs)  # fmt: skip
    return _attend_packed(*qkv.unbind(1), cu_seqlens, cu_seqlens, softmax_scale)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    assert window_size == (-1, -1) and max_seqlen_q == _longest(cu_seqlens_q) and max_seqlen_k == _longest(cu_seqlens_k)
    _plain("varlen", softmax_scale=softmax_scale, deterministic=deterministic, dropout=dropout_p, causal=causal,
           cap=softcap, slopes=alibi_slopes, probabilities=return_attn_probs, table=block_table)  # fmt: skip
    return _attend_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)


def cute_func(
    q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
    learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
):  # fmt: skip
    assert window_size == (None, None) and num_splits == 1
    others = (qv, gather_kv_indices, learnable_sink, pack_gqa)
    _plain("cute", softmax_scale=softmax_scale, deterministic=deterministic, causal=causal, cap=softcap,
           others=any(x is not None for x in others))  # fmt: skip
    return _attend(q, k, v, softmax_scale), None


def cute_varlen_func(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
    seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
):  # fmt: skip
    assert window_size == (None, None) and num_splits == 1
    assert max_seqlen_q == _longest(cu_seqlens_q) and max_seqlen_k == _longest(cu_seqlens_k)
    others = (qv, min_seqlen_k, seqused_q, seqused_k, gather_kv_indices, page_table, learnable_sink, pack_gqa)
    _plain("cute_varlen", softmax_scale=softmax_scale, deterministic=deterministic, causal=causal, cap=softcap,
           others=any(x is not None for x in others))  # fmt: skip
    return _attend_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale), None


class BlockDiagonalMask:
    def __init__(self, queries: list[int], keys: list[int]) -> None:
        assert type(queries) is type(keys) is list and len(queries) == len(keys)
        self.ends = [torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32) for x in (queries, keys)]

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        assert device == CPU
        return cls(q_seqlen, kv_seqlen)


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    _plain("xformers" if attn_bias is None else "xformers_varlen", softmax_scale=scale, p=p, op=op, dtype=output_dtype)
    if attn_bias is None:
        return _attend(query, key, value, scale)
    assert query.shape[0] == key.shape[0] == 1 and isinstance(attn_bias, BlockDiagonalMask)
    return _attend_packed(query[0], key[0], value[0], *attn_bias.ends, scale)[None]


def _module(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(contents)
    return module


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The libraries as modules, and adapters that take CPU tensors for those of a GPU of compute capability 9.0."""
    functions = (flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func)
    fmha = _module("xformers.ops.fmha", BlockDiagonalMask=BlockDiagonalMask)
    modules = [
        _module("flash_attn", __path__=[], **{function.__name__: function for function in functions}),
        _module("flash_attn.cute", __path__=[]),
        _module("flash_attn.cute.interface", flash_attn_func=cute_func, flash_attn_varlen_func=cute_varlen_func),
        _module("xformers", __path__=[]),
        _module("xformers.ops", __path__=[], memory_efficient_attention=memory_efficient_attention, fmha=fmha),
        fmha,
    ]
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for name in LIBRARIES:
        unfit = BACKENDS[name].unfit
        there = replace(
            BACKENDS[name], unfit=lambda call, unfit=unfit: unfit(replace(call, device=torch.device("cuda", 0)))
        )
        monkeypatch.setitem(BACKENDS, name, there)
    dispatch.set_tuned_table("attention_cpu", {})
    forget()
    calls.clear()
    yield {module.__name__: module for module in modules}
    dispatch.set_tuned_table("attention_cpu", None)
    forget()


def _inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16).requires_grad_()


def _close(mine: Tensor, other: Tensor, qkv: Tensor) -> None:
    """The same output and the same gradient, within bf16."""
    gradient = torch.randn_like(mine)
    found = [(out, *torch.autograd.grad(out, qkv, gradient)) for out in (mine, other)]
    for a, b in zip(*found, strict=True):
        assert a.shape == b.shape and (a - b).float().norm() <= 0.02 * b.float().norm()


@pytest.mark.parametrize(("name", "deterministic"), WAYS)
@pytest.mark.parametrize("query_start", [0, 5])
def test_dense(name: str, query_start: int, deterministic: bool) -> None:
    qkv = _inputs(2, 17, 3, 2, 32)
    out = attention(qkv, 0.2, query_start, backend=name, deterministic=deterministic)
    function = {"flash_attn": "dense" if query_start else "qkvpacked", "flash_attn_cute": "cute"}.get(name, name)
    said = None if name == "xformers" else deterministic
    assert calls[-1] == (function, {"scale": 0.2, "deterministic": said})
    _close(out, attention(qkv, 0.2, query_start, backend="sdpa_math"), qkv)


@pytest.mark.parametrize(("name", "deterministic"), WAYS)
@pytest.mark.parametrize("query_start", [0, 5])
def test_several_lengths_are_one_call(name: str, query_start: int, deterministic: bool) -> None:
    lengths = (9, 17, 9, 6)
    offsets = (0, *itertools.accumulate(lengths))
    qkv = _inputs(sum(lengths), 3, 2, 32)
    attention_varlen(qkv, offsets, 0.2, query_start, backend=name, deterministic=deterministic)  # probed
    calls.clear()
    out = attention_varlen(qkv, offsets, 0.2, query_start, backend=name, deterministic=deterministic)
    packed_call = {"flash_attn": "varlen" if query_start else "varlen_qkvpacked", "flash_attn_cute": "cute_varlen"}
    said = None if name == "xformers" else deterministic
    assert calls == [(packed_call.get(name, "xformers_varlen"), {"scale": 0.2, "deterministic": said})]
    alone = [attention(x[None], 0.2, query_start, backend="sdpa_math")[0] for x in qkv.split(lengths)]
    _close(out, torch.cat(alone), qkv)


@pytest.mark.parametrize("name", LIBRARIES)
def test_what_inference_mode_leaves_behind_serves_training(name: str) -> None:
    qkv = _inputs(26, 3, 2, 32)
    with torch.inference_mode():
        attention_varlen(qkv.detach(), (0, 9, 26), query_start=2, backend=name)
    attention_varlen(qkv, (0, 9, 26), query_start=2, backend=name).sum().backward()
    assert qkv.grad is not None and qkv.grad.any()


def test_one_length_is_a_batch() -> None:
    attention_varlen(_inputs(27, 3, 2, 32), (0, 9, 18, 27), backend="flash_attn")
    assert {function for function, _ in calls} == {"qkvpacked"}


def test_short_ones_by_one_library_and_long_ones_by_another() -> None:
    def times(**each: float) -> dict[str, list[float]]:
        return {name: [seconds] * 3 for name, seconds in each.items()}

    shape = {"head_dim": 32, "dtype": "bfloat16", "batch": 2, "heads": 2}
    short, long = times(sdpa_math=1.0, sdpa_flash=2.0, flash_attn=3.0), times(flash_attn_cute=2.0, flash_attn=1.0)
    rows = [{"tokens": tokens, "forward": found, "training": found} | shape
            for tokens, found in ((8, short), (40, long))]  # fmt: skip
    dispatch.set_tuned_table("attention_cpu", {"rows": rows})
    lengths = (40, 8, 24, 8, 8, 40)
    offsets = (0, *itertools.accumulate(lengths))
    qkv = _inputs(sum(lengths), 3, 2, 32)
    attention_varlen(qkv, offsets, query_start=3)
    calls.clear()
    out = attention_varlen(qkv, offsets, query_start=3)
    assert [function for function, _ in calls] == ["varlen"], "24 and 40 together, 8 by PyTorch"
    alone = [attention(x[None], None, 3, backend="sdpa_math")[0] for x in qkv.split(lengths)]
    _close(out, torch.cat(alone), qkv)


def test_without_a_right_call_for_several_lengths_each_goes_alone(
    installed: dict[str, ModuleType], caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(qkv, cu_seqlens, *rest, **options):
        return 1.5 * flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, *rest, **options)

    installed["flash_attn"].flash_attn_varlen_qkvpacked_func = wrong  # type: ignore[attr-defined]
    qkv = _inputs(26, 3, 2, 32)
    with caplog.at_level(logging.WARNING, logger="mpdit_kernels"):
        out = attention_varlen(qkv, (0, 9, 26), backend="flash_attn")
    _close(out, attention_varlen(qkv, (0, 9, 26), backend="sdpa_math"), qkv)
    (record,) = caplog.records
    assert "without flash_attn at sequences of up to 17 tokens" in record.getMessage()
    assert "in one call for several lengths, wrong output: a token's relative error is 0.5" in record.getMessage()


def test_auto_takes_the_first_that_runs(caplog: pytest.LogCaptureFixture) -> None:
    call = Call(17, 32, torch.bfloat16, CPU)
    with caplog.at_level(logging.INFO, logger="mpdit_kernels"):
        for name in ("flash_attn_cute", "flash_attn", "sdpa_flash"):
            assert choose.choice("auto", True, call) == name
            if name != "sdpa_flash":
                sys.modules["flash_attn.cute.interface" if name == "flash_attn_cute" else name] = None  # type: ignore[assignment]
            forget()
    texts = [record.getMessage() for record in caplog.records]
    assert any("without flash_attn: flash_attn is not installed" in text for text in texts)


@pytest.mark.parametrize(
    ("name", "module", "install"),
    [
        ("flash_attn", "flash_attn", "pip install --no-build-isolation 'mpdit[flash]' builds it"),
        ("flash_attn_cute", "flash_attn.cute.interface", "pip install 'mpdit[flash-cute]'"),
        ("xformers", "xformers.ops", "pip install 'mpdit[xformers]'"),
    ],
)
def test_not_installed(monkeypatch: pytest.MonkeyPatch, name: str, module: str, install: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    message = f"backend is '{name}', which is refused: {module} is not installed: {install}; available for 17 tokens"
    with pytest.raises(ValueError, match=re.escape(message)):
        attention(_inputs(2, 17, 3, 2, 32), backend=name)


def test_a_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__
    errors: dict[str, Exception] = {
        "flash_attn": OSError("flash_attn_2_cuda.so: undefined symbol: _ZN3c10"),
        "flash_attn.cute.interface": ModuleNotFoundError("No module named 'cutlass'", name="cutlass"),
    }

    def failing(name: str, *rest: Any) -> Any:
        if name in errors:
            raise errors[name]
        return real(name, *rest)

    monkeypatch.setattr("importlib.import_module", failing)
    call = Call(17, 32, torch.bfloat16, CPU)
    assert probe.refusal("flash_attn", call) == (
        "flash_attn does not import: OSError: flash_attn_2_cuda.so: undefined symbol: _ZN3c10"
    )
    assert probe.refusal("flash_attn_cute", call) == (
        "flash_attn.cute.interface does not import: ModuleNotFoundError: No module named 'cutlass'"
    )


def test_flash_attn_4_alone_is_not_flash_attn_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", _module("flash_attn", __path__=[]))
    call = Call(17, 32, torch.bfloat16, CPU)
    assert "flash_attn has no flash_attn_func: pip install" in str(probe.refusal("flash_attn", call))
    assert probe.refusal("flash_attn_cute", call) is None


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda qkv, **options: 1 / 0, "the probe failed: ZeroDivisionError: division by zero"),
        (lambda qkv, softmax_scale: qkv, "the probe failed: TypeError: .*unexpected keyword argument 'deterministic'"),
        (
            lambda qkv, **options: flash_attn_qkvpacked_func(qkv, **options | {"softmax_scale": 0.1}),
            "wrong output: a token's relative error is",
        ),
        (
            lambda qkv, **options: flash_attn_qkvpacked_func(
                torch.cat([qkv[:, :, :2], qkv[:, :, 2:].detach()], 2), **options
            ),
            "wrong value gradient: a token's relative error is 1, allowed 0.05",
        ),
    ],
)
def test_a_library_that_computes_wrong(installed: dict[str, ModuleType], wrong: Any, reason: str) -> None:
    installed["flash_attn"].flash_attn_qkvpacked_func = wrong  # type: ignore[attr-defined]
    qkv = _inputs(2, 17, 3, 2, 32)
    with pytest.raises(ValueError, match=f"backend is 'flash_attn', which is refused: {reason}"):
        attention(qkv, backend="flash_attn")
    attention(qkv, query_start=1, backend="flash_attn")  # another function of the library, and right


def test_what_needs_no_probe() -> None:
    call = Call(17, 32, torch.bfloat16, CPU)
    for name, change, reason in (
        ("flash_attn", {"dtype": torch.float32}, "takes only bfloat16 and float16"),
        ("flash_attn", {"head_dim": 264}, "takes head dims up to 256"),
        ("flash_attn_cute", {"dtype": torch.float64}, "takes only bfloat16 and float16"),
        ("xformers", {"dtype": torch.float64}, "takes only float32, bfloat16 and float16"),
        ("xformers", {"deterministic": True}, "repeats only under torch.use_deterministic_algorithms"),
    ):
        assert reason in str(probe.refusal(name, replace(call, **change))), (name, change)
    assert probe.refusal("xformers", replace(call, deterministic=True, strict=True)) is None
    assert not any(function == "cute" for function, _ in calls)


def test_what_a_gpu_is_too_old_or_too_new_for(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call(17, 32, torch.bfloat16, CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert probe.refusal("flash_attn_cute", call) == "needs compute capability 9.0, and this GPU has 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (12, 0))
    forget()
    assert probe.refusal("flash_attn_cute", call) is None
    assert "no deterministic backward" in str(probe.refusal("flash_attn_cute", replace(call, deterministic=True)))
