"""The Triton kernel for short sequences."""

from __future__ import annotations

from torch import Tensor

from mpdit_kernels import dispatch
from mpdit_kernels.backends.call import Backend, Call
from mpdit_kernels.varlen import Sequences


def _unfit(call: Call) -> str | None:
    if call.kernels == "reference":
        return "MPDIT_KERNELS or use() asks for references"
    if refusal := dispatch.no_kernels(call.kernels, call.device, (call.dtype,)):
        return refusal
    from mpdit_kernels import short_attn

    return short_attn.refusal(call.tokens, call.head_dim)


def _run(qkv: Tensor, scale: float, first_query: int, deterministic: bool) -> Tensor:
    from mpdit_kernels.short_attn import op

    return op.run(qkv, scale, first_query)


def _run_packed(qkv: Tensor, sequences: Sequences, scale: float, first_query: int, deterministic: bool) -> Tensor:
    from mpdit_kernels.short_attn import op

    return op.run_varlen(qkv, sequences, scale, first_query)


TRITON = Backend("triton", _unfit, _run, _run_packed)
