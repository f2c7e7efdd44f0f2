"""On a GPU, every case at its full B and XL shapes: error, CUDA graphs, torch.compile."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from mpdit_kernels import attention, use
from mpdit_kernels.backends import BACKENDS, Call, probe
from mpdit_kernels.short_attn import reference
from proof import distance, prove
from tools.cases import SHAPES, Case, all_cases
from torch import Tensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

CASES = all_cases()
SMALL = all_cases([dataclasses.replace(shape, batch=16, parameters=1_000_003) for shape in SHAPES])
"""The same lengths and widths; for what need not be at full size."""
WITH_GRADIENTS = [case for case in SMALL if case.backward]


@pytest.fixture(autouse=True)
def _free_memory() -> None:
    torch._dynamo.reset()
    torch.cuda.empty_cache()


def _fresh(case: Case, dtype: torch.dtype = torch.bfloat16) -> Sequence[Any]:
    return case.inputs("cuda", dtype)


def _step(case: Case, inputs: Sequence[Any], call: Any = None) -> list[Tensor | None]:
    """Outputs and gradients of one forward and backward."""
    result = (call or case.call)(*inputs)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    gradients = torch.autograd.grad(outputs, wanted, [torch.ones_like(out) for out in outputs], allow_unused=True)
    return [*(out.detach() for out in outputs), *gradients]


def _copies(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else x.clone() for x in tensors]


def _assert_close(mine: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> None:
    """Up to the order of sums, in which cuBLAS and Inductor are free: what is not run at all is further off."""
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b.to(a.device), rtol=2e-2, atol=2e-2 * float(b.abs().max()))


@pytest.mark.parametrize("case", [case for case in CASES if case.backward], ids=lambda case: case.name)
def test_full_shapes_are_as_exact_as_pytorch(case: Case) -> None:
    """Outputs and all gradients, at each token length."""
    prove(case.call, _fresh(case))


@pytest.mark.parametrize("case", [case for case in SMALL if not case.backward], ids=lambda case: case.name)
def test_what_writes_in_place_is_as_exact_as_pytorch(case: Case) -> None:
    """Each run gets tensors of its own."""

    def call(*inputs: Any) -> Any:
        return case.call(*(x.clone() if isinstance(x, Tensor) else x for x in inputs))

    prove(call, _fresh(case))


@pytest.mark.parametrize("case", WITH_GRADIENTS, ids=lambda case: case.name)
def test_cuda_graphs_capture_forward_and_backward(case: Case) -> None:
    with use("triton"):
        inputs, others = _fresh(case), _fresh(case)
        expected = _copies(_step(case, others))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            _step(case, inputs)  # compiles and allocates
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = _step(case, inputs)
        with torch.no_grad():
            for mine, other in zip(inputs, others, strict=True):
                if isinstance(mine, Tensor):
                    mine.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        _assert_close(captured, expected)


@pytest.mark.parametrize("case", WITH_GRADIENTS, ids=lambda case: case.name)
def test_inductor_compiles_without_a_break(case: Case) -> None:
    with use("triton"):
        inputs = _fresh(case)
        expected = _step(case, inputs)
        found = _step(case, inputs, torch.compile(lambda *a: case.call(*a), fullgraph=True))
    _assert_close(found, expected)


def test_auto_compiles_without_a_break() -> None:
    """Whichever implementation the measured tables choose."""
    for case in WITH_GRADIENTS:
        torch._dynamo.reset()
        torch.compile(lambda *a, case=case: case.call(*a), fullgraph=True, backend="aot_eager")(*_fresh(case))


@pytest.mark.parametrize("head_dim", [64, 72])
@pytest.mark.parametrize("tokens", [80, 256, 272, 1024, 1040])
@pytest.mark.parametrize("name", BACKENDS)
def test_every_library_is_as_exact_as_pytorch_at_each_length(name: str, tokens: int, head_dim: int) -> None:
    """Outputs and gradients of all that count as available, on fresh values; cuDNN's too, whose tiles divide none."""
    for query_start in (0, 16):
        call = Call(tokens, head_dim, torch.bfloat16, torch.device("cuda", torch.cuda.current_device()), query_start)
        if reason := probe.refusal(name, call):
            pytest.skip(reason)
        qkv = torch.randn(4, tokens, 3, 4, head_dim, device="cuda", dtype=torch.bfloat16).requires_grad_()
        out = attention(qkv, query_start=query_start, backend=name)
        gradient = torch.randn_like(out)
        found = [out.detach(), *torch.autograd.grad(out, qkv, gradient)[0].unbind(2)]
        exact = qkv.detach().double().requires_grad_()
        out = reference.attention(exact, head_dim**-0.5, query_start)
        truth = [out.detach(), *torch.autograd.grad(out, exact, gradient.double())[0].unbind(2)]
        for mine, right in zip(found, truth, strict=True):
            assert distance(mine, right) < 8e-3, "four roundings of bf16; libraries take one or two"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_kernels_run_where_their_tensors_are() -> None:
    case = WITH_GRADIENTS[0]
    with use("triton"):
        inputs = case.inputs("cuda:1", torch.bfloat16)
        moved = [x.detach().to("cuda:0").requires_grad_(x.requires_grad) for x in inputs]
        _assert_close(_step(case, inputs), _step(case, moved))
