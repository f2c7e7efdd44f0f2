"""Operations of diffusion transformers worth having as one piece, each beside its definition in plain PyTorch."""

from mpdit_kernels.adaln import adaln_modulate, gated_residual, gated_residual_adaln
from mpdit_kernels.adamw_ema import AdamWEMA
from mpdit_kernels.dispatch import use

__all__ = ["AdamWEMA", "adaln_modulate", "gated_residual", "gated_residual_adaln", "use"]
