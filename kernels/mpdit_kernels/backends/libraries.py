"""The backends: each library's attention behind one signature, imported when a call that it may serve asks for it."""

from __future__ import annotations

import functools
import importlib
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from mpdit_kernels import dispatch
from mpdit_kernels.operators import count_flops
from mpdit_kernels.short_attn import op as short_attn
from mpdit_kernels.varlen import Sequences

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Call:
    """All that a choice may depend on. Nothing of batch or heads: how a batch is split must not change its losses.

    Attributes:
        tokens: T, of the longest sequence where `packed`.
        head_dim: d.
        dtype, device: of qkv.
        query_start: f, tokens at the front that are keys and values only.
        deterministic: gradients must repeat bit for bit.
        strict: torch.use_deterministic_algorithms(True) is in force, and not only for warnings.
        kernels: mode of `mpdit_kernels.use` that holds for our own kernel.
        packed: sequences of several lengths in one call.
    """

    tokens: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    query_start: int = 0
    deterministic: bool = False
    strict: bool = False
    kernels: str = "auto"
    packed: bool = False

    def __str__(self) -> str:
        front = f" with queries from {self.query_start} on" if self.query_start else ""
        lengths = "sequences of up to " if self.packed else ""
        repeated = ", deterministic" if self.deterministic else ""
        kind = str(self.dtype).removeprefix("torch.")
        return f"{lengths}{self.tokens} tokens{front}, head dim {self.head_dim}, {kind}, {self.device}{repeated}"

    @property
    def capability(self) -> tuple[int, int]:
        """Return the compute capability of the GPU; (0, 0) on other devices."""
        return torch.cuda.get_device_capability(self.device) if self.device.type == "cuda" else (0, 0)

    @property
    def architecture(self) -> str:
        """Return "sm_90", or the device's type."""
        return dispatch.architecture_of(self.device)


Run = Callable[[Tensor, float, int, bool], Tensor]
"""(qkv [B, T, 3, H, d], scale, query_start, deterministic) -> [B, T - query_start, H, d]."""
RunPacked = Callable[[Tensor, Sequences, float, int, bool], Tensor]
"""(qkv [N, 3, H, d], the S sequences, scale, query_start, deterministic) -> [N - S * query_start, H, d]."""


@dataclass(frozen=True)
class Backend:
    """One library's attention. Adding one is an entry in BACKENDS.

    Attributes:
        unfit: why it can't serve a call, as far as that costs nothing to find out, or None; the probe tells the rest.
        run: the dense call, differentiable.
        run_packed: the library's own call for several lengths, if it has one.
    """

    unfit: Callable[[Call], str | None]
    run: Run
    run_packed: RunPacked | None = None


def _needs(
    capability: tuple[int, int] = (8, 0),
    dtypes: tuple[torch.dtype, ...] = HALVES,
    max_head_dim: float = float("inf"),
    repeats: Callable[[Call], str | None] = lambda call: None,
    library: tuple[str, tuple[str, ...], str] | None = None,
) -> Callable[[Call], str | None]:
    """Return a check for CUDA tensors of these dtypes on a GPU at least this new.

    `repeats` says why a deterministic call can't be served; `library` is (module, functions needed, how to install it).
    """

    def unfit(call: Call) -> str | None:
        if call.device.type != "cuda":
            return f"for CUDA tensors only, and these are on {call.device.type}"
        if call.dtype not in dtypes:
            *others, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
            return f"takes only {', '.join(others)} and {last}"
        if call.capability < capability:
            return "needs compute capability {}.{}, and this GPU has {}.{}".format(*capability, *call.capability)
        if call.head_dim > max_head_dim:
            return f"takes head dims up to {max_head_dim}"
        if call.deterministic and (reason := repeats(call)):
            return reason
        return missing(*library) if library else None

    return unfit


@functools.cache
def missing(module: str, functions: tuple[str, ...], install: str) -> str | None:
    """Return why these functions can't be had from a module; None if they can. Found out once a process."""
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever a library's start-up raises, such as an OSError of a shared library
        name = (error.name or "") if isinstance(error, ModuleNotFoundError) else ""
        if name and f"{module}.".startswith(f"{name}."):
            return f"{name} is not installed: {install}"
        return f"{module} does not import: {one_line(error)}"
    absent = next((name for name in functions if not hasattr(found, name)), None)
    return f"{module} has no {absent}: {install}" if absent else None


def one_line(error: BaseException, most: int = 200) -> str:
    """Return the kind of an error and the beginning of its message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if text else ''}{text[:most]}{'...' if len(text) > most else ''}"


def _only_strict(call: Call) -> str | None:
    strict = "its backward repeats only under torch.use_deterministic_algorithms(True), without warn_only"
    return None if call.strict else strict


def _split(qkv: Tensor, query_start: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split [B, T, 3, H, d] into q [B, T - f, H, d], k and v [B, T, H, d], views whose gradient is one stack."""
    q, k, v = qkv.unbind(2)
    return q[:, query_start:] if query_start else q, k, v


def _split_packed(qkv: Tensor, sequences: Sequences, query_start: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split [N, 3, H, d] into q without each sequence's first tokens, k and v."""
    q, k, v = qkv.unbind(1)
    return q.index_select(0, _rows(sequences, query_start, q.device)) if query_start else q, k, v


@functools.lru_cache(maxsize=64)
def _rows(sequences: Sequences, query_start: int, device: torch.device) -> Tensor:
    """Return the rows of the queries. No tensor of inference mode, as a later call's gradient may need it."""
    rows = [row for a, b in itertools.pairwise(sequences.offsets) for row in range(a + query_start, b)]
    with torch.inference_mode(False):
        return torch.tensor(rows, device=device)


# flash-attn 2


def _flash(qkv: Tensor, scale: float, query_start: int, deterministic: bool) -> Tensor:
    from flash_attn import flash_attn_func, flash_attn_qkvpacked_func

    if not query_start:
        return flash_attn_qkvpacked_func(qkv, softmax_scale=scale, deterministic=deterministic)
    return flash_attn_func(*_split(qkv, query_start), softmax_scale=scale, deterministic=deterministic)


def _flash_packed(qkv: Tensor, sequences: Sequences, scale: float, query_start: int, deterministic: bool) -> Tensor:
    from flash_attn import flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func

    options: dict[str, Any] = {"softmax_scale": scale, "deterministic": deterministic}
    keys, longest = sequences.on(qkv.device), sequences.longest
    if not query_start:
        return flash_attn_varlen_qkvpacked_func(qkv, keys, longest, **options)
    queries = sequences.without_first(query_start)
    q, k, v = _split_packed(qkv, sequences, query_start)
    return flash_attn_varlen_func(q, k, v, queries.on(q.device), keys, queries.longest, longest, **options)


# flash-attn 4, the CuTe generation. With the output comes a log-sum-exp, or None.


def _cute(qkv: Tensor, scale: float, query_start: int, deterministic: bool) -> Tensor:
    from flash_attn.cute.interface import flash_attn_func

    q, k, v = _split(qkv, query_start)
    out = flash_attn_func(q, k, v, softmax_scale=scale, deterministic=deterministic)
    return out if isinstance(out, Tensor) else out[0]


def _cute_packed(qkv: Tensor, sequences: Sequences, scale: float, query_start: int, deterministic: bool) -> Tensor:
    from flash_attn.cute.interface import flash_attn_varlen_func

    queries = sequences.without_first(query_start)
    lengths = {
        "cu_seqlens_q": queries.on(qkv.device),
        "cu_seqlens_k": sequences.on(qkv.device),
        "max_seqlen_q": queries.longest,
        "max_seqlen_k": sequences.longest,
    }
    q, k, v = _split_packed(qkv, sequences, query_start)
    out = flash_attn_varlen_func(q, k, v, **lengths, softmax_scale=scale, deterministic=deterministic)
    return out if isinstance(out, Tensor) else out[0]


# xformers


def _xformers(qkv: Tensor, scale: float, query_start: int, deterministic: bool) -> Tensor:
    from xformers.ops import memory_efficient_attention

    q, k, v = _split(qkv, query_start)
    return memory_efficient_attention(q, k, v, scale=scale)


def _xformers_packed(qkv: Tensor, sequences: Sequences, scale: float, query_start: int, deterministic: bool) -> Tensor:
    from xformers.ops import memory_efficient_attention

    q, k, v = (x.unsqueeze(0) for x in _split_packed(qkv, sequences, query_start))
    mask = _mask(sequences, query_start, q.device)
    return memory_efficient_attention(q, k, v, attn_bias=mask, scale=scale).squeeze(0)


@functools.lru_cache(maxsize=64)
def _mask(sequences: Sequences, query_start: int, device: torch.device) -> Any:
    from xformers.ops.fmha import BlockDiagonalMask

    queries = sequences.without_first(query_start)
    with torch.inference_mode(False):
        return BlockDiagonalMask.from_seqlens(list(queries.lengths), list(sequences.lengths), device=device)


# PyTorch's scaled_dot_product_attention, held to one of its implementations at a time.


SWITCHES: dict[SDPBackend, tuple[Callable[[], bool], Callable[[bool], None]]] = {
    SDPBackend.FLASH_ATTENTION: (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    SDPBackend.CUDNN_ATTENTION: (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
    SDPBackend.EFFICIENT_ATTENTION: (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    SDPBackend.MATH: (cuda.math_sdp_enabled, cuda.enable_math_sdp),
}
"""They hold for CPU tensors too."""
_lock = threading.Lock()


@contextmanager
def _only(implementation: SDPBackend) -> Iterator[None]:
    """Do as torch's sdpa_kernel in a third of its time, which counts at small batches; compilers know only torch's."""
    with _lock:  # the switches are the process's: threads that left in another order would leave them wrong for good
        before = [enabled() for enabled, _ in SWITCHES.values()]
        try:
            for kind, (_, enable) in SWITCHES.items():
                enable(kind is implementation)
            yield
        finally:
            for (_, enable), value in zip(SWITCHES.values(), before, strict=True):
                enable(value)


def _sdpa(implementation: SDPBackend) -> Run:
    def run(qkv: Tensor, scale: float, query_start: int, deterministic: bool) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in _split(qkv, query_start))
        with sdpa_kernel(implementation) if torch.compiler.is_compiling() else _only(implementation):
            return scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)

    return run


_flash_on_gpu = _needs(repeats=_only_strict)


def _cpu_attention_flops(passes: int, q: Tensor, k: Tensor, *_: Any, **__: Any) -> int:
    return passes * 2 * q.numel() * k.shape[-2]


# PyTorch counts its attention on GPUs, but not the one that it takes on a CPU (2.13).
_aten = torch.ops.aten
count_flops(_aten._scaled_dot_product_flash_attention_for_cpu)(functools.partial(_cpu_attention_flops, 2))
count_flops(_aten._scaled_dot_product_flash_attention_for_cpu_backward)(
    lambda d_out, *rest, **others: _cpu_attention_flops(5, *rest, **others)
)


# Our own kernel


def _triton_unfit(call: Call) -> str | None:
    if call.kernels == "reference":
        return "MPDIT_KERNELS or use() asks for references"
    reason = dispatch.no_kernels(call.kernels, call.device, (call.dtype,))
    return reason or short_attn.refusal(call.tokens, call.head_dim)


_FLASH_FUNCTIONS = ("flash_attn_func", "flash_attn_varlen_func")
_ALL = (torch.float32, *HALVES)

BACKENDS: dict[str, Backend] = {
    "triton": Backend(
        _triton_unfit,
        lambda qkv, scale, query_start, _: short_attn.run(qkv, scale, query_start),
        lambda qkv, sequences, scale, query_start, _: short_attn.run_varlen(qkv, sequences, scale, query_start),
    ),
    "flash_attn_cute": Backend(
        _needs(
            (9, 0),
            max_head_dim=256,
            repeats=lambda c: "has no deterministic backward for this GPU" if c.capability >= (12, 0) else None,
            library=("flash_attn.cute.interface", _FLASH_FUNCTIONS, "pip install 'mpdit[flash-cute]'"),
        ),
        _cute,
        _cute_packed,
    ),
    "sdpa_cudnn": Backend(
        _needs(repeats=lambda call: "PyTorch offers no deterministic backward of it"), _sdpa(SDPBackend.CUDNN_ATTENTION)
    ),
    "flash_attn": Backend(
        _needs(
            max_head_dim=256,
            library=(
                "flash_attn",
                (*_FLASH_FUNCTIONS, "flash_attn_qkvpacked_func", "flash_attn_varlen_qkvpacked_func"),
                "pip install --no-build-isolation 'mpdit[flash]' builds it",
            ),
        ),
        _flash,
        _flash_packed,
    ),
    "sdpa_flash": Backend(
        lambda call: None if call.device.type == "cpu" else _flash_on_gpu(call), _sdpa(SDPBackend.FLASH_ATTENTION)
    ),
    "xformers": Backend(
        _needs(
            (5, 0),
            _ALL,
            repeats=_only_strict,
            library=("xformers.ops", ("memory_efficient_attention", "fmha"), "pip install 'mpdit[xformers]'"),
        ),
        _xformers,
        _xformers_packed,
    ),
    "sdpa_efficient": Backend(_needs((5, 0), _ALL, repeats=_only_strict), _sdpa(SDPBackend.EFFICIENT_ATTENTION)),
    "sdpa_math": Backend(lambda call: None, _sdpa(SDPBackend.MATH)),
}
"""All backends by name, in the order in which they are tried where nobody measured.

Our kernel reads short sequences once. On Hopper and later the CuTe generation and cuDNN are fastest. flash-attn 2 and
PyTorch's copy of it differ by a gradient that comes packed, xformers and PyTorch's efficient kernels are of one family,
and math always runs.
"""


def default_order(call: Call) -> list[str]:
    """Return the names, the most promising first."""
    names = list(BACKENDS)
    if call.device.type == "cuda" and call.capability < (9, 0):  # on older GPUs cuDNN's attention is not fast
        names.remove("sdpa_cudnn")
        names.insert(names.index("sdpa_efficient"), "sdpa_cudnn")
    return names
