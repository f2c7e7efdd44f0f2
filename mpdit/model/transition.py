"""The ways from coarse tokens to fine ones that model.mpdit.Upsample knows (MPDiT, section 3.1 and Table 5).

kinds.py has the table of them; a new one is a module here and its entry there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from mpdit.model.config import ModelConfig
from mpdit.model.kinds import TRANSITIONS, entry_of, module_of
from mpdit.model.layers import MLP, Grid, init_linear


class TransitionCost(NamedTuple):
    """Counts what planning needs of a layer that expands or refines tokens.

    Attributes:
        params: trainable parameters.
        macs: multiply-accumulates of each image token that comes in.
        class_macs: of each class token; none comes into an expanding layer.
        kept: numbers that backward keeps for each token that comes in. Of an expanding layer all it saves, so `width`
            if that is its input alone; GELU's input is counted by the model. Of a refining layer what it saves beside
            its input, with the Triton kernels; the model doubles it where there are none.
        moved: numbers that the layer's copies and activations read and write for each token that comes in, forward and
            backward. Not read of a transition that a kernel does in one piece.
    """

    params: int
    macs: int
    class_macs: int = 0
    kept: int = 0
    moved: int = 0


class Expand(nn.Module):
    """Maps image tokens [B, h*w, D] to [B, h*r*w*r, D]: a Linear D -> r*r*D, then a pixel-shuffle onto the finer grid.

    The weight's rows are ordered (channel, i, j), as in the official code. They are reordered to (i, j, channel), so
    that each D-wide slice of the product is a whole fine token and the shuffle moves contiguous rows.
    """

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.weight = nn.Parameter(torch.empty(width * factor * factor, width))
        self.bias = nn.Parameter(torch.empty(width * factor * factor))
        init_linear(self)

    def forward(self, image: Tensor, grid: Grid) -> Tensor:
        rows = {"i": self.factor, "j": self.factor}
        weight = rearrange(self.weight, "(d i j) k -> (i j d) k", **rows)
        bias = rearrange(self.bias, "(d i j) -> (i j d)", **rows)
        return rearrange(linear(image, weight, bias), "b (h w) (i j d) -> b (h i w j) d", h=grid[0], **rows)

    @staticmethod
    def cost(width: int, factor: int) -> TransitionCost:
        shuffle = 2 * 2 * factor**2 * width  # of the fine tokens: read and written, and their gradients
        return TransitionCost(factor**2 * width * (width + 1), factor**2 * width**2, kept=width, moved=shuffle)


class ExpandTranspose(nn.Module):
    """Do as Expand by a transposed convolution: one bias per channel instead of one per channel and offset."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(width, width, factor, stride=factor)
        nn.init.xavier_uniform_(self.conv.weight.data.view(width, -1))
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, image: Tensor, grid: Grid) -> Tensor:
        return rearrange(self.conv(rearrange(image, "b (h w) d -> b d h w", h=grid[0])), "b d h w -> b (h w) d")

    @staticmethod
    def cost(width: int, factor: int) -> TransitionCost:
        layouts = 2 * 2 * (1 + factor**2) * width  # channels first, and back
        return TransitionCost(factor**2 * width**2 + width, factor**2 * width**2, kept=width, moved=layouts)


class RefineLinear(nn.Linear):
    """Applies a Linear to all tokens [B, m+n, D]."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        init_linear(self)

    def forward(self, tokens: Tensor, num_class_tokens: int, grid: Grid) -> Tensor:  # type: ignore[override]
        return super().forward(tokens)

    @staticmethod
    def cost(width: int) -> TransitionCost:
        return TransitionCost(width * (width + 1), width**2, width**2)


class RefineMLP(MLP):
    """Applies an MLP to all tokens [B, m+n, D], 4D wide."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 4 * width)

    def forward(self, tokens: Tensor, num_class_tokens: int, grid: Grid) -> Tensor:  # type: ignore[override]
        return super().forward(tokens)

    @staticmethod
    def cost(width: int) -> TransitionCost:
        activation = 6 * 4 * width  # GELU: forward reads and writes, backward reads two and writes two
        return TransitionCost(8 * width**2 + 5 * width, 8 * width**2, 8 * width**2, kept=4 * width, moved=activation)


class RefineConv(nn.Module):
    """Convolves image tokens by 3 x 3; class tokens have no neighbours and take the centre tap."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width, 3, 3))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.xavier_uniform_(self.weight.data.view(width, -1))

    def forward(self, tokens: Tensor, num_class_tokens: int, grid: Grid) -> Tensor:
        image = rearrange(tokens[:, num_class_tokens:], "b (h w) d -> b d h w", h=grid[0])
        image = rearrange(conv2d(image, self.weight, self.bias, padding=1), "b d h w -> b (h w) d")
        if not num_class_tokens:
            return image
        return torch.cat([linear(tokens[:, :num_class_tokens], self.weight[:, :, 1, 1], self.bias), image], dim=1)

    @staticmethod
    def cost(width: int) -> TransitionCost:
        layouts = 2 * 2 * 2 * width  # channels first, and back
        return TransitionCost(9 * width**2 + width, 9 * width**2, width**2, moved=layouts)


class Transition(NamedTuple):
    """Names the modules of a transition, and whether mpdit_kernels.upsample_tokens does it in one piece."""

    expand: Any
    refine: Any
    """None for none."""
    fused: bool


def transition_of(config: ModelConfig) -> Transition:
    """Return the configured transition's modules; ConfigError if there is none of that name."""
    kind = entry_of(TRANSITIONS, "transition", config.transition)
    return Transition(module_of(kind.expand), module_of(kind.refine) if kind.refine else None, kind.fused)
