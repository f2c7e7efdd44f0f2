"""What a choice of backend is made for, and what a backend is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mpdit_kernels.varlen import Sequences

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Call:
    """All that a choice may depend on. Nothing of batch or heads: how a batch is split must not change its losses.

    Attributes:
        tokens: T, of the longest sequence where `packed`.
        head_dim: d.
        dtype, device: of qkv.
        first_query: f, tokens at the front that are keys and values only.
        deterministic: gradients must repeat bit for bit.
        strict: torch.use_deterministic_algorithms(True) is in force, and not only for warnings.
        kernels: mode of `mpdit_kernels.use` that holds for our own kernel.
        packed: sequences of several lengths in one call.
    """

    tokens: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    first_query: int = 0
    deterministic: bool = False
    strict: bool = False
    kernels: str = "auto"
    packed: bool = False

    def __str__(self) -> str:
        front = f" with queries from {self.first_query} on" if self.first_query else ""
        lengths = "sequences of up to " if self.packed else ""
        repeated = ", deterministic" if self.deterministic else ""
        kind = str(self.dtype).removeprefix("torch.")
        return f"{lengths}{self.tokens} tokens{front}, head dim {self.head_dim}, {kind}, {self.device}{repeated}"

    @property
    def capability(self) -> tuple[int, int]:
        """Of the GPU; (0, 0) on other devices."""
        return torch.cuda.get_device_capability(self.device) if self.device.type == "cuda" else (0, 0)

    @property
    def architecture(self) -> str:
        """ "sm_90", or the device's type."""
        major, minor = self.capability
        return f"sm_{major}{minor}" if major else self.device.type


Check = Callable[[Call], str | None]
"""Why a backend can't serve a call; None if nothing speaks against it."""


class Run(Protocol):
    """qkv [B, T, 3, H, d] -> [B, T - first_query, H, d]."""

    def __call__(self, qkv: Tensor, scale: float, first_query: int, deterministic: bool) -> Tensor: ...


class RunPacked(Protocol):
    """qkv [N, 3, H, d] -> [N - S * first_query, H, d], each of the S sequences by itself."""

    def __call__(
        self, qkv: Tensor, sequences: Sequences, scale: float, first_query: int, deterministic: bool
    ) -> Tensor: ...


@dataclass(frozen=True)
class Backend:
    """One library's attention. Adding one is an entry in `registry.BACKENDS`.

    Attributes:
        name: what users call it.
        unfit: refusals that cost nothing to find out; of the rest a probe tells.
        run: the dense call, differentiable.
        run_packed: the library's own call for several lengths, if it has one.
    """

    name: str
    unfit: Check
    run: Run
    run_packed: RunPacked | None = None


def first_of(*checks: Check) -> Check:
    """The first refusal of several checks, in this order."""
    return lambda call: next((refusal for check in checks if (refusal := check(call))), None)


def needs_gpu(capability: tuple[int, int] = (8, 0), dtypes: tuple[torch.dtype, ...] = HALVES) -> Check:
    """Refuses all but CUDA tensors of these dtypes on a GPU at least this new."""

    def check(call: Call) -> str | None:
        if call.device.type != "cuda":
            return f"for CUDA tensors only, and these are on {call.device.type}"
        if call.dtype not in dtypes:
            *others, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
            return f"takes only {', '.join(others)} and {last}"
        if call.capability < capability:
            return "needs compute capability {}.{}, and this GPU has {}.{}".format(*capability, *call.capability)
        return None

    return check


def up_to(head_dim: int) -> Check:
    """Refuses wider heads."""
    return lambda call: f"takes head dims up to {head_dim}" if call.head_dim > head_dim else None


def needs_strict(call: Call) -> str | None:
    """Refuses determinism to those that have it only under torch's own switch."""
    if call.deterministic and not call.strict:
        return "its backward repeats only under torch.use_deterministic_algorithms(True), without warn_only"
    return None
