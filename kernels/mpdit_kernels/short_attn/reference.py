"""The definition, in plain PyTorch. Letters: B batch, T tokens, H heads, d their width, f tokens that ask nothing."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def attention(qkv: Tensor, scale: float, query_start: int) -> Tensor:
    """Compute softmax(scale * Q K^T) V of qkv [B, T, 3, H, d] for the queries from f = query_start on: [B, T-f, H, d].

    In fp32, or in fp64 where qkv is, and rounded once.
    """
    with torch.autocast(qkv.device.type, enabled=False):
        wide = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
        q, k, v = wide.transpose(1, 3).unbind(2)  # [B, H, T, d] each
        weights = (scale * q[:, :, query_start:] @ k.transpose(2, 3)).softmax(-1)  # [B, H, T-f, T]
        return (weights @ v).transpose(1, 2).to(qkv.dtype)


def attention_varlen(qkv: Tensor, offsets: tuple[int, ...], scale: float, query_start: int) -> Tensor:
    """Compute the same of each sequence by itself: qkv [N, 3, H, d] by cumulative lengths -> [N - S*f, H, d]."""
    sequences = qkv.split([end - begin for begin, end in pairwise(offsets)]) or (qkv,)
    return torch.cat([attention(one[None], scale, query_start)[0] for one in sequences])
