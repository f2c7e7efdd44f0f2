"""The Upsample block: kernels against reference and float64, and the reference against its parts in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from mpdit_kernels import use
from mpdit_kernels.upsample import op, reference, triton_impl, upsample_tokens
from proof import DEVICE, DTYPES, NIGHT, leaf, prove, strided
from torch import Tensor, nn

Case = tuple[int, tuple[int, int], int, int, int, int]
CASES = [  # batch, coarse grid, factor, class tokens, width, values of a patch (0: no skip)
    (3, (2, 2), 2, 1, 72, 16),
    (2, (1, 3), 2, 5, 96, 3),
    (1, (1, 2), 4, 0, 32, 12),
    (2, (3, 2), 3, 0, 17, 0),
    *(pytest.param(case, marks=NIGHT) for case in ((1, (1, 1), 2, 2, 768, 16), (1, (1, 2), 2, 1, 1152, 16))),
]


@pytest.fixture(autouse=True)
def programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """In the interpreter small ones, so that small shapes take several programs and few empty steps."""
    if DEVICE == "cuda" or getattr(request, "param", "small") == "default":
        yield
        return
    small = {"ROWS": 2, "TOKENS": 4, "CAP": 1024, "num_warps": 4, "num_stages": 1}
    with triton_impl.FORWARD.override(small), triton_impl.BACKWARD.override(small):
        yield


def _inputs(case: Case, dtype: torch.dtype = torch.float32, position: bool = True) -> list[Any]:
    """The tensors among upsample_tokens' arguments: x, weights and biases, the skip's three, the position."""
    batch, (h, w), r, m, width, values = case
    fine = h * w * r * r

    def matrix(rows: int, *columns: int) -> Tensor:
        return (leaf(rows, *columns, dtype=dtype).detach() * width**-0.5).requires_grad_()

    return [
        leaf(batch, m + h * w, width, dtype=dtype),
        matrix(width * r * r, width),
        leaf(width * r * r, dtype=dtype),
        matrix(width, width),
        leaf(width, dtype=dtype),
        *((leaf(batch, fine, values, dtype=dtype), matrix(width, values), leaf(width)) if values else (None,) * 3),
        leaf(fine, width) if position else None,
    ]


def _call(case: Case, **more: Any) -> Any:
    _, grid, r, m, *_ = case

    def call(*inputs: Any) -> Tensor:
        x, *weights, patches, skip_weight, skip_bias, position = inputs
        skip = None if patches is None else (patches, skip_weight, skip_bias)
        return upsample_tokens(x, *weights, m, r, skip, position, grid, **more)

    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_are_as_exact_as_pytorch(case: Case, dtype: torch.dtype) -> None:
    prove(_call(case), _inputs(case, dtype))


@pytest.mark.parametrize("values", [0, 5])
def test_without_a_position(values: int) -> None:
    case = (1, (1, 2), 2, 2, 24, values)
    prove(_call(case), _inputs(case, position=False))


@pytest.mark.parametrize("programs", ["default"], indirect=True)
def test_programs_as_they_are_by_default() -> None:
    case = (3, (4, 3), 2, 13, 24, 8)  # 36 coarse and 39 class tokens: a second, unfinished program for each
    prove(_call(case), _inputs(case))


def test_strides_of_inputs_and_gradients() -> None:
    case = (2, (2, 2), 2, 3, 40, 12)
    weights = [weight.detach().t().contiguous().t().requires_grad_() for weight in _inputs(case)[1:5]]
    more = [strided(2, 16, 12), strided(40, 12), strided(40), strided(16, 40)]
    prove(_call(case), [strided(2, 7, 40), *weights, *more], noncontiguous_gradients=True)
    prove(_call(case), [leaf(1, 7, 40).expand(2, -1, -1), *weights, *more])


@pytest.mark.parametrize("kept", range(9))
def test_only_the_gradients_that_are_asked_for(kept: int) -> None:
    case = (1, (1, 2), 2, 3, 24, 12)
    inputs = [value.detach().requires_grad_(index == kept) for index, value in enumerate(_inputs(case))]
    prove(_call(case), inputs)
    asked = [index == kept for index in range(8)]
    with use("triton"):
        found = _backward(case, asked)
    assert [gradient.numel() > 0 for gradient in found] == asked


def _backward(case: Case, asked: list[bool]) -> list[Tensor]:
    """Of the operator itself, whose eight tensors have the two weights of the second product as one."""
    _, (h, w), r, m, width, values = case
    x, expand, bias, _, refine_bias, patches, _, skip_bias, position = (value.detach() for value in _inputs(case))
    refine, sizes = leaf(width, width + -(-values // 8) * 8).detach(), [m, r, h, w]
    out, *saved = op._upsample(x, expand, bias, refine, refine_bias, patches, skip_bias, position, sizes, 1e-6, x.dtype)
    return op._upsample_backward(out, *saved, expand, refine, patches, sizes, 1e-6, x.dtype, asked)


def test_an_empty_batch() -> None:
    case = (0, (2, 2), 2, 3, 24, 8)
    inputs = _inputs(case)
    with use("triton"):
        y = _call(case)(*inputs)
        gradients = torch.autograd.grad(y.sum(), inputs)
    assert y.shape == (0, 19, 24)
    assert all(gradient.count_nonzero() == 0 for gradient in gradients)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_norm_without_eps() -> None:
    case = (1, (1, 3), 2, 1, 24, 8)  # fewer tokens than a program takes
    prove(_call(case, eps=0.0), _inputs(case))


def test_backward_repeats_bit_for_bit() -> None:
    case = (2, (3, 2), 2, 5, 40, 8)
    inputs = _inputs(case)
    with use("triton"):
        runs = [torch.autograd.grad(_call(case)(*inputs).square().sum(), inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_reference_is_the_block_of_the_paper() -> None:
    """Built from PyTorch's own modules, on the CPU in float64: nn.PixelShuffle has the official order of rows."""
    _, (h, w), r, m, width, _ = case = (2, (3, 2), 2, 4, 12, 5)
    x, expand, expand_bias, refine, refine_bias, patches, skip, skip_bias, position = (
        value.detach().cpu().double() for value in _inputs(case)
    )
    product = (x[:, m:] @ expand.T + expand_bias).transpose(1, 2).unflatten(2, (h, w))
    image = nn.functional.gelu(nn.PixelShuffle(r)(product).flatten(2).transpose(1, 2), approximate="tanh")
    joined = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)(torch.cat([x[:, :m], image], dim=1))
    expected = joined @ refine.T + refine_bias
    expected[:, m:] += patches @ skip.T + skip_bias + position
    got = upsample_tokens(
        x, expand, expand_bias, refine, refine_bias, m, r, (patches, skip, skip_bias), position, (h, w)
    )
    torch.testing.assert_close(got, expected)


def test_dtypes_of_results() -> None:
    case = (1, (2, 2), 2, 1, 16, 8)
    inputs = _inputs(case)
    narrow = [value.bfloat16() for value in inputs]
    for mode in ("reference", "triton"):
        with use(mode):
            assert _call(case)(*narrow).dtype == torch.bfloat16
            assert _call(case)(*narrow[:-1], inputs[-1]).dtype == torch.float32
            assert _call(case)(narrow[0], *inputs[1:7], *narrow[7:]).dtype == torch.bfloat16
            with torch.autocast(DEVICE, torch.bfloat16):
                assert _call(case)(*inputs[:-1], None).dtype == torch.float32
                assert _call(case)(*narrow[:-1], inputs[-1]).dtype == torch.float32


def test_autocast_takes_the_same_steps() -> None:
    """Results and gradients under autocast agree within bf16's roundings, and gradients have their tensors' dtypes."""
    case = (2, (2, 2), 2, 3, 40, 12)
    inputs, found = _inputs(case), {}
    for mode in ("reference", "triton"):
        with use(mode):
            with torch.autocast(DEVICE, torch.bfloat16):
                y = _call(case)(*inputs)
            found[mode] = [y.detach(), *torch.autograd.grad(y.sin().sum(), inputs)]
    for mine, theirs in zip(found["triton"], found["reference"], strict=True):
        assert mine.dtype == theirs.dtype == torch.float32
        assert (mine - theirs).norm() <= 0.02 * theirs.norm()


def test_reference_passes_gradcheck() -> None:
    case = (2, (1, 2), 2, 2, 4, 3)
    x, *weights, patches, skip_weight, skip_bias, position = (
        value.detach().cpu().double().requires_grad_() for value in _inputs(case)
    )

    def function(*inputs: Tensor) -> Tensor:
        return reference.upsample_tokens(
            *inputs[:5], 2, 2, (inputs[5], inputs[6], inputs[7]), inputs[8], (1, 2), 1e-6, torch.float64
        )

    assert torch.autograd.gradcheck(function, (x, *weights, patches, skip_weight, skip_bias, position))


@pytest.mark.parametrize("skip", [True, False])
def test_operator_is_sound(skip: bool) -> None:
    x, expand, bias, refine, refine_bias, patches, _, skip_bias, position = _inputs((1, (1, 2), 2, 1, 24, 8))
    if not skip:
        arguments = (x, expand, bias, refine, refine_bias, None, None, None)
    else:
        arguments = (x, expand, bias, leaf(24, 32), refine_bias, patches, skip_bias, position)
    torch.library.opcheck(op._upsample.operator, (*arguments, [1, 2, 1, 2], 1e-6, torch.float32))


ALL = [*range(8)]


@pytest.mark.parametrize(
    "asked", [ALL, [1, 4], *(pytest.param(asked, marks=NIGHT) for asked in ([0], [3, 6], [5], [7]))], ids=str
)
@pytest.mark.parametrize("case", [(2, (2, 1), 2, 3, 24, 12), (1, (1, 1), 1, 0, 24, 12)], ids=str)
def test_operator_of_gradients_is_sound(case: Case, asked: Sequence[int]) -> None:
    """With class tokens before the image tokens' gradients in memory, and with a single token."""
    _, (h, w), r, m, width, _ = case
    x, expand, bias, _, refine_bias, patches, _, skip_bias, position = (value.detach() for value in _inputs(case))
    sizes, refine = [m, r, h, w], leaf(width, width + 16).detach()
    out, *saved = op._upsample(x, expand, bias, refine, refine_bias, patches, skip_bias, position, sizes, 1e-6, x.dtype)
    arguments = (out, *saved, expand, refine, patches, sizes, 1e-6, x.dtype, [index in asked for index in range(8)])
    torch.library.opcheck(op._upsample_backward.operator, arguments)
    for gradient in op._upsample_backward(*arguments):
        assert gradient.untyped_storage().nbytes() == gradient.nbytes  # memory of its own, and no more


@pytest.mark.parametrize(
    ("mode", "dynamic"),
    [
        ("triton", None),
        pytest.param("triton", True, marks=NIGHT),
        pytest.param("reference", None, marks=NIGHT),
        pytest.param("reference", True, marks=NIGHT),
    ],
)
@pytest.mark.parametrize("programs", ["default"], indirect=True)
def test_compiles_without_a_break_for_any_square_grid(mode: str, dynamic: bool | None) -> None:
    """With the grid left to the function, one compiled function serves several numbers of tokens."""

    def call(*inputs: Any) -> Tensor:
        x, *weights, patches, skip_weight, skip_bias, position = inputs
        return upsample_tokens(x, *weights, 1, 2, (patches, skip_weight, skip_bias), position)

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for side in (2, 3) if dynamic else (2, 3, 4):
        inputs = _inputs((1, (side, side), 2, 1, 24, 12))  # no two sizes alike, which a compiler would note
        again = side == 2 or (side == 3 and not dynamic)  # the second time for any number of tokens
        with use(mode):
            with torch.compiler.set_stance("default" if again else "fail_on_recompile"):
                got = compiled(*inputs)
            expected = call(*inputs)
            gradients = [torch.autograd.grad(y.sin().sum(), inputs) for y in (got, expected)]
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("side", [1, 2, 3, 7, 1000, 2**20 + 1])
def test_square_grids_are_found(side: int) -> None:
    assert op._grid(None, side * side) == (side, side)
    with pytest.raises(ValueError, match="are no square"):
        op._grid(None, side * side + 1)
    if side > 1:
        with pytest.raises(ValueError, match="are no square"):
            op._grid(None, side * side - 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8)}, r"x has shape \[2, 8\]: expected \[B, m\+n0, D\]"),
        ({"x": torch.zeros(2, 7, 8, dtype=torch.int32)}, "x has dtype torch.int32: expected a floating-point type"),
        ({"expand_weight": torch.zeros(32, 9)}, r"expand_weight has shape \[32, 9\]: expected \[32, 8\]"),
        ({"expand_bias": torch.zeros(8)}, r"expand_bias has shape \[8\]: expected \[32\] \[D\*r\*r\]"),
        ({"refine_weight": torch.zeros(8, 9)}, r"refine_weight has shape \[8, 9\]: expected \[8, 8\]"),
        ({"refine_bias": torch.zeros(8, device="meta")}, "refine_bias is on meta: expected cpu, where x is"),
        ({"num_class_tokens": 7}, "num_class_tokens is 7: expected an integer of at least 0, and fewer than x's 7"),
        ({"num_class_tokens": -1}, "num_class_tokens is -1: expected an integer of at least 0"),
        ({"num_class_tokens": 2}, r"grid is None: expected \(h, w\), as x's 5 image tokens are no square"),
        ({"factor": 0}, "factor is 0: expected an integer of at least 1"),
        ({"factor": 3}, r"expand_weight has shape \[32, 8\]: expected \[72, 8\]"),
        ({"grid": (3, 1)}, r"grid is \(3, 1\): expected \(h, w\) of h \* w = 4 image tokens"),
        ({"grid": (-2, -2)}, r"grid is \(-2, -2\): expected \(h, w\)"),
        ({"patches": torch.zeros(2, 15, 4)}, r"patches has shape \[2, 15, 4\]: expected \[2, 16, 4\]"),
        ({"skip_weight": torch.zeros(8, 5)}, r"skip_weight has shape \[8, 5\]: expected \[8, 4\] \[D, K\]"),
        ({"skip_bias": torch.zeros(9)}, r"skip_bias has shape \[9\]: expected \[8\]"),
        ({"position": torch.zeros(4, 8)}, r"position has shape \[4, 8\]: expected \[16, 8\] \[n1, D\]"),
        ({"eps": -1.0}, "eps is -1.0: expected a number of at least 0"),
        ({"x": None}, "x is None: expected a tensor"),
        ({"x": [1.0]}, "x is list: expected a tensor"),
        ({"expand_weight": None}, "expand_weight is None: expected a tensor"),
        ({"refine_weight": None}, "refine_weight is None: expected a tensor"),
        ({"expand_bias": None}, "expand_bias is None: expected a tensor"),
        ({"refine_bias": [0.0] * 8}, "refine_bias is list: expected a tensor"),
        ({"position": [[0.0] * 8] * 16}, "position is list: expected a tensor"),
        ({"patches": None}, "patches is None: expected a tensor"),
        ({"skip_weight": None}, "skip_weight is None: expected a tensor"),
        ({"skip_bias": None}, "skip_bias is None: expected a tensor"),
        ({"skip_bias": [0.0] * 8}, "skip_bias is list: expected a tensor"),
        ({"skip": (torch.zeros(2, 16, 4), torch.zeros(8, 4))}, "skip is a tuple of 2: expected a tuple"),
        ({"skip": ()}, r"skip is a tuple of 0: expected a tuple \(patches, weight, bias\), or None"),
        ({"skip": torch.zeros(3, 16, 4)}, r"skip is of type Tensor: expected a tuple"),
        ({"skip": [torch.zeros(2, 16, 4), torch.zeros(8, 4), torch.zeros(8)]}, "skip is of type list: expected a"),
        ({"grid": (4,)}, r"grid is \(4,\): expected \(h, w\) of h \* w = 4 image tokens"),
        ({"grid": (2.0, 2.0)}, r"grid is \(2.0, 2.0\): expected \(h, w\) of h \* w = 4 image tokens, two integers"),
        ({"grid": (2, 2, 1)}, r"grid is \(2, 2, 1\): expected \(h, w\)"),
        ({"grid": 2}, r"grid is of type int: expected \(h, w\)"),
        ({"factor": 2.0}, "factor is 2.0: expected an integer of at least 1"),
        ({"factor": -2}, "factor is -2: expected an integer of at least 1"),
        ({"factor": None}, "factor is None: expected an integer of at least 1"),
        ({"num_class_tokens": 3.0}, "num_class_tokens is 3.0: expected an integer of at least 0"),
        ({"num_class_tokens": None}, "num_class_tokens is None: expected an integer of at least 0"),
    ],
)
def test_bad_arguments_are_one_error(change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised before an operator or the reference is called."""
    for module, name in ((op, "_upsample"), (reference, "upsample_tokens")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("called with bad arguments"))
    good: dict[str, Any] = {
        "x": torch.zeros(2, 7, 8),
        "expand_weight": torch.zeros(32, 8),
        "expand_bias": torch.zeros(32),
        "refine_weight": torch.zeros(8, 8),
        "refine_bias": torch.zeros(8),
        "num_class_tokens": 3,
        "factor": 2,
        "position": torch.zeros(16, 8),
    }
    change = dict(change)
    skip = {"patches": torch.zeros(2, 16, 4), "skip_weight": torch.zeros(8, 4), "skip_bias": torch.zeros(8)}
    skip |= {name: change.pop(name) for name in tuple(change) if name in skip}
    with pytest.raises(ValueError, match=message):
        upsample_tokens(**{**good, "skip": tuple(skip.values()), **change})
