"""Patches in and out, positions, classes. Letters: B batch, C channels, S side, p patch, n tokens, D width."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn


def patchify(x: Tensor, patch: int) -> Tensor:
    """[B, C, S, S] -> [B, n, C*p*p], channel slowest: the order of a flattened convolution kernel."""
    return rearrange(x, "b c (h i) (w j) -> b (h w) (c i j)", i=patch, j=patch)


def unpatchify(tokens: Tensor, patch: int, grid: int) -> Tensor:
    """[B, n, p*p*C] -> [B, C, S, S], channel fastest: the order of the final layer's rows."""
    return rearrange(tokens, "b (h w) (i j c) -> b c (h i) (w j)", h=grid, i=patch, j=patch)


def sincos_position(width: int, grid: int) -> Tensor:
    """Fixed 2-D position table, fp32 [grid*grid, width].

    The first half of the channels encodes the column and the second the row; in each, sines then cosines of
    position / 10000^(k / (width/4)). Computed in float64.
    """
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    column = axis[None].expand(grid, grid, -1)
    row = axis[:, None].expand(grid, grid, -1)
    return torch.cat([column, row], dim=2).reshape(grid * grid, width).float()


class PatchEmbed(nn.Module):
    """[B, C, S, S] -> [B, n, D]: a convolution whose stride is its kernel, as one matrix product."""

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

    position: Tensor

    def __init__(self, patch: int, channels: int, width: int, input_size: int) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(patch, channels, width)
        self.register_buffer("position", sincos_position(width, input_size // patch), persistent=False)

    def forward(self, prefix: Tensor | None, x: Tensor) -> Tensor:
        """prefix [B, m, D] or None, x [B, C, S, S] -> [B, m+n, D]."""
        tokens = self.patch_embed(x) + self.position
        return tokens if prefix is None else torch.cat([prefix.to(tokens.dtype), tokens], dim=1)
