"""From a coarse stage's tokens to the next finer one's: MPDiT's Upsample block."""

from mpdit_kernels.upsample.op import upsample_tokens

__all__ = ["upsample_tokens"]
