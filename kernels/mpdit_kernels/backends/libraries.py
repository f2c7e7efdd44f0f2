"""flash-attn (2.x, and the CuTe generation) and xformers: imported when a call that they may serve asks for them."""

from __future__ import annotations

import functools
import importlib
import itertools
from typing import Any

import torch
from torch import Tensor

from mpdit_kernels.backends.call import HALVES, Backend, Call, Check, first_of, needs_gpu, needs_strict, up_to
from mpdit_kernels.varlen import Sequences

MAX_HEAD_DIM = 256
"""Of flash-attn 2 and the CuTe generation on Hopper; what else they refuse, the probe finds."""


@functools.cache
def missing(module: str, functions: tuple[str, ...], install: str) -> str | None:
    """Why these functions can't be had from a module; None if they can. Found out once a process."""
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever a library's start-up raises, such as an OSError of a shared library
        name = (error.name or "") if isinstance(error, ModuleNotFoundError) else ""
        if name and f"{module}.".startswith(f"{name}."):
            return f"{name} is not installed: {install}"
        return f"{module} does not import: {one_line(error)}"
    absent = next((name for name in functions if not hasattr(found, name)), None)
    return f"{module} has no {absent}: {install}" if absent else None


def one_line(error: BaseException, most: int = 200) -> str:
    """The kind of an error and the beginning of its message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if text else ''}{text[:most]}{'...' if len(text) > most else ''}"


def _installed(module: str, functions: tuple[str, ...], install: str) -> Check:
    return lambda call: missing(module, functions, install)


def _split(qkv: Tensor, first_query: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T, 3, H, d] -> q [B, T - f, H, d], k and v [B, T, H, d], views whose gradient is one stack."""
    q, k, v = qkv.unbind(2)
    return q[:, first_query:] if first_query else q, k, v


def _split_packed(qkv: Tensor, sequences: Sequences, first_query: int) -> tuple[Tensor, Tensor, Tensor]:
    """[N, 3, H, d] -> q without each sequence's first tokens, k and v."""
    q, k, v = qkv.unbind(1)
    return q.index_select(0, _rows(sequences, first_query, q.device)) if first_query else q, k, v


@functools.lru_cache(maxsize=64)
def _rows(sequences: Sequences, first_query: int, device: torch.device) -> Tensor:
    """Rows of the queries. No tensor of inference mode, as a later call's gradient may need it."""
    rows = [row for a, b in itertools.pairwise(sequences.offsets) for row in range(a + first_query, b)]
    with torch.inference_mode(False):
        return torch.tensor(rows, device=device)


def _flash(qkv: Tensor, scale: float, first_query: int, deterministic: bool) -> Tensor:
    from flash_attn import flash_attn_func, flash_attn_qkvpacked_func

    if not first_query:
        return flash_attn_qkvpacked_func(qkv, softmax_scale=scale, deterministic=deterministic)
    return flash_attn_func(*_split(qkv, first_query), softmax_scale=scale, deterministic=deterministic)


def _flash_packed(qkv: Tensor, sequences: Sequences, scale: float, first_query: int, deterministic: bool) -> Tensor:
    from flash_attn import flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func

    options: dict[str, Any] = {"softmax_scale": scale, "deterministic": deterministic}
    keys, longest = sequences.on(qkv.device), sequences.longest
    if not first_query:
        return flash_attn_varlen_qkvpacked_func(qkv, keys, longest, **options)
    queries = sequences.without_first(first_query)
    q, k, v = _split_packed(qkv, sequences, first_query)
    return flash_attn_varlen_func(q, k, v, queries.on(q.device), keys, queries.longest, longest, **options)


def _cute_repeats(call: Call) -> str | None:
    newest = call.deterministic and call.capability >= (12, 0)
    return "has no deterministic backward for this GPU" if newest else None


def _cute(qkv: Tensor, scale: float, first_query: int, deterministic: bool) -> Tensor:
    from flash_attn.cute.interface import flash_attn_func

    q, k, v = _split(qkv, first_query)
    return _first(flash_attn_func(q, k, v, softmax_scale=scale, deterministic=deterministic))


def _cute_packed(qkv: Tensor, sequences: Sequences, scale: float, first_query: int, deterministic: bool) -> Tensor:
    from flash_attn.cute.interface import flash_attn_varlen_func

    queries = sequences.without_first(first_query)
    q, k, v = _split_packed(qkv, sequences, first_query)
    return _first(
        flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=queries.on(q.device),
            cu_seqlens_k=sequences.on(q.device),
            max_seqlen_q=queries.longest,
            max_seqlen_k=sequences.longest,
            softmax_scale=scale,
            deterministic=deterministic,
        )
    )


def _first(result: Any) -> Tensor:
    """The output: with it comes a log-sum-exp, or None."""
    return result if isinstance(result, Tensor) else result[0]


def _xformers(qkv: Tensor, scale: float, first_query: int, deterministic: bool) -> Tensor:
    from xformers.ops import memory_efficient_attention

    q, k, v = _split(qkv, first_query)
    return memory_efficient_attention(q, k, v, scale=scale)


def _xformers_packed(qkv: Tensor, sequences: Sequences, scale: float, first_query: int, deterministic: bool) -> Tensor:
    from xformers.ops import memory_efficient_attention

    q, k, v = (x.unsqueeze(0) for x in _split_packed(qkv, sequences, first_query))
    mask = _mask(sequences, first_query, q.device)
    return memory_efficient_attention(q, k, v, attn_bias=mask, scale=scale).squeeze(0)


@functools.lru_cache(maxsize=64)
def _mask(sequences: Sequences, first_query: int, device: torch.device) -> Any:
    from xformers.ops.fmha import BlockDiagonalMask

    queries = sequences.without_first(first_query)
    with torch.inference_mode(False):
        return BlockDiagonalMask.from_seqlens(list(queries.lengths), list(sequences.lengths), device=device)


_FLASH_FUNCTIONS = ("flash_attn_func", "flash_attn_varlen_func")

FLASH = Backend(
    "flash_attn",
    first_of(
        needs_gpu(),
        up_to(MAX_HEAD_DIM),
        _installed(
            "flash_attn",
            (*_FLASH_FUNCTIONS, "flash_attn_qkvpacked_func", "flash_attn_varlen_qkvpacked_func"),
            "pip install --no-build-isolation 'mpdit[flash]' builds it",
        ),
    ),
    _flash,
    _flash_packed,
)
CUTE = Backend(
    "flash_attn_cute",
    first_of(
        needs_gpu((9, 0)),
        up_to(MAX_HEAD_DIM),
        _cute_repeats,
        _installed("flash_attn.cute.interface", _FLASH_FUNCTIONS, "pip install 'mpdit[flash-cute]'"),
    ),
    _cute,
    _cute_packed,
)
XFORMERS = Backend(
    "xformers",
    first_of(
        needs_gpu((5, 0), (torch.float32, *HALVES)),
        needs_strict,
        _installed("xformers.ops", ("memory_efficient_attention", "fmha"), "pip install 'mpdit[xformers]'"),
    ),
    _xformers,
    _xformers_packed,
)
