"""What the custom operators count for torch.utils.flop_counter.FlopCounterMode, which knows nothing of them by itself.

Counted are matrix products, two FLOP a multiply-accumulate, as that counter does for PyTorch's own operators: norms,
activations and sums are not. The counts are those of the references, so that both paths of a model count alike. A
gradient of attention is five products, as the counter takes for every attention, whatever a kernel computes again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from mpdit_kernels import adaln, fno, gelu_mlp, short_attn, upsample  # noqa: F401  (they define the operators)
from mpdit_kernels.fno.reference import GRID, MODES

_ops = torch.ops.mpdit_kernels


@register_flop_formula([_ops.adaln, _ops.adaln_backward], get_raw=True)
def _no_products(*args: Any, **kwargs: Any) -> int:
    return 0


@register_flop_formula(_ops.gelu_linear, get_raw=True)
def _gelu_linear(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor | None, *args: Any, out_val: Any = None
) -> int:
    rows = x.numel() // x.shape[-1]
    return 2 * rows * (weight1.numel() + (0 if weight2 is None else weight2.numel()))


@register_flop_formula(_ops.gelu_linear_backward, get_raw=True)
def _gelu_linear_backward(
    dy: Tensor, x: Tensor, weight1: Tensor, weight2: Tensor | None, hidden: Tensor, needs: Sequence[bool], **others: Any
) -> int:
    of_x, of_weight1, of_bias1, of_weight2, _of_bias2 = needs
    products = (of_x + of_weight1) * weight1.numel()
    if weight2 is not None:
        products += (of_weight2 + (of_x or of_weight1 or of_bias1)) * weight2.numel()
    return 2 * (x.numel() // x.shape[-1]) * products


@register_flop_formula(_ops.short_attention, get_raw=True)
def _short_attention(
    qkv: Tensor, starts: Tensor | None, lengths: Sequence[int], scale: float, first_query: int, **_: Any
) -> int:
    return 2 * _attention_product(qkv, starts, lengths, first_query)


@register_flop_formula(_ops.short_attention_backward, get_raw=True)
def _short_attention_backward(
    d_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    logs: Tensor,
    starts: Tensor | None,
    lengths: Sequence[int],
    scale: float,
    first_query: int,
    **_: Any,
) -> int:
    return 5 * _attention_product(qkv, starts, lengths, first_query)


def _attention_product(qkv: Tensor, starts: Tensor | None, lengths: Sequence[int], first_query: int) -> int:
    """FLOP of one product, such as the scores', of all heads and sequences."""
    *_, heads, width = qkv.shape
    pairs = list(zip(lengths[::2], lengths[1::2], strict=True)) if starts is not None else [(qkv.shape[1], len(qkv))]
    return 2 * heads * width * sum(count * (tokens - first_query) * tokens for tokens, count in pairs)


@register_flop_formula(_ops.upsample, get_raw=True)
def _upsample(
    x: Tensor, expand: Tensor, expand_bias: Tensor, refine: Tensor, *args: Any, out_val: Sequence[Tensor], **others: Any
) -> int:
    _, rows, image = out_val
    return 2 * (len(image) * expand.numel() + len(rows) * refine.numel())


@register_flop_formula(_ops.upsample_backward, get_raw=True)
def _upsample_backward(
    d_out: Tensor,
    rows: Tensor,
    image: Tensor,
    expand: Tensor,
    refine: Tensor,
    patches: Tensor | None,
    sizes: Sequence[int],
    eps: float,
    dtype: torch.dtype,
    asked: Sequence[bool],
    **_: Any,
) -> int:
    of_x, of_expand, of_bias, of_refine, _refine_bias, of_patches, *_vectors = asked
    columns = refine.shape[1] if of_patches else refine.shape[0] if of_x or of_expand or of_bias else 0
    refining = len(rows) * refine.shape[0] * (columns + (refine.shape[1] if of_refine else 0))
    return 2 * (refining + len(image) * expand.numel() * (of_x + of_expand))


@register_flop_formula(_ops.fno, get_raw=True)
def _fno(t: Tensor, weights: Sequence[Tensor], **_: Any) -> int:
    once, each = fno_macs(len(weights[0]), len(weights[-1]), (len(weights) - 4) // 4)
    return 2 * (once + len(t) * each)


@register_flop_formula(_ops.fno_backward, get_raw=True)
def _fno_backward(d_out: Tensor, t: Tensor, weights: Sequence[Tensor], *args: Any, **_: Any) -> int:
    return 2 * _fno(t, weights)


def fno_macs(channels: int, width: int, layers: int) -> tuple[int, int]:
    """Multiply-accumulates of fno_time_embedding: (once a call, on weights alone; for each time)."""
    transforms, mixing = 2 * channels * GRID * 2 * MODES, 4 * MODES * channels**2
    layer = transforms + mixing + GRID * channels**2
    return layer + GRID * channels + channels**2, (layers - 2) * layer + channels**2 + channels * width


def _cpu_attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[-2] * (width + value[-1])


def _cpu_attention_backward(
    d_out: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[-2] * (3 * width + 2 * value[-1])


# PyTorch counts its attention on GPUs, but not the one that it takes on a CPU.
for _packet, _formula in (
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, _cpu_attention),
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, _cpu_attention_backward),
):
    if _packet not in flop_registry:
        register_flop_formula(_packet)(_formula)
