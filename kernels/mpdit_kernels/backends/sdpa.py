"""PyTorch's scaled_dot_product_attention, held to one of its implementations at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from mpdit_kernels.backends.call import HALVES, Backend, Call, first_of, needs_gpu, needs_strict

_SWITCHES: dict[SDPBackend, tuple[Callable[[], bool], Callable[[bool], None]]] = {
    SDPBackend.FLASH_ATTENTION: (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    SDPBackend.CUDNN_ATTENTION: (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
    SDPBackend.EFFICIENT_ATTENTION: (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    SDPBackend.MATH: (cuda.math_sdp_enabled, cuda.enable_math_sdp),
}
"""They hold for CPU tensors too."""
_lock = threading.Lock()


@contextmanager
def _only(implementation: SDPBackend) -> Iterator[None]:
    """torch's sdpa_kernel in a third of its time, which counts at small batches; compilers know only torch's."""
    with _lock:  # the switches are the process's: threads that left in another order would leave them wrong for good
        before = [enabled() for enabled, _ in _SWITCHES.values()]
        try:
            for kind, (_, enable) in _SWITCHES.items():
                enable(kind is implementation)
            yield
        finally:
            for (_, enable), value in zip(_SWITCHES.values(), before, strict=True):
                enable(value)


def _run(implementation: SDPBackend, qkv: Tensor, scale: float, first_query: int, deterministic: bool) -> Tensor:
    q, k, v = qkv.unbind(2)  # whose gradient is one stack
    if first_query:
        q = q[:, first_query:]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(implementation) if torch.compiler.is_compiling() else _only(implementation):
        return scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def _not_deterministic(call: Call) -> str | None:
    return "PyTorch offers no deterministic backward of it" if call.deterministic else None


_fit_for_gpu = first_of(needs_gpu(), needs_strict)

FLASH = Backend(
    "sdpa_flash",
    lambda call: None if call.device.type == "cpu" else _fit_for_gpu(call),
    partial(_run, SDPBackend.FLASH_ATTENTION),
)
CUDNN = Backend("sdpa_cudnn", first_of(needs_gpu(), _not_deterministic), partial(_run, SDPBackend.CUDNN_ATTENTION))
EFFICIENT = Backend(
    "sdpa_efficient",
    first_of(needs_gpu((5, 0), (torch.float32, *HALVES)), needs_strict),
    partial(_run, SDPBackend.EFFICIENT_ATTENTION),
)
MATH = Backend("sdpa_math", lambda call: None, partial(_run, SDPBackend.MATH))
