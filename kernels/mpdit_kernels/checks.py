"""Checks of arguments, made before any launch: one ValueError naming argument, got, expected.

Texts with sizes are made only where they are raised: torch.compile takes a size put into a text as constant.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that operations take; the kernels take all but the first."""


def check(condition: bool, name: str, got: object, expected: str) -> None:
    """Raise "name is got: expected expected" unless the condition holds."""
    if not condition:
        raise ValueError(f"{name} is {got}: expected {expected}")


def takes_old_name(old: str, new: str) -> Callable[[F], F]:
    """Let a function take an argument under its old name too, which its signature doesn't show; for one release."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def renamed(*arguments: Any, **named: Any) -> Any:
            if old in named and new not in named:  # Python itself refuses both
                named[new] = named.pop(old)
            return function(*arguments, **named)

        return renamed  # type: ignore[return-value]

    return decorate


def check_shapes(known: dict[str, int], **shapes: tuple[Tensor | None, str]) -> dict[str, int]:
    """Check tensors against shapes such as "[B, T, D]", and return the size of each name in them.

    A name that isn't in `known` is the size that it has where it first appears. A tensor that is None is passed over.
    """
    for name, (x, text) in shapes.items():
        if x is None:
            continue
        names = text[1:-1].split(", ")
        if x.ndim == len(names):
            for letter, size in zip(names, x.shape, strict=True):
                known.setdefault(letter, size)
        if list(x.shape) != [known.get(letter) for letter in names]:
            sizes = f"{[known[letter] for letter in names]} " if known.keys() >= set(names) else ""
            raise ValueError(f"{name} has shape {list(x.shape)}: expected {sizes}{text}")
    return known


def check_filled(name: str, x: Tensor, axis: int, expected: str) -> None:
    """Check that x is not empty along an axis."""
    if x.shape[axis] == 0:
        raise ValueError(f"{name} is of shape {list(x.shape)}: expected {expected}")


def check_tensors(optional: tuple[str, ...] = (), /, **tensors: object) -> None:
    """Check that all are tensors of one of TYPES on the first one's device; those named `optional` may be None."""
    (first, reference), *_ = tensors.items()
    for name, x in tensors.items():
        if x is None and name in optional:
            continue
        if not isinstance(x, Tensor) or not isinstance(reference, Tensor):
            raise ValueError(f"{name} is {'None' if x is None else type(x).__name__}: expected a tensor")
        if x.dtype not in TYPES:
            raise ValueError(f"{name} has dtype {x.dtype}: expected a floating-point type of at least 16 bits")
        if x.device != reference.device:
            raise ValueError(f"{name} is on {x.device}: expected {reference.device}, where {first} is")


def check_eps(eps: float) -> None:
    """Check that eps is at least 0."""
    check(eps >= 0, "eps", eps, "a number of at least 0")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return autocast's dtype of matrix products on x's device (the CPU's for meta), or None when it is off."""
    device = "cpu" if x.is_meta else x.device.type
    if not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
