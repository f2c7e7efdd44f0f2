"""Attention by the library that is fastest at a call's shape and was seen to compute it right.

`python -m mpdit_kernels.backends` shows what is available on a machine, what is chosen for each shape, and why the rest
is not.
"""

from mpdit_kernels.backends.choose import BackendError, attention_mode, use_attention
from mpdit_kernels.backends.libraries import BACKENDS, Backend, Call
from mpdit_kernels.backends.op import attention, attention_varlen

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendError",
    "Call",
    "attention",
    "attention_mode",
    "attention_varlen",
    "use_attention",
]
