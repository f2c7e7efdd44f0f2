"""The probe: a backend is available once it has computed a small call of this class right, gradients included."""

from __future__ import annotations

import functools
import itertools
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from mpdit_kernels.backends.call import Backend, Call
from mpdit_kernels.backends.libraries import one_line
from mpdit_kernels.short_attn import reference
from mpdit_kernels.varlen import Sequences

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-2, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Of the worst token's error, relative to the size of a token. In fp32 there is room for TF32 products."""

SHIFTS = (0.0, -110.0, 110.0)
"""Added to all scores of one head each, which changes no weight. Kernels have given NaN gradients where the sum of the
exponentials is beyond fp32, at lengths that their tiles do not divide."""


def refusal(backend: Backend, call: Call) -> str | None:
    """Why the backend isn't available for this class of calls; None if it is."""
    return backend.unfit(call) or _problem(backend, call)


def known(backend: Backend, call: Call) -> bool:
    """Whether `refusal` answers without a probe."""
    return (backend, call) in _probed or bool(backend.unfit(call))


_probed: dict[tuple[Backend, Call], str | None] = {}


def _problem(backend: Backend, call: Call) -> str | None:
    """What the probe found, run once a process."""
    if (backend, call) not in _probed:
        # A thread of its own has none of the caller's modes: no_grad, inference, autocast, fake tensors, a tracer.
        with ThreadPoolExecutor(1) as thread:
            _probed[backend, call] = thread.submit(_run, backend, call).result()
    return _probed[backend, call]


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
            hints = [text for text in texts if not text.endswith(_HEADINGS)]
            return "; ".join([f"the probe failed: {one_line(error)}", *hints])


_HEADINGS = ("not used because:", "has been runtime disabled.")
"""Of implementations that were not asked for, and above the reasons."""


def _compare(backend: Backend, call: Call) -> str | None:
    qkv, gradient, sequences = inputs(call)
    scale = call.head_dim**-0.5
    leaf = qkv.requires_grad_()
    if call.packed:
        assert backend.run_packed is not None
        out = backend.run_packed(leaf, sequences, scale, call.first_query, call.deterministic)
    else:
        dense = leaf.unflatten(0, (len(sequences), call.tokens))
        out = backend.run(dense, scale, call.first_query, call.deterministic).flatten(0, 1)
    # A sum's gradient, since to compare the shapes of another's torch (2.13) imports sympy: a third of a second.
    (found,) = torch.autograd.grad((out * gradient).sum(), leaf)
    exact_out, exact = _truth(call)
    floor = exact[:, 2].norm(dim=-1).mean(0)  # a lone key's scores get no gradient, only roundings
    pairs = [("output", out.detach(), exact_out)]
    pairs += [(f"{name} gradient", found[:, i], exact[:, i]) for i, name in enumerate(("query", "key", "value"))]
    for name, mine, truth in pairs:
        error, allowed = _worst(mine, truth, floor), TOLERANCES[call.dtype]
        if not error <= allowed:  # a NaN is no pass
            return f"wrong {name}: a token's relative error is {error:.2g}, allowed {allowed:g}"
    return None


def inputs(call: Call) -> tuple[Tensor, Tensor, Sequences]:
    """(qkv [N, 3, H, d], gradient of the output, where the sequences are), the same at every time."""
    sequences = _sequences(call)
    heads, d = len(SHIFTS), call.head_dim
    generator = torch.Generator().manual_seed(call.tokens)
    qkv = torch.randn(sequences.total, 3, heads, d, generator=generator, device="cpu", dtype=torch.float32)
    for head, shift in enumerate(SHIFTS):
        if shift:  # scores' first term is the same for all
            qkv[:, 1, head, 0] = 8.0
            qkv[:, 0, head, 0] = shift / 8 * d**0.5
    rows = sequences.without_first(call.first_query).total
    gradient = torch.randn(rows, heads, d, generator=generator, device="cpu", dtype=torch.float32)
    return qkv.to(call.device, call.dtype), gradient.to(call.device, call.dtype), sequences


def _sequences(call: Call) -> Sequences:
    """One sequence of the class's length, two where that is cheap; packed, the second is shorter."""
    if call.packed:
        return Sequences((0, call.tokens, call.tokens + max(call.first_query + 1, call.tokens // 2)))
    return Sequences(tuple(range(0, (3 if call.tokens <= 1024 else 2) * call.tokens, call.tokens)))


@functools.lru_cache(maxsize=4)
def _truth(call: Call) -> tuple[Tensor, Tensor]:
    """Output and gradient of qkv in float64, head by head, as the scores of long sequences are large."""
    qkv, gradient, sequences = inputs(call)
    out, exact = torch.empty_like(gradient, dtype=torch.float64), torch.empty_like(qkv, dtype=torch.float64)
    rows = sequences.without_first(call.first_query).lengths
    ins = zip(qkv.split(sequences.lengths), exact.split(sequences.lengths), strict=True)
    outs = zip(gradient.split(rows), out.split(rows), strict=True)
    for ((x, dx), (dy, y)), head in itertools.product(zip(ins, outs, strict=True), range(len(SHIFTS))):
        leaf = x[None, :, :, head, None].double().requires_grad_()
        result = reference.attention(leaf, call.head_dim**-0.5, call.first_query)
        y[:, head] = result.detach()[0, :, 0]
        dx[:, :, head] = torch.autograd.grad((result * dy[None, :, head, None].double()).sum(), leaf)[0][0, :, :, 0]
    return out, exact


def _worst(x: Tensor, exact: Tensor, floor: Tensor) -> float:
    """The largest error of a token in a head, relative to its norm or, where that is small, to what is usual."""
    norms = exact.norm(dim=-1)
    size = torch.maximum(norms, torch.maximum(norms.mean(0), floor))
    return float(((x.double() - exact).norm(dim=-1) / size).max())
