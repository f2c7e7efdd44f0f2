"""The definitions, in plain PyTorch. Letters: B batch, T tokens, D width.

LN is layer norm over D without affine part. Statistics and the affine part of what is normalised are taken in the
widest of the dtypes at hand, as torch promotes them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm


def adaln_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """LN(x [B,T,D]) * (1 + scale [B,D]) + shift [B,D], as `dtype`."""
    normalized = layer_norm(x, x.shape[-1:], eps=eps)
    return torch.addcmul(shift[:, None], normalized, 1 + scale[:, None]).to(dtype)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """x [B,T,D] + gate [B,D] * branch [B,T,D], as the dtype of x."""
    return torch.addcmul(x, gate[:, None], branch).to(x.dtype)


def gated_residual_adaln(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The gated residual, and its modulated layer norm as `dtype`."""
    residual = gated_residual(x, branch, gate)
    return residual, adaln_modulate(residual, shift, scale, eps, dtype)
