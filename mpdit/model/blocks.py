"""The transformer block and the final layer, both steered by adaptive layer norm (DiT's adaLN-Zero)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from mpdit_kernels import adaln_modulate, gated_residual, gated_residual_adaln, gelu_linear
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention

from mpdit.model.embed import unpatchify
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
        x, branch: [B, T, D].
        gate: [B, D].
    """

    x: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None

    def settle(self) -> Tensor:
        """The sum [B, T, D], in the dtype of x."""
        if self.branch is None or self.gate is None:
            return self.x
        return gated_residual(self.x, self.branch, self.gate)

    def modulate(self, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The sum, and LN(sum) * (1 + scale [B,D]) + shift [B,D] as the next matrix product takes it."""
        if self.branch is None or self.gate is None:
            return self.x, adaln_modulate(self.x, shift, scale, EPS)
        return gated_residual_adaln(self.x, self.branch, self.gate, shift, scale, EPS)

    def last(self, tokens: int) -> Stream:
        """The last so many tokens."""
        return self._replace(x=self.x[:, -tokens:], branch=None if self.branch is None else self.branch[:, -tokens:])


class Attention(nn.Module):
    """Multi-head self-attention on [B, T, D], packed projection with bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = PackedLinear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        init_linear(self.proj)

    def forward(self, x: Tensor, first_query: int = 0) -> Tensor:
        """[B, T, D] -> [B, T - first_query, D]: tokens before `first_query` are keys and values only."""
        qkv = self.qkv(x, first_query)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv)
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class PackedLinear(nn.Module):
    """Query, key and value projections whose weight [3D, D] and bias [3D] are stored as one."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, width))
        self.bias = nn.Parameter(torch.empty(out))
        init_linear(self)

    def forward(self, x: Tensor, first_query: int) -> tuple[Tensor, ...]:
        if not first_query:
            return linear(x, self.weight, self.bias).chunk(3, dim=-1)
        width = x.shape[-1]
        queries = x[:, first_query:].contiguous()  # else the product is a batch of small ones
        query = linear(queries, self.weight[:width], self.bias[:width])
        return query, *linear(x, self.weight[width:], self.bias[width:]).chunk(2, dim=-1)


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
        """A stream of [B,T,D] -> one of [B, T - first_query, D], the MLP's branch to be added.

        `condition` is the shared modulation [B, 6D], or the condition vector [B, D] when the block owns its modulation.
        """
        modulation = condition if self.modulation is None else self.modulation(condition)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x, modulated = stream.modulate(shift1, scale1)
        stream = Stream(x[:, first_query:], self.attention(modulated, first_query), gate1)
        x, modulated = stream.modulate(shift2, scale2)
        return Stream(x, self.mlp(modulated), gate2)


class FinalLayer(nn.Module):
    """A stream of [B,T,D] -> velocity [B,C,S,S]: adaLN and a zero-initialised Linear of the image tokens, unpatched."""

    def __init__(
        self, width: int, patch: int, channels: int, grid: int, learn_sigma: bool, own_modulation: bool
    ) -> None:
        super().__init__()
        self.patch, self.channels, self.grid = patch, channels, grid
        rows = patch * patch * channels * (2 if learn_sigma else 1)
        self.modulation = Modulation(width, 2) if own_modulation else None
        self.weight = nn.Parameter(torch.zeros(rows, width))
        self.bias = nn.Parameter(torch.zeros(rows))

    def forward(self, stream: Stream, condition: Tensor) -> Tensor:
        if self.modulation is None:
            shift, scale = condition.chunk(6, dim=-1)[3:5]  # the blocks' mlp shift and scale
        else:
            shift, scale = self.modulation(condition).chunk(2, dim=-1)
        # Rows are (i, j, channel); with learn_sigma the channels after the first C predict a variance nobody reads.
        weight = self.weight.unflatten(0, (self.patch**2, -1))[:, : self.channels].flatten(0, 1)
        bias = self.bias.unflatten(0, (self.patch**2, -1))[:, : self.channels].flatten()
        _, modulated = stream.last(self.grid**2).modulate(shift, scale)
        return unpatchify(linear(modulated, weight, bias), self.patch, self.grid)


def init_linear(module: nn.Module) -> None:
    """Xavier-uniform weight, zero bias."""
    nn.init.xavier_uniform_(module.weight)  # type: ignore[arg-type]
    nn.init.zeros_(module.bias)  # type: ignore[arg-type]
