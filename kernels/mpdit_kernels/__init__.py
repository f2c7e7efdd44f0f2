"""Operations of diffusion transformers worth having as one piece, each beside its definition in plain PyTorch."""

from mpdit_kernels.adaln import adaln_modulate, gated_residual, gated_residual_adaln
from mpdit_kernels.adamw_ema import AdamWEMA
from mpdit_kernels.backends import attention, attention_varlen, use_attention
from mpdit_kernels.dispatch import use
from mpdit_kernels.fno import fno_time_embedding
from mpdit_kernels.gelu_mlp import gelu_linear
from mpdit_kernels.short_attn import short_attention, short_attention_varlen
from mpdit_kernels.upsample import upsample_tokens

__all__ = [
    "AdamWEMA",
    "adaln_modulate",
    "attention",
    "attention_varlen",
    "fno_time_embedding",
    "gated_residual",
    "gated_residual_adaln",
    "gelu_linear",
    "short_attention",
    "short_attention_varlen",
    "upsample_tokens",
    "use",
    "use_attention",
]
