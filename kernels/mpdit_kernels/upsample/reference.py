"""The definition, in plain PyTorch.

Letters: B batch, D width, m class tokens, n0 = h * w coarse and n1 = r * r * n0 fine image tokens, K values of a patch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, pad


def upsample_tokens(
    x: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    refine_weight: Tensor,
    refine_bias: Tensor,
    m: int,
    r: int,
    skip: tuple[Tensor, Tensor, Tensor] | None,
    position: Tensor | None,
    grid: tuple[int, int],
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Compute x [B, m+n0, D] -> [B, m+n1, D] as `dtype`; the arguments are those of the public function."""
    expand_weight, expand_bias = offset_major(expand_weight, r), offset_major(expand_bias, r)
    offsets = linear(x[:, m:], expand_weight, expand_bias)  # [B, n0, r*r*D]
    offsets = offsets.unflatten(1, grid).unflatten(3, (r, r, -1))  # [B, h, w, r, r, D]
    # The pixel-shuffle: fine row h*r + i, fine column w*r + j.
    image = gelu(offsets.transpose(2, 3).flatten(1, 4), approximate="tanh")  # [B, n1, D]
    joined = torch.cat([x[:, :m].to(image.dtype), image], dim=1) if m else image  # [B, m+n1, D]
    joined = linear(layer_norm(joined, joined.shape[-1:], eps=eps), refine_weight, refine_bias)

    below = (0, 0, m, 0)  # zero rows for the class tokens
    if skip is not None:
        patches, skip_weight, skip_bias = skip
        table = skip_bias.expand(image.shape[1], -1) if position is None else position + skip_bias  # [n1, D]
        joined = joined + (linear(pad(patches, below), skip_weight) + pad(table, below))
    elif position is not None:
        joined = joined + pad(position, below)
    return joined.to(dtype)


def offset_major(x: Tensor, r: int) -> Tensor:
    """Reorder rows of x [D*r*r, ...] from (channel, i, j) to (i, j, channel).

    Each D-wide slice of the product is then a whole fine token, and the pixel-shuffle moves contiguous rows.
    """
    return x.unflatten(0, (-1, r, r)).movedim(0, 2).flatten(0, 2)
