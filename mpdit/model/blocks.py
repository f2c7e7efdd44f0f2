"""The transformer block and the final layer, both steered by adaptive layer norm (DiT's adaLN-Zero)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from mpdit_kernels import (
    adaln_modulate,
    attention,
    attention_varlen,
    gated_residual,
    gated_residual_adaln,
    gelu_linear,
)
from mpdit_kernels.backends import BackendError
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from mpdit.core.errors import ConfigError
from mpdit.model.embed import Grid, unpatchify
from mpdit.model.layout import Layout
from mpdit.model.time import Modulation

EPS = 1e-6
"""Of every layer norm; none has an affine part."""


def normalize(x: Tensor) -> Tensor:
    """Layer norm over the last axis without affine part."""
    return layer_norm(x, x.shape[-1:], eps=EPS)


class Stream(NamedTuple):
    """The residual stream x + gate * branch, whose last branch is still to be added: x alone when there is none.

    The sum is left to whoever reads the stream, who has a pass over it to make anyway: mostly the next layer norm.

    Attributes:
        x, branch: tokens as the layout has them, [B, T, D] or [N, D].
        gate: [B, D].
    """

    x: Tensor
    layout: Layout
    branch: Tensor | None = None
    gate: Tensor | None = None

    @classmethod
    def of(cls, groups: Sequence[Tensor], prefix: int) -> Stream:
        """From dense groups of tokens [B_g, T_g, D], `prefix` class tokens first in each image's."""
        return cls(Layout.join(groups), Layout([(len(group), group.shape[1]) for group in groups], prefix))

    def groups(self) -> list[Tensor]:
        """The sum as dense groups [B_g, T_g, D]."""
        return self.layout.split(self.settle())

    def settle(self) -> Tensor:
        """The sum, in the dtype of x."""
        if self.branch is None or self.gate is None:
            return self.x
        return gated_residual(self.x, self.branch, self.gate, cu_seqlens=self.layout.cu_seqlens)

    def modulate(self, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The sum, and LN(sum) * (1 + scale [B,D]) + shift [B,D] as the next matrix product takes it."""
        cu_seqlens = self.layout.cu_seqlens
        if self.branch is None or self.gate is None:
            return self.x, adaln_modulate(self.x, shift, scale, EPS, cu_seqlens=cu_seqlens)
        return gated_residual_adaln(self.x, self.branch, self.gate, shift, scale, EPS, cu_seqlens=cu_seqlens)

    def without_first(self, count: int) -> Stream:
        """The same without each image's first so many tokens."""
        branch = None if self.branch is None else self.layout.drop_first(self.branch, count)
        return Stream(self.layout.drop_first(self.x, count), self.layout.without_first(count), branch, self.gate)


class Attention(nn.Module):
    """Multi-head self-attention of each image's tokens; packed projection with bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = PackedLinear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        init_linear(self.proj)

    def forward(self, x: Tensor, cu_seqlens: tuple[int, ...] | None = None, first_query: int = 0) -> Tensor:
        """[B, T, D] -> [B, T - first_query, D]: tokens before `first_query` are keys and values only.

        With cumulative lengths of S images, [N, D] -> [N - S * first_query, D].
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        try:
            if cu_seqlens is None:
                mixed = attention(qkv, first_query=first_query)
            else:
                mixed = attention_varlen(qkv, cu_seqlens, first_query=first_query)
        except BackendError as error:
            raise ConfigError(str(error)) from None
        return self.proj(mixed.flatten(-2))


class PackedLinear(nn.Linear):
    """Query, key and value projections as one Linear, initialised by a single draw: a seed keeps its weights."""

    def reset_parameters(self) -> None:
        init_linear(self)


class MLP(nn.Module):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        init_linear(self.fc1)
        init_linear(self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        return gelu_linear(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


class Block(nn.Module):
    """x += gate * attention(adaLN(x)); x += gate * mlp(adaLN(x)). With `own_modulation` it owns the 6D Linear."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, own_modulation: bool = False) -> None:
        super().__init__()
        self.modulation = Modulation(width, 6) if own_modulation else None
        self.attention = Attention(width, heads)
        self.mlp = MLP(width, int(width * mlp_ratio))

    def forward(self, stream: Stream, condition: Tensor, first_query: int = 0) -> Stream:
        """A stream -> the next, the MLP's branch to be added, and without each image's first `first_query` tokens.

        `condition` is the shared modulation [B, 6D], or the condition vector [B, D] when the block owns its modulation.
        """
        modulation = condition if self.modulation is None else self.modulation(condition)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x, modulated = stream.modulate(shift1, scale1)
        branch = self.attention(modulated, stream.layout.cu_seqlens, first_query)
        stream = Stream(x, stream.layout).without_first(first_query)._replace(branch=branch, gate=gate1)
        x, modulated = stream.modulate(shift2, scale2)
        return Stream(x, stream.layout, self.mlp(modulated), gate2)


class FinalLayer(nn.Module):
    """A stream -> velocities [B_g,C,H_g,W_g]: adaLN and a zero-initialised Linear of the image tokens, unpatched."""

    def __init__(self, width: int, patch: int, channels: int, learn_sigma: bool, own_modulation: bool) -> None:
        super().__init__()
        self.patch, self.channels = patch, channels
        rows = patch * patch * channels * (2 if learn_sigma else 1)
        self.modulation = Modulation(width, 2) if own_modulation else None
        self.weight = nn.Parameter(torch.zeros(rows, width))
        self.bias = nn.Parameter(torch.zeros(rows))

    def forward(self, stream: Stream, condition: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        """`grids` are those of the finest patches, one a group."""
        if self.modulation is None:
            shift, scale = condition.chunk(6, dim=-1)[3:5]  # the blocks' mlp shift and scale
        else:
            shift, scale = self.modulation(condition).chunk(2, dim=-1)
        # Rows are (i, j, channel); with learn_sigma the channels after the first C predict a variance nobody reads.
        weight = self.weight.unflatten(0, (self.patch**2, -1))[:, : self.channels].flatten(0, 1)
        bias = self.bias.unflatten(0, (self.patch**2, -1))[:, : self.channels].flatten()
        stream = stream.without_first(stream.layout.prefix)
        _, modulated = stream.modulate(shift, scale)
        pixels = stream.layout.split(linear(modulated, weight, bias))
        return [unpatchify(group, self.patch, grid) for group, grid in zip(pixels, grids, strict=True)]


def init_linear(module: nn.Module) -> None:
    """Xavier-uniform weight, zero bias."""
    nn.init.xavier_uniform_(module.weight)  # type: ignore[arg-type]
    nn.init.zeros_(module.bias)  # type: ignore[arg-type]
