"""The transformer block and the final layer, both steered by adaptive layer norm (DiT's adaLN-Zero)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

from mpdit.model.embed import unpatchify
from mpdit.model.time import Modulation

EPS = 1e-6
"""Of every layer norm; none has an affine part."""


def normalize(x: Tensor) -> Tensor:
    """Layer norm over the last axis without affine part."""
    return layer_norm(x, x.shape[-1:], eps=EPS)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(x [B,T,D]) * (1 + scale [B,D]) + shift [B,D], in the dtype of x."""
    return torch.addcmul(shift[:, None], normalize(x), 1 + scale[:, None]).to(x.dtype)


def gated_residual(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x [B,T,D] + gate [B,D] * branch [B,T,D], in the dtype of x."""
    return torch.addcmul(x, gate[:, None], branch).to(x.dtype)


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
        query = linear(x[:, first_query:], self.weight[:width], self.bias[:width])
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
        return self.fc2(gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """x += gate * attention(adaLN(x)); x += gate * mlp(adaLN(x)). With `own_modulation` it owns the 6D Linear."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, own_modulation: bool = False) -> None:
        super().__init__()
        self.modulation = Modulation(width, 6) if own_modulation else None
        self.attention = Attention(width, heads)
        self.mlp = MLP(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, condition: Tensor, first_query: int = 0) -> Tensor:
        """x [B,T,D] -> [B, T - first_query, D].

        `condition` is the shared modulation [B, 6D], or the condition vector [B, D] when the block owns its modulation.
        """
        modulation = condition if self.modulation is None else self.modulation(condition)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        branch = self.attention(modulate(x, shift1, scale1), first_query)
        x = gated_residual(x[:, first_query:], gate1, branch)
        return gated_residual(x, gate2, self.mlp(modulate(x, shift2, scale2)))


class FinalLayer(nn.Module):
    """Tokens [B, n, D] -> velocity [B, C, S, S]: adaLN, a zero-initialised Linear, patches put back in place."""

    def __init__(
        self, width: int, patch: int, channels: int, grid: int, learn_sigma: bool, own_modulation: bool
    ) -> None:
        super().__init__()
        self.patch, self.channels, self.grid = patch, channels, grid
        rows = patch * patch * channels * (2 if learn_sigma else 1)
        self.modulation = Modulation(width, 2) if own_modulation else None
        self.weight = nn.Parameter(torch.zeros(rows, width))
        self.bias = nn.Parameter(torch.zeros(rows))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        if self.modulation is None:
            shift, scale = condition.chunk(6, dim=-1)[3:5]  # the blocks' mlp shift and scale
        else:
            shift, scale = self.modulation(condition).chunk(2, dim=-1)
        # Rows are (i, j, channel); with learn_sigma the channels after the first C predict a variance nobody reads.
        weight = self.weight.unflatten(0, (self.patch**2, -1))[:, : self.channels].flatten(0, 1)
        bias = self.bias.unflatten(0, (self.patch**2, -1))[:, : self.channels].flatten()
        return unpatchify(linear(modulate(x, shift, scale), weight, bias), self.patch, self.grid)


def init_linear(module: nn.Module) -> None:
    """Xavier-uniform weight, zero bias."""
    nn.init.xavier_uniform_(module.weight)  # type: ignore[arg-type]
    nn.init.zeros_(module.bias)  # type: ignore[arg-type]
