"""Fused operations of diffusion transformers, one folder each, usable without mpdit."""

from mpdit_kernels.adamw_ema import AdamWEMA

__all__ = ["AdamWEMA"]
