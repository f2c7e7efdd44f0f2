"""The definition, in plain PyTorch. Letters: D width, H hidden width, D2 width of the result."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import gelu, linear


def gelu_linear(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor | None, bias2: Tensor | None) -> Tensor:
    """Compute gelu(x [..., D] weight1 [H, D]^T + bias1 [H]), then weight2 [D2, H] and bias2 [D2] where given."""
    activation = gelu(linear(x, weight1, bias1), approximate="tanh")  # [..., H]
    return activation if weight2 is None else linear(activation, weight2, bias2)
