"""The ways from coarse tokens to fine ones that model.mpdit.Upsample knows (MPDiT, section 3.1 and Table 5).

A new kind is one entry of TRANSITIONS, which the model and mpdit.planning read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from mpdit.model.config import ModelConfig, entry_of
from mpdit.model.layers import MLP, Grid, init_linear


class Cost(NamedTuple):
    """What planning needs of a layer that expands or refines tokens.

    Attributes:
        params: trainable parameters.
        macs: multiply-accumulates of each image token that comes in.
        class_macs: of each class token; none comes into an expanding layer.
        kept: numbers that backward keeps for each token that comes in. Of an expanding layer all it saves, so `width`
            if that is its input alone; GELU's input is counted by the model. Of a refining layer what it saves beside
            its input, with the Triton kernels; the model doubles it where there are none.
    """

    params: int
    macs: int
    class_macs: int = 0
    kept: int = 0


class Expand(nn.Module):
    """Image tokens [B, h*w, D] -> [B, h*r*w*r, D]: a Linear D -> r*r*D, then a pixel-shuffle onto the finer grid.

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
    def cost(width: int, factor: int) -> Cost:
        return Cost(factor**2 * width * (width + 1), factor**2 * width**2, kept=width)


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
    def cost(width: int, factor: int) -> Cost:
        return Cost(factor**2 * width**2 + width, factor**2 * width**2, kept=width)


class RefineLinear(nn.Linear):
    """A Linear of all tokens [B, m+n, D]."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        init_linear(self)

    def forward(self, tokens: Tensor, num_class_tokens: int, grid: Grid) -> Tensor:  # type: ignore[override]
        return super().forward(tokens)

    @staticmethod
    def cost(width: int) -> Cost:
        return Cost(width * (width + 1), width**2, width**2)


class RefineMLP(MLP):
    """An MLP of all tokens [B, m+n, D], 4D wide."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 4 * width)

    def forward(self, tokens: Tensor, num_class_tokens: int, grid: Grid) -> Tensor:  # type: ignore[override]
        return super().forward(tokens)

    @staticmethod
    def cost(width: int) -> Cost:
        return Cost(8 * width**2 + 5 * width, 8 * width**2, 8 * width**2, kept=4 * width)


class RefineConv(nn.Module):
    """A 3 x 3 convolution of the image tokens; class tokens have no neighbours and take its centre tap."""

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
    def cost(width: int) -> Cost:
        return Cost(9 * width**2 + width, 9 * width**2, width**2)


class TransitionKind(NamedTuple):
    """An entry of TRANSITIONS; expand and refine are modules with a `cost`."""

    expand: Any
    """Made of (width, factor); takes image tokens [B, n0, D] and their grid to [B, n1, D].

    Under autocast tokens come in fp32 and leave in its dtype, as they do from a Linear: planning counts on that.
    """
    refine: Any
    """Made of (width); takes all tokens [B, m+n1, D], m and the fine grid to the same shape. None for none."""
    help: str
    fused: bool = False
    """mpdit_kernels.upsample_tokens does it in one piece."""


TRANSITIONS = {
    "linear": TransitionKind(Expand, None, "a Linear onto the finer grid"),
    "conv_transpose": TransitionKind(ExpandTranspose, None, "a transposed convolution"),
    "linear_linear": TransitionKind(Expand, RefineLinear, "linear, then GELU, norm and a Linear", fused=True),
    "linear_mlp": TransitionKind(Expand, RefineMLP, "linear, then GELU, norm and an MLP"),
    "linear_conv": TransitionKind(Expand, RefineConv, "linear, then GELU, norm and a 3 x 3 convolution"),
}


def transition_kind(config: ModelConfig) -> TransitionKind:
    """Return the configured entry of TRANSITIONS; ConfigError if there is none."""
    return entry_of(TRANSITIONS, "transition", config.transition)
