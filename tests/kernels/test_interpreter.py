"""Triton's interpreter as the tests mend it: right in bf16 and fp16."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from mpdit_kernels.launch import INTERPRETING
from torch import Tensor

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="kernels run on the GPU")

NARROW = [torch.bfloat16, torch.float16]


@triton.jit
def _copy(x, y):
    at = tl.arange(0, 1024)
    tl.store(y + at, tl.load(x + at).to(y.dtype.element_ty))


@triton.jit
def _product(x, y, out):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.trans(tl.load(y + at))))


@triton.jit
def _arithmetic(x, out, KIND: tl.constexpr):
    at = tl.arange(0, 16)
    value = tl.load(x + at)
    if KIND == "product":
        value = value * value
    elif KIND == "product with a constant":
        value = 2 * value
    elif KIND == "comparison":
        value = tl.where(value > tl.load(x + 15 - at), 1, 0)
    elif KIND == "absolute value":
        value = tl.abs(value)
    elif KIND == "sum":
        value = value.to(tl.float32) + tl.sum(value, 0)
    elif KIND == "choice":
        value = tl.where(at < 8, value, value)
    tl.store(out + at, value.to(tl.float32))


def _bits(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), 0.0, x).view(torch.int32 if x.itemsize == 4 else torch.int16)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_casts_round_as_torch_does(dtype: torch.dtype) -> None:
    """Numbers of every size with any bits, and those around ties between two neighbours of the narrow type."""
    any_bits = torch.randint(-(2**31), 2**31, (512,)).int().view(torch.float32)
    half = 0x8000 if dtype == torch.bfloat16 else 0x1000  # half a unit of its last place, in fp32's bits
    near_ties = torch.randn(508).to(dtype).float().view(torch.int32) + half + torch.randint(-1, 2, (508,)).int()
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    x = torch.cat([any_bits, near_ties.view(torch.float32), special])
    narrow, wide = torch.empty(1024, dtype=dtype), torch.empty(1024)
    _copy[(1,)](x, narrow)
    assert torch.equal(_bits(narrow), _bits(x.to(dtype))) and torch.equal(narrow.isnan(), x.to(dtype).isnan())
    _copy[(1,)](narrow, wide)
    assert torch.equal(_bits(wide), _bits(narrow.float()))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_products_are_of_the_numbers_and_sum_in_fp32(dtype: torch.dtype) -> None:
    x, y, out = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype), torch.empty(16, 16)
    _product[(1,)](x, y, out)
    torch.testing.assert_close(out, x.float() @ y.float().T, rtol=0, atol=4e-3 if dtype == torch.float16 else 1e-5)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("kind", ["product", "product with a constant", "comparison", "absolute value", "sum"])
def test_arithmetic_on_narrow_numbers_is_refused(kind: str, dtype: torch.dtype) -> None:
    with pytest.raises(Exception, match=r"arithmetic on (bf|fp)16 numbers: cast them to tl.float32 first"):
        _arithmetic[(1,)](torch.randn(16).to(dtype), torch.empty(16), kind)
    _arithmetic[(1,)](torch.randn(16), torch.empty(16), kind)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_choosing_among_narrow_numbers_is_no_arithmetic(dtype: torch.dtype) -> None:
    x, out = torch.randn(16).to(dtype), torch.empty(16)
    _arithmetic[(1,)](x, out, "choice")
    assert torch.equal(out, x.float())
