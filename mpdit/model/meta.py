"""A model without values: the names and shapes of its parameters, before memory is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mpdit.model.config import ModelConfig
from mpdit.model.mpdit import MPDiT

_DRAWS = (nn.init.normal_, nn.init.uniform_, Tensor.normal_, Tensor.uniform_)


class _Unset(TorchFunctionMode):
    """Leaves new tensors as they are.

    To draw values on the meta device, where there are none, torch (2.13) imports its whole compiler: a second and a
    half of CPU time.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _DRAWS:
            return next(iter((*args, *kwargs.values())))  # the tensor
        return (torch.empty if function is torch.randn else function)(*args, **kwargs)


def meta_model(config: ModelConfig) -> MPDiT:
    """Build the model on torch's meta device."""
    with torch.device("meta"), _Unset():
        return MPDiT(config)
