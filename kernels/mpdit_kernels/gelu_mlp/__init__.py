"""A linear layer, tanh-GELU and a second linear layer: the MLP of a transformer block."""

from mpdit_kernels.gelu_mlp.op import gelu_linear

__all__ = ["gelu_linear"]
