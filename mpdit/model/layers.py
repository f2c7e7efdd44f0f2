"""Leaves of the model: norm, MLP, cutting into patches and joining them, positions; and checks of its inputs.

Letters in shapes: B images, C channels, (H, W) size, p patch, (h, w) = (H/p, W/p) grid, n = h*w image tokens, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from einops import rearrange
from mpdit_kernels import gelu_linear
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from mpdit.core.errors import ConfigError
from mpdit.model.config import ModelConfig

EPS = 1e-6
"""Added to the variance in every layer norm; none has an affine part."""

Latents = Tensor | Sequence[Tensor]
"""A batch of images: a tensor [B, C, S, S], or a list of [C, H, W] of several sizes."""

Grid = tuple[int, int]
"""Rows and columns, (h, w), of patches."""

M = TypeVar("M", bound=nn.Module)


def module_list(modules: Iterable[M]) -> Sequence[M]:
    """Make a ModuleList whose element type is known to type checkers."""
    return cast(Sequence[M], nn.ModuleList(modules))


def at_least_fp32(x: Tensor) -> Tensor:
    """Return x in fp32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


def init_linear(module: nn.Module) -> None:
    """Initialise a Linear's weight Xavier-uniform and its bias zero."""
    nn.init.xavier_uniform_(module.weight)  # type: ignore[arg-type]
    nn.init.zeros_(module.bias)  # type: ignore[arg-type]


def normalize(x: Tensor) -> Tensor:
    """Apply layer norm over the last axis without affine part."""
    return layer_norm(x, x.shape[-1:], eps=EPS)


class MLP(nn.Module):
    """Applies Linear, tanh-GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        init_linear(self.fc1)
        init_linear(self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        return gelu_linear(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


def grid_of(x: Tensor, patch: int) -> Grid:
    """Return the grid of patches of x [..., H, W]."""
    return x.shape[-2] // patch, x.shape[-1] // patch


def patchify(x: Tensor, patch: int) -> Tensor:
    """Cut [B, C, H, W] into [B, n, C*p*p], channel slowest: the order of a flattened convolution kernel."""
    return rearrange(x, "b c (h i) (w j) -> b (h w) (c i j)", i=patch, j=patch)


def unpatchify(tokens: Tensor, patch: int, grid: Grid) -> Tensor:
    """Join [B, n, p*p*C] to [B, C, H, W], channel fastest: the order of the final layer's rows."""
    return rearrange(tokens, "b (h w) (i j c) -> b c (h i) (w j)", h=grid[0], i=patch, j=patch)


def sincos_position(width: int, grid: int | Grid, device: torch.device | None = None) -> Tensor:
    """Compute the fixed 2-D position table, fp32 [h*w, width], of a grid (h, w), or of a square one.

    The first half of the channels encodes the column and the second the row; in each, sines then cosines of
    position / 10000^(k / (width/4)). Computed in float64.
    """
    h, w = (grid, grid) if isinstance(grid, int) else grid
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64, device=device) / (width // 4))
    angle = torch.arange(max(h, w), dtype=torch.float64, device=device)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    column = axis[None, :w].expand(h, w, -1)
    row = axis[:h, None].expand(h, w, -1)
    return torch.cat([column, row], dim=2).reshape(h * w, width).float()


class Position(nn.Module):
    """Gives a grid (h, w) its position table [n, D]: a buffer for the configured grid; others are made when met."""

    table: Tensor

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.side = side
        # Left out on the meta device: torch (2.13) imports its compiler to compute there, see pretrained.py.
        meta = torch.get_default_device().type == "meta"
        table = torch.empty(side * side, width) if meta else sincos_position(width, side)
        self.register_buffer("table", table, persistent=False)

    def forward(self, grid: Grid) -> Tensor:
        if grid == (self.side, self.side):
            return self.table
        width, device, dtype = self.table.shape[1], self.table.device, self.table.dtype
        if torch.compiler.is_compiling():  # a compiled graph makes it anew
            return sincos_position(width, grid, device).to(dtype)
        return _made_once(width, grid, device, dtype)


@functools.lru_cache(maxsize=64)
def _made_once(width: int, grid: Grid, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return sincos_position(width, grid).to(device, dtype)


def check_images(name: str, batch: Any) -> None:
    """Raise ConfigError unless batch is a list of images [C, H, W] that differ in size alone."""
    if not isinstance(batch, list | tuple):
        raise ConfigError(f"{name} is a {type(batch).__name__}: give a tensor [B, C, H, W], or a list of [C, H, W]")
    if not batch:
        raise ConfigError(f"{name} is an empty list: give at least one image [C, H, W]")
    for i, image in enumerate(batch):
        if not isinstance(image, Tensor):
            raise ConfigError(f"{name}[{i}] is a {type(image).__name__}: give tensors [C, H, W]")
        if image.ndim != 3:
            raise ConfigError(f"{name}[{i}] has shape {tuple(image.shape)}: give one image [C, H, W]")
        for what in ("device", "dtype"):
            got, first = getattr(image, what), getattr(batch[0], what)
            if got != first:
                raise ConfigError(f"{name}[{i}] has {what} {got} and {name}[0] {first}: give all the same")
        if image.shape[0] != batch[0].shape[0]:
            raise ConfigError(
                f"{name}[{i}] has {image.shape[0]} channels and {name}[0] {batch[0].shape[0]}: give all the same"
            )


def check_inputs(config: ModelConfig, x: Latents, t: Tensor, y: Tensor) -> None:
    """Raise ConfigError for latents, times or labels that the model can't take: see MPDiT.forward."""
    channels, size, coarsest = config.channels, config.input_size, config.stages[0].patch
    if isinstance(x, Tensor):
        if x.ndim != 4 or tuple(x.shape[1:]) != (channels, size, size):
            raise ConfigError(f"x has shape {tuple(x.shape)}, expected (batch, {channels}, {size}, {size})")
    else:
        check_images("x", x)
        for index, image in enumerate(x):
            if image.shape[0] != channels or not all(side and side % coarsest == 0 for side in image.shape[1:]):
                raise ConfigError(
                    f"x[{index}] has shape {tuple(image.shape)}, expected ({channels}, H, W) with H and W "
                    f"multiples of the coarsest patch {coarsest}"
                )
    for name, value in (("t", t), ("y", y)):
        if value.shape != (len(x),):
            raise ConfigError(f"{name} has shape {tuple(value.shape)}, expected ({len(x)},) as x has {len(x)} rows")
    if y.is_floating_point():
        raise ConfigError(f"y has dtype {y.dtype}, expected int64 labels in 0..{config.num_classes}")
    if y.device.type == "cpu" and len(y) and not torch.compiler.is_compiling():
        low, high = int(y.min()), int(y.max())
        if low < 0 or high > config.num_classes:
            raise ConfigError(f"y holds labels from {low} to {high}, expected 0..{config.num_classes}")
