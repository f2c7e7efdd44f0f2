"""Patches in and out, positions, classes.

Letters: B batch, C channels, (H, W) size, p patch, (h, w) = (H/p, W/p) grid, n = h*w tokens, D width.
"""

from __future__ import annotations

import functools

import torch
from einops import rearrange
from torch import Tensor, nn

Grid = tuple[int, int]
"""Rows and columns, (h, w), of patches."""


def grid_of(x: Tensor, patch: int) -> Grid:
    """That of x [..., H, W]."""
    return x.shape[-2] // patch, x.shape[-1] // patch


def patchify(x: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [B, n, C*p*p], channel slowest: the order of a flattened convolution kernel."""
    return rearrange(x, "b c (h i) (w j) -> b (h w) (c i j)", i=patch, j=patch)


def unpatchify(tokens: Tensor, patch: int, grid: Grid) -> Tensor:
    """[B, n, p*p*C] -> [B, C, H, W], channel fastest: the order of the final layer's rows."""
    return rearrange(tokens, "b (h w) (i j c) -> b c (h i) (w j)", h=grid[0], i=patch, j=patch)


def sincos_position(width: int, grid: int | Grid, device: torch.device | None = None) -> Tensor:
    """Fixed 2-D position table, fp32 [h*w, width], of a grid (h, w), or of a square one.

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
    """Grid (h, w) -> its position table [h*w, D]: a buffer for the configured grid; others are made when first met."""

    table: Tensor

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.side = side
        # On the meta device left out as in meta.py: torch (2.13) imports its compiler to compute there.
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


class PatchEmbed(nn.Module):
    """[B, C, H, W] -> [B, n, D]: a convolution whose stride is its kernel, as one matrix product."""

    def __init__(self, patch: int, channels: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.weight = nn.Parameter(torch.empty(width, channels, patch, patch))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.xavier_uniform_(self.weight.data.view(width, -1))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(patchify(x, self.patch), self.weight.flatten(1), self.bias)


class ClassTokens(nn.Module):
    """Labels [B] -> [B, m, D]; the last of the num_classes + 1 rows is the null class."""

    def __init__(self, num_classes: int, tokens: int, width: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.table = nn.Embedding(num_classes + 1, tokens * width)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, y: Tensor) -> Tensor:
        return self.table(y).unflatten(1, (self.tokens, -1))


class InputStage(nn.Module):
    """How tokens enter the coarsest stage: class tokens (if any), then embedded patches with their positions."""

    def __init__(self, patch: int, channels: int, width: int, input_size: int) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(patch, channels, width)
        self.position = Position(width, input_size // patch)

    def forward(self, prefix: Tensor, x: Tensor) -> Tensor:
        """Class tokens [B, m, D], m may be 0, and x [B, C, H, W] -> [B, m+n, D]."""
        tokens = self.patch_embed(x) + self.position(grid_of(x, self.patch_embed.patch))
        return torch.cat([prefix.to(tokens.dtype), tokens], dim=1) if prefix.shape[1] else tokens
