"""The calls at which kernels are budgeted, proved, tuned and timed: those of a training step of B and XL."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from mpdit_kernels import (
    adaln_modulate,
    attention,
    fno_time_embedding,
    gated_residual,
    gated_residual_adaln,
    gelu_linear,
    short_attention,
    upsample_tokens,
)
from mpdit_kernels.adamw_ema.optimizer import update_batch_
from mpdit_kernels.adamw_ema.reference import Batch, Settings
from mpdit_kernels.adamw_ema.uploads import Uploads
from mpdit_kernels.fno.reference import GRID, MODES, names
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """A preset's dimensions, named as in mpdit_kernels' docstrings.

    Attributes:
        name: "B" or "XL".
        width: D.
        heads: H.
        parameters: trainable ones of the whole model.
        batch: B, images on one GPU.
        prefix: m, class tokens.
        grids: side of each stage's grid of tokens, coarse to fine.
        channels, patch: of the latent and of the finest stage.
    """

    name: str
    width: int
    heads: int
    parameters: int
    batch: int = 128
    prefix: int = 16
    grids: tuple[int, int] = (8, 16)
    channels: int = 4
    patch: int = 2

    @property
    def tokens(self) -> tuple[int, ...]:
        """Return the tokens of each stage, class tokens included."""
        return tuple(self.prefix + grid * grid for grid in self.grids)


SHAPES = (Shape("B", 768, 12, 104_607_152), Shape("XL", 1152, 16, 480_839_216))
"""MPDiT-B/4-2 and MPDiT-XL/4-2 at 32x32 latents, 128 images on one GPU."""
TINY = (Shape("XL", width=64, heads=2, parameters=5000, batch=2, prefix=2, grids=(2, 4)),)
"""For a dry run on a CPU."""


@dataclass(frozen=True)
class Cost:
    """The least one pass must do: bytes read and written once, and FLOP.

    Bytes are of the dtypes of training under bf16 autocast: the residual stream and the modulation are fp32, branches
    and what products take and give bf16.

    FLOP are those of products and transforms, `flops` on tensor cores and `flops32` in fp32 outside of them;
    elementwise arithmetic is not counted, as it takes less time than its bytes.
    """

    bytes: int
    flops: int = 0
    flops32: int = 0

    def floor(self, bandwidth: float, flops: float, flops32: float) -> float:
        """Return the seconds that moving the bytes or either kind of arithmetic takes at these rates: the longest."""
        return max(self.bytes / bandwidth, self.flops / flops, self.flops32 / flops32)


@dataclass(frozen=True)
class Case:
    """One call of one operation.

    Attributes:
        operation: the public function's name.
        label: which of its calls, for example "XL, 80 tokens".
        inputs: (device, dtype) -> arguments of `call`, fresh random tensors (floats that get a gradient have
            requires_grad set). The dtype is that of products; what is fp32 in training under autocast stays fp32. The
            device may be "meta".
        call: the public function of these arguments; `use` chooses the implementation.
        forward, backward: costs; backward is None where there is none.
        kernels: what runs our kernels in place of `call`, where that chooses among libraries.
    """

    operation: str
    label: str
    inputs: Callable[[str | torch.device, torch.dtype], Sequence[Any]]
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    forward: Cost
    backward: Cost | None = None
    kernels: Callable[..., Tensor] | None = None

    @property
    def name(self) -> str:
        """Return its name in tables and budgets."""
        return f"{self.operation}, {self.label}"


def _random(*shape: int, device: str | torch.device, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    """Return standard normal values with requires_grad."""
    return torch.randn(*shape, device=device, dtype=dtype).requires_grad_(grad)


# The modulated norms and gated residuals of one block, at each stage's number of tokens.


def _adaln(shape: Shape) -> list[Case]:
    found: list[Case] = []
    for tokens in shape.tokens:
        size, label = (shape.batch, tokens, shape.width), f"{shape.name}, {tokens} tokens"
        # Bytes of a branch or a modulated norm in bf16, of the residual stream, and of a vector of each sample.
        y, x, vector = (n * shape.batch * shape.width for n in (2 * tokens, 4 * tokens, 4))
        # Backward: the norm reads x, dy and writes dx; the residual reads dresidual and branch, and writes dbranch.
        for function, gated, norm, forward, backward in (
            (_adaln_modulate, False, True, x + y + 2 * vector, 2 * x + y + 3 * vector),
            (gated_residual, True, False, 2 * x + y + vector, x + 2 * y + 2 * vector),
            (_gated_residual_adaln, True, True, 2 * x + 2 * y + 3 * vector, 3 * x + 3 * y + 5 * vector),
        ):
            inputs = partial(_adaln_inputs, size, gated, norm)
            name: str = function.__name__.lstrip("_")
            found.append(Case(name, label, inputs, function, Cost(forward), Cost(backward)))
    return found


def _adaln_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return adaln_modulate(x, shift, scale, dtype=_of_products(x))


def _gated_residual_adaln(x: Tensor, branch: Tensor, *vectors: Tensor) -> tuple[Tensor, Tensor]:
    gate, shift, scale = vectors
    return gated_residual_adaln(x, branch, gate, shift, scale, dtype=_of_products(x))


def _of_products(x: Tensor) -> torch.dtype:
    """Return what autocast would have a norm of the residual stream come as; float64 is there to judge by."""
    return torch.bfloat16 if x.dtype == torch.float32 else x.dtype


def _adaln_inputs(
    size: tuple[int, int, int], gated: bool, norm: bool, device: str | torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Draw x, perhaps a branch, and vectors that are slices of one modulation [B, 6D], as in the model."""
    batch, _, width = size
    tokens = [_random(*size, device=device), *([_random(*size, device=device, dtype=dtype)] if gated else [])]
    modulation = _random(batch, 6 * width, device=device, grad=False).chunk(6, dim=-1)
    return [*tokens, *(vector.requires_grad_() for vector in modulation[: gated + 2 * norm])]


# The MLP of one block at each stage's number of tokens.


RATIO = 4
"""Hidden width in widths of the block."""


def _gelu_mlp(shape: Shape) -> list[Case]:
    found = []
    for tokens in shape.tokens:
        rows, width, hidden = shape.batch * tokens, shape.width, RATIO * shape.width
        outer, inner = 2 * rows * width, 2 * rows * hidden  # bytes of [tokens, D] and [tokens, H] in bf16
        weights = 2 * (2 * width * hidden + width + hidden)
        product = 2 * rows * width * hidden
        # Forward: x and weights read; h written; a, which two products pass on, written and read; y written.
        # Backward: dy, x, h and weights read; dh and a written and read; dx and the weights' gradients written.
        forward = Cost(2 * outer + weights + 3 * inner, 2 * product)
        backward = Cost(3 * outer + 2 * weights + 5 * inner, 4 * product)
        inputs = partial(_gelu_mlp_inputs, shape.batch, tokens, width)
        label = f"{shape.name}, {tokens} tokens"
        found.append(Case("gelu_linear", label, inputs, gelu_linear, forward, backward))
    return found


def _gelu_mlp_inputs(
    batch: int, tokens: int, width: int, device: str | torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Draw x, and weights that keep the sizes of values, as trained ones roughly do."""
    hidden = RATIO * width
    x = _random(batch, tokens, width, device=device, dtype=dtype)
    shapes = ((hidden, width), (hidden,), (width, hidden), (width,))
    weights = [_random(*shape, device=device, dtype=dtype, grad=False) * shape[-1] ** -0.5 for shape in shapes]
    return [x, *(weight.requires_grad_() for weight in weights)]


# Attention of one block at each stage's number of tokens, and of the last block, whose class tokens ask nothing.


def _short_attn(shape: Shape) -> list[Case]:
    """Return cases whose call is `attention`: the opponent is its choice without our kernels (--attention: all)."""
    found = []
    for tokens, query_start in [*((tokens, 0) for tokens in shape.tokens), (shape.tokens[-1], shape.prefix)]:
        size = (shape.batch, tokens, 3, shape.heads, shape.width // shape.heads)
        queries = tokens - query_start
        row = 2 * shape.batch * shape.width  # bytes of one token of all sequences in bf16
        product = 2 * shape.batch * tokens * queries * shape.width
        # Forward reads queries, keys and values, and writes the result; backward reads these and a gradient, and writes
        # the whole gradient.
        forward = Cost(row * (2 * tokens + 2 * queries), 2 * product)
        backward = Cost(row * (2 * tokens + 2 * queries + 3 * tokens), 5 * product)
        label = f"{shape.name}, {tokens} tokens" + (f", queries from {query_start}" if query_start else "")
        inputs = partial(_short_attn_inputs, size)
        call, kernels = (partial(function, query_start=query_start) for function in (attention, short_attention))
        found.append(Case("short_attention", label, inputs, call, forward, backward, kernels))
    return found


def _short_attn_inputs(size: tuple[int, ...], device: str | torch.device, dtype: torch.dtype) -> list[Tensor]:
    return [_random(*size, device=device, dtype=dtype)]


# The Upsample block between the two stages, with the skip and the positions as in the model.


def _upsample(shape: Shape) -> list[Case]:
    width, values = shape.width, shape.channels * shape.patch**2
    coarse, fine = (grid * grid for grid in shape.grids)
    factor = shape.grids[1] // shape.grids[0]
    # Elements of x, of tokens before GELU (class tokens are in x), and of tokens of the result.
    x = shape.batch * (shape.prefix + coarse) * width
    image = shape.batch * fine * width
    tokens = shape.batch * (shape.prefix + fine) * width
    patches = shape.batch * fine * values
    expand, refine = factor**2 * width * width, width * (width + values)
    weights, table = 2 * (expand + refine), 4 * fine * width
    # Every tensor once where it is an argument or a result, and twice (written, read) where it has to be in memory
    # between the products: before and after the kernel, here and on the way back. bf16; x, patches, positions, the
    # result and their gradients fp32.
    #
    # What the implementation moves beyond that, at XL: the kernel writes the whole result, biases and positions, and
    # the product reads and writes it again, 8 * tokens = 321 MB over the 536 of `forward`. This is because cuBLAS adds
    # a product to a matrix in memory, and has no epilogue for positions. The alternative is a product in bf16 and a
    # kernel that adds: 4 * tokens = 160 MB over (as much as now where the result is bf16), and one more rounding. To be
    # decided by measurement. Smaller: image tokens of x copied (38 MB), and weights laid out again (27 MB). On the way
    # back, over the 831 of `backward`: d_out written as bf16 and read so by both products, 6 * tokens = 241 MB.
    forward = 4 * x + 4 * image + 4 * tokens + 4 * patches + 4 * tokens + weights + table
    # d_out, tokens before GELU and normalised again, the gradients of both, x and its gradient, weights and theirs.
    backward = 4 * tokens + 2 * image + 4 * tokens + 4 * tokens + 4 * image + 8 * x + 4 * patches + 2 * weights
    product = 2 * shape.batch * (coarse * expand + (shape.prefix + fine) * width * width)
    skip = 2 * shape.batch * fine * values * width
    return [
        Case(
            "upsample_tokens",
            f"{shape.name}, {shape.tokens[0]} to {shape.tokens[1]} tokens",
            partial(_upsample_inputs, shape, factor, values),
            partial(_upsample_call, shape.prefix, factor),
            Cost(forward, product + skip),
            Cost(backward, 2 * product + skip),
        )
    ]


def _upsample_inputs(
    shape: Shape, factor: int, values: int, device: str | torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Draw x, weights and biases, patches, the skip's weight and bias, and a position table without gradient.

    Weights are as autocast has cast them; the skip's are products of others, which it computed.
    """
    width, (coarse, fine) = shape.width, shape.grids
    make, stream = (partial(_random, device=device, dtype=kind) for kind in (dtype, torch.float32))

    def matrix(rows: int, *columns: int) -> Tensor:
        return (make(rows, *columns, grad=False) * width**-0.5).requires_grad_()

    return [
        stream(shape.batch, shape.prefix + coarse**2, width),
        matrix(width * factor**2, width),
        matrix(width * factor**2),
        matrix(width, width),
        stream(width),
        stream(shape.batch, fine**2, values, grad=False),
        matrix(width, values),
        matrix(width),
        stream(fine**2, width, grad=False),
    ]


def _upsample_call(prefix: int, factor: int, *inputs: Any) -> Tensor:
    x, expand_weight, expand_bias, refine_weight, refine_bias, *skip, position = inputs
    weights = (expand_weight, expand_bias, refine_weight, refine_bias)
    dtype, device = expand_weight.dtype, "cpu" if x.is_meta else x.device.type
    with torch.autocast(device, dtype, enabled=dtype.itemsize == 2):
        return upsample_tokens(x, *weights, prefix, factor, tuple(skip), position)


# The time embedding of one batch.


CHANNELS = 32
"""W, as in the presets."""


def fno_shapes(channels: int, width: int, layers: int = 3) -> list[tuple[int, ...]]:
    """Return the shapes of the time embedding's weights, in the order of `names`."""
    mixing, point = (channels, channels, MODES), (channels, channels, 1)
    between = [mixing, mixing, point, (channels,)] * layers
    return [(channels, 1), (channels,), *between, (width, channels), (width,)]


def _fno(shape: Shape) -> list[Case]:
    batch, width, sizes = shape.batch, shape.width, fno_shapes(CHANNELS, shape.width)
    every = 4 * sum(math.prod(size) for size in sizes)
    # Bytes of what a pass takes and gives, of what forward keeps for backward, and of what backward's two launches pass
    # on, written and read; not of the tables of cosines, which never change.
    acting = every - 4 * CHANNELS**2 * (2 * MODES - 1)  # of the last layer's frequencies only zero
    biases = 4 * (3 * CHANNELS + width)  # of the layers and of the projection: backward needs none
    ends = 4 * batch * (1 + width)  # t and the result, or its gradient
    kept = 4 * CHANNELS * (batch * (2 * GRID + 2) + GRID + 1)
    passed = 4 * CHANNELS * batch * (2 * GRID + 1)  # d_mixed, d_lifted and d_z
    # Of a sample: two transforms, the middle layer's complex and pointwise mixings, the last layer, the projection.
    # Backward has no product for the pointwise weights' gradients: they are sums of the complex ones'.
    transform, mixing, pointwise = 2 * CHANNELS * GRID * GRID, 8 * MODES * CHANNELS**2, 2 * CHANNELS**2 * GRID
    once, twice = 2 * transform + pointwise, mixing + 2 * CHANNELS**2 + 2 * CHANNELS * width
    table = mixing // 2 + transform  # the first layer's, of the weights alone
    forward = Cost(ends + acting + kept, flops32=batch * (once + twice) + table)
    bytes = ends + acting - biases + kept + 2 * passed + every
    backward = Cost(bytes, flops32=batch * (once + 2 * twice) + 2 * table)
    label, inputs = f"{shape.name}, {batch} samples", partial(_fno_inputs, batch, sizes)
    return [Case("fno_time_embedding", label, inputs, _fno_call, forward, backward)]


def _fno_inputs(
    batch: int, sizes: list[tuple[int, ...]], device: str | torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Draw t, which gets no gradient, and the weights; fp32 whatever the dtype."""
    t = torch.rand(batch, device=device)
    return [t, *((0.2 * _random(*size, device=device, grad=False)).requires_grad_() for size in sizes)]


def _fno_call(t: Tensor, *weights: Tensor) -> Tensor:
    return fno_time_embedding(t, dict(zip(names((len(weights) - 4) // 4), weights, strict=True)))


# A step of all of a preset's parameters as one flat partition, as ZeRO has it: bare, and with clipping and a copy.


SETTINGS = Settings(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, ema_decay=0.999)
_UPLOADS = Uploads()


def _adamw_ema(shape: Shape) -> list[Case]:
    # Weights, moments and average are read and written in fp32; 4 bytes of gradient, or 2 of gradient and 2 of copy.
    cost = Cost(bytes=36 * shape.parameters)
    found = []
    for label, full in (("flat partition", False), ("clipped, with copy", True)):
        inputs = partial(_adamw_ema_inputs, shape.parameters, full)
        found.append(Case("adamw_ema", f"{shape.name}, {label}", inputs, _adamw_ema_call, cost))
    return found


def _adamw_ema_inputs(count: int, full: bool, device: str | torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Draw weights, gradient, two moments, average and step; and, where `full`, a copy and a factor."""
    state = [_random(count, device=device, grad=False) for _ in range(4)]
    state[2].square_()
    grad = _random(count, device=device, dtype=dtype if full else torch.float32, grad=False)
    step = torch.full((), 10.0, device=device)
    extra = [torch.empty(count, device=device, dtype=dtype), torch.full((), 0.5, device=device)]
    return [state[0], grad, *state[1:], step, *(extra if full else [])]


def _adamw_ema_call(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Take one step in place; returns what it wrote."""
    *states, step = tensors[:6]
    copy, factor = tensors[6:] or (None, None)
    batch = Batch(*([x] for x in states), [step.float()], None if copy is None else [copy])  # type: ignore[call-arg]
    update_batch_(batch, SETTINGS, factor, None, _UPLOADS)
    return (tensors[0], *tensors[2:5], *tensors[6:7])


_CASES: dict[str, Callable[[Shape], list[Case]]] = {
    "adaln": _adaln,
    "gelu_mlp": _gelu_mlp,
    "short_attn": _short_attn,
    "upsample": _upsample,
    "fno": _fno,
    "adamw_ema": _adamw_ema,
}
OPERATIONS = tuple(_CASES)
"""Operations' folders, in the order in which tables list them."""


def all_cases(shapes: Sequence[Shape] = SHAPES, folders: Sequence[str] = OPERATIONS) -> list[Case]:
    """Return every case of every operation, or of those in these folders."""
    return [case for folder in folders for shape in shapes for case in _CASES[folder](shape)]
