"""AdamW and the exponential moving average of the weights in one optimiser."""

from mpdit_kernels.adamw_ema.optimizer import AdamWEMA

__all__ = ["AdamWEMA"]
