"""Attention over few tokens: its kernels against reference and float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from mpdit_kernels import attention, attention_varlen, use
from mpdit_kernels.short_attn import op, reference, short_attention, short_attention_varlen, triton_impl
from mpdit_kernels.short_attn.triton_impl import chunks, groups
from proof import DEVICE, DTYPES, NIGHT, _poisoned_memory, leaf, prove
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

CONFIGS = {
    "resident": (triton_impl._forward(64, 320, 256, 4), triton_impl._backward(32, 64, 4, whole=True)),
    "in groups": (triton_impl._forward(64, 128, 64, 4), triton_impl._backward(64, 64, 4)),
    "streamed": (triton_impl._forward(32, 0, 32, 4), triton_impl._backward(64, 128, 8)),
}


@contextmanager
def configured(name: str) -> Iterator[None]:
    """Forward and backward so, on a machine without a GPU: on one they have their own."""
    if DEVICE == "cuda":
        yield
        return
    forward, backward = CONFIGS[name]
    with triton_impl.FORWARD.override(forward), triton_impl.BACKWARD.override(backward):
        yield


EVERY = pytest.mark.parametrize("config", CONFIGS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [32, 64, 72, 128])
@pytest.mark.parametrize("tokens", [1, 17, 80, 81, *(pytest.param(tokens, marks=NIGHT) for tokens in (272, 320))])
def test_kernels_are_as_exact_as_pytorch(tokens: int, width: int, dtype: torch.dtype) -> None:
    config = list(CONFIGS)[(tokens + width // 8) % len(CONFIGS)]
    with configured(config):
        prove(short_attention, [leaf(2 if tokens < 100 else 1, tokens, 3, 2, width, dtype=dtype)])


@EVERY
@pytest.mark.parametrize("query_start", [16, *(pytest.param(first, marks=NIGHT) for first in (1, 80))])
def test_tokens_that_ask_nothing(config: str, query_start: int) -> None:
    with configured(config):
        qkv = leaf(2, 81, 3, 2, 40)
        prove(lambda x: short_attention(x, query_start=query_start), [qkv])
        with use("triton"), _poisoned_memory():
            out = short_attention(qkv, query_start=query_start)
            (gradient,) = torch.autograd.grad(out.sum(), qkv)
        torch.testing.assert_close(out, short_attention(qkv)[:, query_start:])
        assert not gradient[:, :query_start, 0].any()
        changed = qkv.detach().clone()
        changed[:, :query_start, 0] = torch.nan
        with use("triton"):
            assert torch.equal(short_attention(changed, query_start=query_start), out)


def test_default_configurations_are_as_exact() -> None:
    for tokens, width in ((80, 72), (33, 128)):
        prove(short_attention, [leaf(1, tokens, 3, 2, width)])


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU takes its own architecture's defaults in the other tests")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_default_configurations_of_gpus_are_as_exact(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_impl, "target", lambda: architecture)
    for tokens, width in ((80, 64), (80, 72), (272, 72)):
        prove(short_attention, [leaf(1, tokens, 3, 1, width, dtype=torch.bfloat16)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [128, *(pytest.param(width, marks=NIGHT) for width in (64, 72))])
def test_every_candidate(width: int, dtype: torch.dtype) -> None:
    for tunable in (triton_impl.FORWARD, triton_impl.BACKWARD):
        for config in tunable.candidates(tokens=48, width=width, bytes=dtype.itemsize):
            with tunable.override(config):
                prove(lambda x: short_attention(x, query_start=4), [leaf(1, 41, 3, 1, width, dtype=dtype)])


@EVERY
def test_strides_of_inputs_and_gradients(config: str) -> None:
    with configured(config):
        prove(short_attention, [leaf(19, 3, 3, 2, 32).transpose(0, 1)], noncontiguous_gradients=True)
        prove(short_attention, [leaf(2, 30, 3, 2, 32)[:, 5:24]], noncontiguous_gradients=True)
        prove(short_attention, [leaf(2, 19, 3, 32, 2).transpose(3, 4)])
        prove(short_attention, [leaf(1, 19, 3, 2, 32).expand(2, -1, -1, -1, -1)])
        prove(short_attention, [leaf(2, 19, 3, 2, 64)[..., ::2]])
        prove(lambda x: short_attention(x).transpose(1, 3).reshape(2, -1), [leaf(2, 19, 3, 2, 32)])
        prove(lambda x: torch.cat([short_attention(x), x[:, :, 0]], -1), [leaf(2, 19, 3, 2, 32)])


LENGTHS = [80, 17, 81, 17, 1, 80]


@EVERY
@pytest.mark.parametrize(
    ("lengths", "query_start"),
    [
        ([5, 1, 33, 5], 0),
        ([17, 81, 17], 16),
        pytest.param(LENGTHS, 0, marks=NIGHT),
        pytest.param([80, 17, 81, 17, 80], 16, marks=NIGHT),
        pytest.param([33], 1, marks=NIGHT),
    ],
    ids=str,
)
def test_sequences_of_several_lengths(config: str, lengths: list[int], query_start: int) -> None:
    offsets = (0, *torch.tensor(lengths).cumsum(0).tolist())
    qkv = leaf(offsets[-1], 3, 2, 40)
    with configured(config):
        prove(lambda x: short_attention_varlen(x, offsets, query_start=query_start), [qkv])
        with use("triton"):
            packed = short_attention_varlen(qkv, torch.tensor(offsets, dtype=torch.int32), query_start=query_start)
            apart = [short_attention(one[None], query_start=query_start)[0] for one in qkv.split(lengths)]
        assert torch.equal(packed, torch.cat(apart))


def test_training_after_inference_at_the_same_lengths() -> None:
    qkv = leaf(27, 3, 1, 32)
    with use("triton"):
        with torch.inference_mode():
            short_attention_varlen(qkv, (0, 5, 27))
        short_attention_varlen(qkv, (0, 5, 27)).sum().backward()
    assert qkv.grad is not None


def test_the_scale_of_scores() -> None:
    qkv = leaf(1, 20, 3, 1, 32)
    with configured("resident"):
        prove(lambda x: short_attention(x, scale=0.03), [qkv])
        with use("triton"):
            torch.testing.assert_close(short_attention(qkv, scale=32**-0.5), short_attention(qkv))


@EVERY
@pytest.mark.parametrize("low", [False, True])
def test_large_scores_are_finite(config: str, low: bool) -> None:
    qkv = (1e4 * torch.randn(1, 40, 3, 1, 32, device=DEVICE)).requires_grad_()
    if low:  # all scores of every query; rows that pad a tile would have the highest, 0
        qkv.data[:, :, 0], qkv.data[:, :, 1] = 10, -10
    with configured(config), use("triton"):
        out = short_attention(qkv)
        (gradient,) = torch.autograd.grad(out.sum(), qkv)
    assert out.isfinite().all() and gradient.isfinite().all()
    torch.testing.assert_close(out, reference.attention(qkv.detach(), 32**-0.5, 0))


@EVERY
def test_backward_repeats_bit_for_bit(config: str) -> None:
    qkv = leaf(1, 81, 3, 2, 40)
    with configured(config), use("triton"):
        runs = [torch.autograd.grad(short_attention(qkv).square().sum(), qkv)[0] for _ in range(2)]
    assert torch.equal(*runs)


def test_no_sequences() -> None:
    for mode in ("triton", "reference"):
        for call, shape in (
            (short_attention, (0, 5, 3, 2, 32)),
            (lambda x: short_attention_varlen(x, (0,)), (0, 3, 2, 32)),
        ):
            qkv = leaf(*shape)
            with use(mode):
                out = call(qkv)
                (gradient,) = torch.autograd.grad(out.sum(), qkv)
            assert out.shape == shape[:-3] + shape[-2:] and gradient.shape == shape


def test_the_reference_is_attention() -> None:
    qkv = leaf(2, 17, 3, 2, 40)
    q, k, v = qkv.transpose(1, 3).unbind(2)
    expected = scaled_dot_product_attention(q, k, v).transpose(1, 2)
    with use("reference"):
        torch.testing.assert_close(short_attention(qkv), expected)
        torch.testing.assert_close(short_attention(qkv, query_start=5), expected[:, 5:])
        half = short_attention(qkv.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, reference.attention(qkv.bfloat16().float(), 40**-0.5, 0).bfloat16()), "rounded once"


def test_reference_passes_gradcheck() -> None:
    qkv = torch.randn(2, 5, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reference.attention(x, 0.7, 2), qkv)
    assert torch.autograd.gradcheck(lambda x: reference.attention_varlen(x[0], (0, 2, 5), 0.7, 1), qkv)


def test_query_start_is_taken_under_its_old_name_too() -> None:
    qkv, offsets = torch.randn(9, 3, 2, 32), (0, 4, 9)
    functions = [lambda **f: short_attention(qkv[None], **f), lambda **f: short_attention_varlen(qkv, offsets, **f)]
    functions += [lambda **f: attention(qkv[None], **f), lambda **f: attention_varlen(qkv, offsets, **f)]
    for function in functions:
        assert torch.equal(function(first_query=3), function(query_start=3))
        with pytest.raises(TypeError, match="unexpected keyword argument 'first_query'"):
            function(first_query=3, query_start=3)


@pytest.mark.parametrize("query_start", [pytest.param(0, marks=NIGHT), 3])
def test_operators_are_sound(query_start: int) -> None:
    with configured("resident"):
        for shape, starts, lengths in (
            ((2, 17, 3, 2, 32), None, []),
            ((34, 3, 2, 32), op._starts((0, 10, 24, 34), query_start, torch.device(DEVICE)), [10, 2, 14, 1]),
        ):
            qkv = leaf(*shape)
            arguments = (starts, lengths, 0.2, query_start)
            torch.library.opcheck(op._short_attention.operator, (qkv, *arguments))
            out, logs = op._short_attention(qkv.detach(), *arguments)
            backward = (torch.randn_like(out), qkv.detach(), out, logs, *arguments)
            torch.library.opcheck(op._short_attention_backward.operator, backward)


@pytest.mark.parametrize("sizes", [[(2, 17)], pytest.param([(2, 17), (3, 20)], marks=NIGHT)], ids=str)
def test_compiles_without_a_break(sizes: list[tuple[int, int]]) -> None:
    with configured("resident"):
        compiled = torch.compile(short_attention, fullgraph=True, backend="aot_eager")
        for batch, tokens in sizes:
            prove(lambda x: compiled(x, query_start=2), [leaf(batch, tokens, 3, 2, 32)])
        varlen = torch.compile(short_attention_varlen, fullgraph=True, backend="aot_eager")
        prove(lambda x: varlen(x, (0, 10, 24, 34)), [leaf(34, 3, 2, 32)])


def test_the_kernels_gradients_are_taken_once() -> None:
    qkv = leaf(1, 17, 3, 1, 32)
    with use("triton"):
        (first,) = torch.autograd.grad(short_attention(qkv).sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("tokens", "width", "reason"),
    [
        (320, 128, None),
        (1, 32, None),
        (321, 64, "there are 321 tokens, and the kernels take 320 at most"),
        (80, 68, "heads are 68 wide, and the kernels take 32 to 128 in multiples of 8"),
        (80, 24, "heads are 24 wide, and the kernels take 32 to 128 in multiples of 8"),
        (80, 136, "heads are 136 wide, and the kernels take 32 to 128 in multiples of 8"),
    ],
)
def test_what_the_kernels_refuse_the_reference_takes(tokens: int, width: int, reason: str | None) -> None:
    assert op.refusal(tokens, width) == reason
    if reason:
        qkv = leaf(1, tokens, 3, 1, width)
        with use("triton"):
            assert torch.equal(short_attention(qkv), reference.attention(qkv, width**-0.5, 0))


def test_tiles_fit_their_sizes() -> None:
    assert chunks(72, 128) == ((0, 64), (64, 16))
    assert chunks(80, 64) == ((0, 64), (64, 16))
    assert chunks(1, 64) == ((0, 16),)
    assert groups(272, 320, 256) == (((0, 256), (256, 16)), ((0, 2),))
    for size in range(1, 321):
        for most, cap in ((64, 64), (96, 32), (160, 64), (320, 256)):
            keys, ranges = groups(size, most, cap)
            assert [first for first, _ in keys] == [sum(n for _, n in keys[:i]) for i in range(len(keys))]
            assert size <= sum(n for _, n in keys) < size + 16
            assert all(n in (16, 32, 64, 128, 256) and n <= cap for _, n in keys)
            assert [begin for begin, _ in ranges] == [0, *(end for _, end in ranges[:-1])] and ranges[-1][1] == len(
                keys
            )
            assert all(sum(n for _, n in keys[begin:end]) <= most for begin, end in ranges)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": [1.0]}, "qkv is list: expected a tensor"),
        ({"qkv": torch.zeros(2, 3, 1, 32)}, r"qkv has shape \[2, 3, 1, 32\]: expected \[B, T, 3, H, d\]"),
        ({"qkv": torch.zeros(2, 5, 2, 1, 32)}, r"qkv is of shape \[2, 5, 2, 1, 32\]: expected 3 in front of \[H, d\]"),
        ({"qkv": torch.zeros(2, 5, 3, 0, 32)}, r"qkv is of shape \[2, 5, 3, 0, 32\]: expected at least one head"),
        ({"qkv": torch.zeros(2, 5, 3, 1, 0)}, r"qkv is of shape .*: expected heads of at least one column"),
        ({"qkv": torch.zeros(2, 5, 3, 1, 32, dtype=torch.int32)}, "qkv has dtype torch.int32: expected a floating"),
        ({"scale": 0.0}, "scale is 0.0: expected a finite number above 0"),
        ({"scale": float("inf")}, "scale is inf: expected a finite number above 0"),
        ({"scale": "big"}, "scale is big: expected a finite number above 0"),
        ({"query_start": 5}, "query_start is 5: expected a whole number from 0 to below 5"),
        ({"query_start": -1}, "query_start is -1: expected a whole number from 0 to below 5"),
        ({"query_start": 1.0}, "query_start is 1.0: expected a whole number from 0"),
    ],
)
def test_bad_arguments_are_one_error(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        short_attention(**{"qkv": torch.zeros(2, 5, 3, 1, 32), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(1, 9, 3, 1, 32)}, r"qkv has shape .*: expected \[N, 3, H, d\]"),
        ({"cu_seqlens": (0, 4, 8)}, r"cu_seqlens is \(0, 4, 8\): expected cumulative lengths, rising from 0 to the 9"),
        ({"cu_seqlens": (0, 4, 4, 9)}, r"cu_seqlens is \(0, 4, 4, 9\): expected cumulative lengths, rising"),
        ({"cu_seqlens": (1, 9)}, r"cu_seqlens is \(1, 9\): expected cumulative lengths, rising from 0"),
        ({"cu_seqlens": ()}, r"cu_seqlens is \(\): expected cumulative lengths"),
        ({"cu_seqlens": (0, 4.0, 9)}, r"cu_seqlens is \(0, 4.0, 9\): expected whole numbers"),
        ({"cu_seqlens": 9}, "cu_seqlens is 9: expected whole numbers"),
        ({"cu_seqlens": torch.tensor([0.0, 9.0])}, r"cu_seqlens is torch.float32 \[2\]: expected int32 \[S\+1\]"),
        ({"query_start": 4}, "query_start is 4: expected a whole number from 0 to below 4"),
    ],
)
def test_bad_lengths_are_one_error(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Tensor | tuple[int, ...]] = {"qkv": torch.zeros(9, 3, 1, 32), "cu_seqlens": (0, 4, 9)}
    with pytest.raises(ValueError, match=message):
        short_attention_varlen(**{**arguments, **change})  # type: ignore[arg-type]
