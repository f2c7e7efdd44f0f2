"""What our operators count for torch.utils.flop_counter.FlopCounterMode, which knows nothing of them by itself.

Counted are matrix products, two FLOP a multiply-accumulate, as that counter does for PyTorch's own operators: norms,
activations and sums are not. The counts are those of the references, so that both paths of a model count alike.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

_waiting: list[tuple[Any, Callable[..., int]]] = []


def count_flops(*operators: Any) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Register a formula, of an operator's arguments and `out_val`, its result, for operators such as torch.ops.x.y.

    torch.utils.flop_counter imports triton (torch 2.13), half a second. So formulas wait for `register`, which is
    called before the first kernel is launched, unless that module is there already.
    """

    def decorate(formula: Callable[..., int]) -> Callable[..., int]:
        _waiting.extend((operator, formula) for operator in operators)
        if "torch.utils.flop_counter" in sys.modules:
            register()
        return formula

    return decorate


def register() -> None:
    """Hand the formulas that wait over to torch, which keeps its own where it has one."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    while _waiting:
        operator, formula = _waiting.pop()
        if operator not in flop_registry:
            register_flop_formula(operator, get_raw=True)(formula)
