"""Random numbers keyed by seed, purpose and position."""

from mpdit_kernels.philox.op import philox_normal, philox_uniform, philox_words

__all__ = ["philox_normal", "philox_uniform", "philox_words"]
