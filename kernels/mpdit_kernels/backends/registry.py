"""All backends, in the order in which they are tried where nobody measured."""

from __future__ import annotations

from mpdit_kernels.backends import libraries, own, sdpa
from mpdit_kernels.backends.call import Backend, Call

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        own.TRITON,
        libraries.CUTE,
        sdpa.CUDNN,
        libraries.FLASH,
        sdpa.FLASH,
        libraries.XFORMERS,
        sdpa.EFFICIENT,
        sdpa.MATH,
    )
}
HOPPER = (9, 0)


def default_order(call: Call) -> list[str]:
    """Names, the most promising first.

    Our kernel reads short sequences once. On Hopper and later the CuTe generation and cuDNN are fastest; on older GPUs
    cuDNN's attention is not. flash-attn 2 and PyTorch's copy of it differ by a gradient that comes packed, xformers and
    PyTorch's efficient kernels are of one family, and math always runs.
    """
    names = list(BACKENDS)
    if call.device.type == "cuda" and call.capability < HOPPER:
        names.remove("sdpa_cudnn")
        names.insert(names.index("sdpa_efficient"), "sdpa_cudnn")
    return names
