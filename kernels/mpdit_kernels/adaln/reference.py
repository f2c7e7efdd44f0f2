"""The definitions, in plain PyTorch. Letters: B batch, T tokens, D width.

LN is layer norm over D without affine part. Statistics and the affine part of what is normalised are taken in the
widest of the dtypes at hand, as torch promotes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm


def adaln_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Compute LN(x [B, T, D]) * (1 + scale [B, D]) + shift [B, D], as `dtype`."""
    normalized = layer_norm(x, x.shape[-1:], eps=eps)  # [B, T, D]
    return torch.addcmul(shift[:, None], normalized, 1 + scale[:, None]).to(dtype)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """Compute x [B, T, D] + gate [B, D] * branch [B, T, D], as the dtype of x."""
    return torch.addcmul(x, gate[:, None], branch).to(x.dtype)


def gated_residual_adaln(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute the gated residual, and its modulated layer norm as `dtype`; both [B, T, D]."""
    residual = gated_residual(x, branch, gate)
    return residual, adaln_modulate(residual, shift, scale, eps, dtype)


def packed(
    function: Callable[..., Any], lengths: Sequence[int], tokens: list[Tensor], vectors: list[Tensor], *rest: Any
) -> list[Tensor]:
    """Compute one of the above for sequences packed as [N, D], vectors [S, D]: neighbours of a length are a batch."""
    batches = [(len(list(same)), length) for length, same in groupby(lengths)] or [(0, 1)]
    wide = [x.split([count * length for count, length in batches]) for x in tokens]
    narrow = [vector.split([count for count, _ in batches]) for vector in vectors]
    results = []
    for index, batch in enumerate(batches):
        found = function(*(x[index].unflatten(0, batch) for x in wide), *(v[index] for v in narrow), *rest)
        results.append([found] if isinstance(found, Tensor) else found)
    return [torch.cat([part.flatten(0, 1) for part in parts]) for parts in zip(*results, strict=True)]
