"""Which backend a call takes: the one asked for, or the fastest of those that are available."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mpdit_kernels import dispatch
from mpdit_kernels.backends import measured, probe
from mpdit_kernels.backends.call import Call
from mpdit_kernels.backends.registry import BACKENDS, default_order

VARIABLE = "MPDIT_ATTENTION"

_log = logging.getLogger("mpdit_kernels")
_told: set[str] = set()

_environment = os.environ.get(VARIABLE) or "auto"
_within: str | None = None
"""What `use_attention` asks for, within its block."""


def attention_mode() -> str:
    """What `use_attention` or else MPDIT_ATTENTION asks for: "auto" or a backend.

    Raises:
        ValueError: the variable names neither.
    """
    return _checked(_environment, VARIABLE) if _within is None else _within


@contextmanager
def use_attention(backend: str) -> Iterator[None]:
    """Within the block, attention takes this backend, or chooses if it is "auto"; holds for all threads of the process.

    Raises:
        ValueError: neither "auto" nor a backend's name.
    """
    global _within
    before, _within = _within, _checked(backend, "use_attention's backend")
    try:
        yield
    finally:
        _within = before


def _source() -> str:
    return VARIABLE if _within is None else "use_attention's backend"


def _checked(name: str, source: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(
            f"{source} is {name!r}: choose auto or one of {', '.join(BACKENDS)} "
            "(python -m mpdit_kernels.backends shows which of them run here)"
        )
    return name


class BackendError(ValueError):
    """The backend asked for is unknown or can't serve a call, or none can."""


Context = tuple[str, str, bool, tuple[Any, ...]]
"""Backend asked for, where that was said, whether gradients will be taken, and a Call's fields but the first: of the
kinds that a compiler's tracer can pass on to functions whose results it takes as constants."""


def context(qkv: Tensor, first_query: int, backend: str, deterministic: bool) -> Context:
    """What a choice for qkv [..., 3, H, d] depends on beside the number of tokens."""
    asked, source = (backend, "backend") if backend != "auto" else (attention_mode(), _source())
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    kernels = "triton" if asked == "triton" else dispatch.mode()  # asked for by name, it runs wherever it can
    head_dim, first_query = fixed(qkv.shape[-1]), fixed(first_query)
    call = (head_dim, qkv.dtype, qkv.device, first_query, deterministic, strict, kernels)
    return asked, source, torch.is_grad_enabled() and qkv.requires_grad, call


def fixed(size: int) -> int:
    """The size; of a tracer's symbol, the number that it stands for, which the compiled code is then made for."""
    return hash(size)  # a whole number's is itself


@dispatch.constant_to_compiler  # probes, reads files and logs; run where it is traced
def choose(tokens: int, asked: str, source: str, training: bool, call: tuple[Any, ...]) -> str:
    """The backend for sequences of so many tokens in a `context`.

    Raises:
        ValueError: the one asked for is unknown or can't serve them, or a probe is due while a CUDA graph is captured.
    """
    return _remembered(tokens, asked, source, training, call)


@functools.lru_cache(maxsize=4096)
def _remembered(tokens: int, asked: str, source: str, training: bool, call: tuple[Any, ...]) -> str:
    return choice(asked, training, Call(tokens, *call), source)


def choice(asked: str, training: bool, call: Call, source: str = "backend") -> str:
    """The backend for a class of calls; `source` is where it was asked for.

    Raises:
        ValueError: as `choose`.
    """
    if asked == "auto":
        return _first_available(training, call)
    if asked not in BACKENDS:
        raise BackendError(f"{source} is {asked!r}: choose auto or one of {', '.join(BACKENDS)}; {_available(call)}")
    if reason := refusal(asked, call):
        raise BackendError(f"{source} is {asked!r}, which is refused: {reason}; {_available(call)}")
    return asked


def _first_available(training: bool, call: Call) -> str:
    refusals = {}
    for name in order(call, training):
        reason = refusal(name, call)
        if reason is None:
            return name
        refusals[name] = reason
        tell(name, reason, call)
    raise BackendError(
        f"no attention for {call}: {'; '.join(f'{name}: {reason}' for name, reason in refusals.items())}"
    )


def order(call: Call, training: bool) -> list[str]:
    """Names of all backends as "auto" tries them."""
    names = measured.order(call, training, default_order(call))
    if call.kernels == "triton":
        names.sort(key=lambda name: name != "triton")
    return names


def refusal(name: str, call: Call) -> str | None:
    """Why a backend isn't available for this call, None if it is; found out once a process.

    Raises:
        ValueError: that takes a probe, and a CUDA graph is being captured.
    """
    backend = BACKENDS[name]
    if not probe.known(backend, call) and _capturing(call):
        raise ValueError(
            f"attention by {name} was not probed yet for {call}, and can't be while a CUDA graph is captured: "
            "run the same call once before, as capturing needs anyway"
        )
    return probe.refusal(backend, call)


def _capturing(call: Call) -> bool:
    return call.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _available(call: Call) -> str:
    names = [name for name, backend in BACKENDS.items() if not _capturing(call) or probe.known(backend, call)]
    available = ", ".join(name for name in names if refusal(name, call) is None) or "none"
    return f"available for {call}: {available}"


def tell(name: str, reason: str, call: Call) -> None:
    """Log a refusal once: a warning where the backend was thought to run, or was wanted."""
    static = BACKENDS[name].unfit(call) is not None
    line = f"attention does without {name}{'' if static else f' at {call}'}: {reason}"
    if line not in _told:
        _told.add(line)
        _log.log(logging.INFO if static and call.kernels != name else logging.WARNING, line)
