"""The probe: a backend is available once it has computed a small call of this class right, gradients included."""

from __future__ import annotations

import functools
import itertools
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from mpdit_kernels.backends.libraries import BACKENDS, Backend, Call, one_line
from mpdit_kernels.short_attn import reference
from mpdit_kernels.varlen import Sequences

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-2, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Allowed error of the worst token, relative to the size of a token. In fp32 there is room for TF32 products."""

SHIFTS = (0.0, -110.0, 110.0)
"""Added to all scores of one head each, which changes no weight. Kernels have given NaN gradients where the sum of the
exponentials is beyond fp32, at lengths that their tiles do not divide."""

_probed: dict[tuple[Backend, Call], str | None] = {}


def refusal(name: str, call: Call) -> str | None:
    """Return why a backend isn't available for this class of calls, None if it is; found out once a process.

    Raises:
        ValueError: that takes a probe, and a CUDA graph is being captured.
    """
    backend = BACKENDS[name]
    if reason := backend.unfit(call):
        return reason
    if (backend, call) not in _probed:
        if capturing(call):
            raise ValueError(
                f"attention by {name} was not probed yet for {call}, and can't be while a CUDA graph is captured: "
                "run the same call once before, as capturing needs anyway"
            )
        # A thread of its own has none of the caller's modes: no_grad, inference, autocast, fake tensors, a tracer.
        with ThreadPoolExecutor(1) as thread:
            _probed[backend, call] = thread.submit(_run, backend, call).result()
    return _probed[backend, call]


def available(call: Call) -> list[str]:
    """Return the backends that serve a call; while a CUDA graph is captured, those of which that is known."""
    known = [n for n, b in BACKENDS.items() if not capturing(call) or (b, call) in _probed or b.unfit(call)]
    return [name for name in known if refusal(name, call) is None]


def capturing(call: Call) -> bool:
    return call.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _run(backend: Backend, call: Call) -> str | None:
    # Why none of its kernels will run PyTorch says in warnings.
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            if call.device.type != "cuda":
                return _compare(backend, call)
            with torch.cuda.device(call.device):
                return _compare(backend, call)
        except torch.OutOfMemoryError:  # says nothing of the backend
            raise
        except Exception as error:  # a library may raise anything
            texts = dict.fromkeys(str(warning.message).partition(" (Triggered")[0] for warning in warned)
            # Headings above the reasons, and implementations that were not asked for.
            hints = [text for text in texts if not text.endswith(("not used because:", "has been runtime disabled."))]
            return "; ".join([f"the probe failed: {one_line(error)}", *hints])


def _compare(backend: Backend, call: Call) -> str | None:
    """Return what is wrong with the output or a gradient, or None."""
    qkv, gradient, sequences = _inputs(call)
    scale = call.head_dim**-0.5
    leaf = qkv.requires_grad_()
    if call.packed:
        assert backend.run_packed is not None
        out = backend.run_packed(leaf, sequences, scale, call.query_start, call.deterministic)
    else:
        dense = leaf.unflatten(0, (len(sequences), call.tokens))
        out = backend.run(dense, scale, call.query_start, call.deterministic).flatten(0, 1)
    # A sum's gradient, since to compare the shapes of another's torch (2.13) imports sympy: a third of a second.
    (found,) = torch.autograd.grad((out * gradient).sum(), leaf)
    exact_out, exact = _truth(call)
    floor = exact[:, 2].norm(dim=-1).mean(0)  # a lone key's scores get no gradient, only roundings
    pairs = [("output", out.detach(), exact_out)]
    pairs += [(f"{name} gradient", found[:, i], exact[:, i]) for i, name in enumerate(("query", "key", "value"))]
    for name, mine, truth in pairs:
        # The largest error of a token in a head, relative to its norm or, where that is small, to what is usual.
        norms = truth.norm(dim=-1)
        size = torch.maximum(norms, torch.maximum(norms.mean(0), floor))
        error, allowed = float(((mine.double() - truth).norm(dim=-1) / size).max()), TOLERANCES[call.dtype]
        if not error <= allowed:  # a NaN is no pass
            return f"wrong {name}: a token's relative error is {error:.2g}, allowed {allowed:g}"
    return None


def _inputs(call: Call) -> tuple[Tensor, Tensor, Sequences]:
    """Return (qkv [N, 3, H, d], gradient of the output, where the sequences are), the same at every time.

    One sequence of the class's length, two where that is cheap; packed, the second is shorter.
    """
    if call.packed:
        sequences = Sequences((0, call.tokens, call.tokens + max(call.query_start + 1, call.tokens // 2)))
    else:
        sequences = Sequences(tuple(range(0, (3 if call.tokens <= 1024 else 2) * call.tokens, call.tokens)))
    heads, d = len(SHIFTS), call.head_dim
    generator = torch.Generator().manual_seed(call.tokens)
    qkv = torch.randn(sequences.offsets[-1], 3, heads, d, generator=generator, device="cpu", dtype=torch.float32)
    for head, shift in enumerate(SHIFTS):
        if shift:  # scores' first term is the same for all
            qkv[:, 1, head, 0] = 8.0
            qkv[:, 0, head, 0] = shift / 8 * d**0.5
    rows = sequences.without_first(call.query_start).offsets[-1]
    gradient = torch.randn(rows, heads, d, generator=generator, device="cpu", dtype=torch.float32)
    return qkv.to(call.device, call.dtype), gradient.to(call.device, call.dtype), sequences


@functools.lru_cache(maxsize=4)
def _truth(call: Call) -> tuple[Tensor, Tensor]:
    """Return output and gradient of qkv in float64, head by head, as the scores of long sequences are large."""
    qkv, gradient, sequences = _inputs(call)
    out, exact = torch.empty_like(gradient, dtype=torch.float64), torch.empty_like(qkv, dtype=torch.float64)
    rows = sequences.without_first(call.query_start).lengths
    ins = zip(qkv.split(sequences.lengths), exact.split(sequences.lengths), strict=True)
    outs = zip(gradient.split(rows), out.split(rows), strict=True)
    for ((x, dx), (dy, y)), head in itertools.product(zip(ins, outs, strict=True), range(len(SHIFTS))):
        leaf = x[None, :, :, head, None].double().requires_grad_()
        result = reference.attention(leaf, call.head_dim**-0.5, call.query_start)
        y[:, head] = result.detach()[0, :, 0]
        dx[:, :, head] = torch.autograd.grad((result * dy[None, :, head, None].double()).sum(), leaf)[0][0, :, :, 0]
    return out, exact
