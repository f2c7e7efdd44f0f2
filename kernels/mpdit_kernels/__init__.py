"""Operations of diffusion transformers worth having as one piece, each beside its definition in plain PyTorch."""

from mpdit_kernels.adaln import adaln_modulate, gated_residual, gated_residual_adaln
from mpdit_kernels.adamw_ema import AdamWEMA
from mpdit_kernels.dispatch import use
from mpdit_kernels.fno import fno_time_embedding
from mpdit_kernels.gelu_mlp import gelu_linear
from mpdit_kernels.upsample import upsample_tokens

__all__ = [
    "AdamWEMA",
    "adaln_modulate",
    "fno_time_embedding",
    "gated_residual",
    "gated_residual_adaln",
    "gelu_linear",
    "upsample_tokens",
    "use",
]
