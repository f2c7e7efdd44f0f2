"""From a coarse stage to the next finer one (MPDiT's Upsample block, section 3.1, and the variants of its Table 5)."""

from __future__ import annotations

import torch
from einops import rearrange
from mpdit_kernels import upsample_tokens
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from mpdit.model.blocks import EPS, MLP, init_linear, normalize
from mpdit.model.config import ModelConfig
from mpdit.model.embed import Grid, Position, grid_of, patchify


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


class ExpandTranspose(nn.Module):
    """The same as a transposed convolution: one bias per channel instead of one per channel and offset."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(width, width, factor, stride=factor)
        nn.init.xavier_uniform_(self.conv.weight.data.view(width, -1))
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, image: Tensor, grid: Grid) -> Tensor:
        return rearrange(self.conv(rearrange(image, "b (h w) d -> b d h w", h=grid[0])), "b d h w -> b (h w) d")


class RefineConv(nn.Module):
    """A 3 x 3 convolution of the image tokens; class tokens have no neighbours and take its centre tap."""

    def __init__(self, width: int, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.weight = nn.Parameter(torch.empty(width, width, 3, 3))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.xavier_uniform_(self.weight.data.view(width, -1))

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        image = rearrange(tokens[:, self.prefix :], "b (h w) d -> b d h w", h=grid[0])
        image = nn.functional.conv2d(image, self.weight, self.bias, padding=1)
        image = rearrange(image, "b d h w -> b (h w) d")
        if not self.prefix:
            return image
        return torch.cat([linear(tokens[:, : self.prefix], self.weight[:, :, 1, 1], self.bias), image], dim=1)


class Skip(nn.Module):
    """Input x [B, C, H, W] -> what a transition adds to all tokens, [B, m+n, D], or [m+n, D] without a skip.

    It is Linear(PatchEmbed(x)) + position on image tokens and zero on class tokens. Nothing nonlinear stands between
    the two products, so they are composed into one from C*p*p values, and both biases ride on the position table.
    """

    def __init__(self, config: ModelConfig, patch: int) -> None:
        super().__init__()
        width = config.width
        self.patch, self.prefix, self.shortcuts = patch, config.prefix_tokens, True
        self.position = Position(width, config.input_size // patch)
        self.enabled = config.skip
        if self.enabled:
            self.embed_weight = nn.Parameter(torch.empty(width, config.channels, patch, patch))
            self.embed_bias = nn.Parameter(torch.zeros(width))
            self.linear_weight = nn.Parameter(torch.empty(width, width))
            self.linear_bias = nn.Parameter(torch.zeros(width))
            nn.init.xavier_uniform_(self.embed_weight.data.view(width, -1))
            nn.init.xavier_uniform_(self.linear_weight)

    def composed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Patches [B, n, C*p*p] of x, and the one weight [D, C*p*p] and bias [D] they meet; None without a skip."""
        if not self.enabled:
            return None
        weight = self.linear_weight @ self.embed_weight.flatten(1)
        return patchify(x, self.patch), weight, linear(self.embed_bias, self.linear_weight, self.linear_bias)

    def forward(self, x: Tensor) -> Tensor:
        pad = (0, 0, self.prefix, 0)  # zero rows for the class tokens
        position = self.position(grid_of(x, self.patch))
        if not self.enabled:
            return nn.functional.pad(position, pad)
        if not self.shortcuts:
            embedded = linear(patchify(x, self.patch), self.embed_weight.flatten(1), self.embed_bias)
            return nn.functional.pad(linear(embedded, self.linear_weight, self.linear_bias) + position, pad)
        patches, weight, bias = self.composed(x)  # type: ignore[misc]
        return linear(nn.functional.pad(patches, pad), weight) + nn.functional.pad(position + bias, pad)


class Transition(nn.Module):
    """Tokens of a stage [B, m+n0, D] and the input x [B, C, H, W] -> tokens of the next stage [B, m+n1, D].

    Image tokens are expanded; with a refining layer, they pass tanh-GELU, are joined by the class tokens, and all pass
    LN and that layer; then the skip and the finer positions are added to the image tokens.
    """

    def __init__(self, config: ModelConfig, coarse_patch: int, patch: int) -> None:
        super().__init__()
        width, self.prefix = config.width, config.prefix_tokens
        self.coarse_patch = coarse_patch
        expand, _, refine = config.transition.partition("_")
        expander = ExpandTranspose if expand == "conv" else Expand
        self.expand = expander(width, coarse_patch // patch)
        self.refine: nn.Module | None = None
        if expand == "linear" and refine:
            self.refine = {
                "linear": lambda: nn.Linear(width, width),
                "mlp": lambda: MLP(width, 4 * width),
                "conv": lambda: RefineConv(width, self.prefix),
            }[refine]()
        if isinstance(self.refine, nn.Linear):
            init_linear(self.refine)
        self.skip = Skip(config, patch)

    def forward(self, tokens: Tensor, x: Tensor) -> Tensor:
        coarse, fine = grid_of(x, self.coarse_patch), grid_of(x, self.skip.patch)
        if self.skip.shortcuts and isinstance(self.expand, Expand) and isinstance(self.refine, nn.Linear):
            return upsample_tokens(
                tokens,
                self.expand.weight,
                self.expand.bias,
                self.refine.weight,
                self.refine.bias,
                num_class_tokens=self.prefix,
                factor=self.expand.factor,
                skip=self.skip.composed(x),
                position=self.skip.position(fine),
                grid=coarse,
                eps=EPS,
            )
        image = self.expand(tokens[:, self.prefix :], coarse)
        if self.refine is not None:
            image = gelu(image, approximate="tanh")
        joined = torch.cat([tokens[:, : self.prefix].to(image.dtype), image], dim=1) if self.prefix else image
        if self.refine is not None:
            grids = (fine,) if isinstance(self.refine, RefineConv) else ()
            joined = self.refine(normalize(joined), *grids)
        return joined + self.skip(x)
