"""Defining an operator: torch.ops.mpdit_kernels.NAME, run by Triton kernels, and the FLOP that it counts."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

recording = False
"""True while launch.record notes launches and runs none: operators then call their launchers on meta tensors too."""

_waiting: list[tuple[Any, Callable[..., int]]] = []


class KernelOp:
    """An operator that is run by Triton kernels, with its gradient; called like a function of tensors.

    A call costs the CPU little more than its launches, through an autograd function around the launcher. What
    torch.compile traces, and what a mode watches (FlopCounterMode, fake tensors, selective checkpointing), is the
    operator of torch.library, which these know, and whose Python costs several times a kernel's launch (torch 2.13).
    """

    def __init__(self, name: str, arguments: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
        self.name, self.run = name, run
        self.operator: Any = torch.library.custom_op(
            f"mpdit_kernels::{name}", run, mutates_args=(), schema=f"({arguments}"
        )
        self.operator.register_fake(lambda *args: run(*args) if recording else fake(*args))
        self.lists = "Tensor[]" in arguments.split("->")[0]
        self.function: Any = None

    def register_autograd(self, gradients: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """Take `gradients(ctx, *of_outputs)` as backward; `setup_context(ctx, inputs, output)` keeps what it needs."""
        self.operator.register_autograd(gradients, setup_context=setup_context)
        if self.lists:  # an autograd function sees no tensors in them
            return

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = self.run(*inputs)
            setup_context(ctx, inputs, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
        self.function = type(self.name, (torch.autograd.Function,), methods)

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or recording:
            return self.operator(*args)
        if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
            return self.operator(*args)
        if self.function is not None:
            return self.function.apply(*args)
        # The operator's gradient, or its refusal of one: launchers write into memory that autograd knows nothing of.
        return self.operator(*args) if torch.is_grad_enabled() else self.run(*args)


def kernel_op(folder: str, launcher: str, schema: str, products: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Define the operator torch.ops.mpdit_kernels.NAME of a schema "NAME(Tensor x) -> Tensor".

    It decorates a function that says what comes out: it returns empty tensors of the results' shapes and dtypes. The
    operator calls the launcher in the folder's triton_impl.py, which is imported then. An operator returns tensors
    alone: what the launcher returns as None comes out as `absent`. With `products` the launcher calls cuBLAS, whose
    products take the dtypes that they are given, whatever autocast says.
    """

    def run(*args: Any) -> Any:
        implementation = importlib.import_module(f"mpdit_kernels.{folder}.triton_impl")
        tensor = next(x for x in args if isinstance(x, Tensor))
        plain = products and not tensor.is_meta
        with torch.autocast(tensor.device.type, enabled=False) if plain else contextlib.nullcontext():
            found = getattr(implementation, launcher)(*args)
        if isinstance(found, Tensor):
            return found
        return type(found)(absent(tensor) if x is None else x for x in found)

    def define(fake: Callable[..., Any]) -> KernelOp:
        name, arguments = schema.split("(", 1)
        return KernelOp(name, arguments, run, fake)

    return define


def absent(x: Tensor) -> Tensor:
    """Return an empty fp32 tensor on x's device."""
    return x.new_empty(0, dtype=torch.float32)


def count_flops(*operators: Any) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Register what operators count for torch.utils.flop_counter.FlopCounterMode, which can't know it by itself.

    The formula takes an operator's arguments and `out_val`, its result. Counted are matrix products, two FLOP a
    multiply-accumulate, as that counter does for PyTorch's own operators: norms, activations and sums are not. The
    counts are those of the references, so that both paths of a model count alike.

    torch.utils.flop_counter imports triton (torch 2.13), which takes a while. So formulas wait for `register_flops`,
    called before the first kernel is launched, unless that module is there already.
    """

    def decorate(formula: Callable[..., int]) -> Callable[..., int]:
        _waiting.extend((operator, formula) for operator in operators)
        if "torch.utils.flop_counter" in sys.modules:
            register_flops()
        return formula

    return decorate


def register_flops() -> None:
    """Hand the formulas that wait over to torch, which keeps its own where it has one."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    while _waiting:
        operator, formula = _waiting.pop()
        if operator not in flop_registry:
            register_flop_formula(operator, get_raw=True)(formula)
