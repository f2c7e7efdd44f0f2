"""Checks of arguments, made before any launch: one ValueError naming argument, got, expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What operations take; the kernels all but the first."""


def check(condition: bool, name: str, got: object, expected: str) -> None:
    """Raise "name is got: expected expected" unless the condition holds."""
    if not condition:
        raise ValueError(f"{name} is {got}: expected {expected}")


def check_shape(name: str, x: Tensor, shape: Sequence[int], letters: str = "") -> None:
    """x has exactly this shape; letters, such as "[B, D]", say where it comes from."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {list(x.shape)}: expected {list(shape)}{' ' + letters if letters else ''}")


def check_filled(name: str, x: Tensor, axis: int, expected: str) -> None:
    """x is not empty along an axis. The text is made only for the error: in a text, torch.compile fixes a size."""
    if x.shape[axis] == 0:
        raise ValueError(f"{name} is of shape {list(x.shape)}: expected {expected}")


def check_dims(name: str, x: Tensor, letters: str) -> None:
    """x has as many dimensions as `letters`, such as "[B, T, D]", names."""
    if x.ndim != letters.count(",") + 1:
        raise ValueError(f"{name} has shape {list(x.shape)}: expected {letters}")


def check_tensors(**tensors: object) -> None:
    """All are tensors."""
    for name, x in tensors.items():
        check(isinstance(x, Tensor), name, "None" if x is None else type(x).__name__, "a tensor")


def check_alike(**tensors: Tensor | None) -> None:
    """All tensors are fp64, fp32, bf16 or fp16, and on the first one's device."""
    (first, reference), *_ = tensors.items()
    assert reference is not None
    for name, x in tensors.items():
        if x is None:
            continue
        check_tensors(**{name: x})
        if x.dtype not in TYPES:
            raise ValueError(f"{name} has dtype {x.dtype}: expected a floating-point type of at least 16 bits")
        if x.device != reference.device:
            raise ValueError(f"{name} is on {x.device}: expected {reference.device}, where {first} is")


def check_eps(eps: float) -> None:
    check(eps >= 0, "eps", eps, "a number of at least 0")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would have matrix products on x's device take, or None when it is off."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
