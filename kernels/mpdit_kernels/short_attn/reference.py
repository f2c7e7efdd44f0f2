"""The definition, in plain PyTorch. Letters: B batch, T tokens, H heads, d their width, f tokens that ask nothing."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def attention(qkv: Tensor, scale: float, first_query: int) -> Tensor:
    """softmax(scale * Q K^T) V of qkv [B,T,3,H,d] for the queries from `first_query` on: [B,T-f,H,d].

    In fp32, or in fp64 where qkv is, and rounded once.
    """
    with torch.autocast(qkv.device.type, enabled=False):
        wide = qkv.to(torch.promote_types(qkv.dtype, torch.float32)).transpose(1, 3)  # [B,H,3,T,d]
        q, k, v = wide.unbind(2)
        weights = (scale * q[:, :, first_query:] @ k.transpose(2, 3)).softmax(-1)
        return (weights @ v).transpose(1, 2).to(qkv.dtype)


def attention_varlen(qkv: Tensor, offsets: tuple[int, ...], scale: float, first_query: int) -> Tensor:
    """The same of each sequence by itself: qkv [N,3,H,d] by cumulative lengths (0, ..., N) -> [N - S*f, H, d]."""
    sequences = qkv.split([end - begin for begin, end in pairwise(offsets)]) or (qkv,)
    return torch.cat([attention(one[None], scale, first_query)[0] for one in sequences])
