"""Adaptive layer norm, the gated residual, and both in one pass."""

from mpdit_kernels.adaln.op import adaln_modulate, gated_residual, gated_residual_adaln

__all__ = ["adaln_modulate", "gated_residual", "gated_residual_adaln"]
