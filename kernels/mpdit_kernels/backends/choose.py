"""Which backend a call takes: the one asked for, or the fastest measured of those that are available.

The measured tables are tuned/attention_<architecture>.json, {"machine": ..., "rows": [...]}. A row is one shape:
tokens, head_dim, dtype, batch and heads, with the seconds [median, 20 % and 80 % quantiles] of each backend, "forward"
alone and "training", which is forward and backward; and under "refused" why the others are missing.
"""

from __future__ import annotations

import functools
import logging
import math
import operator
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mpdit_kernels import dispatch
from mpdit_kernels.backends import probe
from mpdit_kernels.backends.libraries import BACKENDS, HALVES, Call, default_order

VARIABLE = "MPDIT_ATTENTION"
REACH = 2.0
"""A shape not measured takes the nearest one whose tokens and head dim differ by no more than this factor."""
CPU_MARGIN = 1.3
"""On a CPU, which is seldom the one that was measured, only a gain this large moves the choice from the default. In
fp32 and fp64 nothing does, so that the losses of earlier runs are found again bit for bit."""

_log = logging.getLogger("mpdit_kernels")
_told: set[str] = set()
_environment = os.environ.get(VARIABLE) or "auto"
_within: str | None = None
"""The backend that `use_attention` asks for, within its block."""


class BackendError(ValueError):
    """The backend asked for is unknown or can't serve a call, or none can."""


def attention_mode() -> str:
    """Return what `use_attention` or else MPDIT_ATTENTION asks for: "auto" or a backend.

    Raises:
        ValueError: the variable names neither.
    """
    return _checked(_environment, VARIABLE) if _within is None else _within


@contextmanager
def use_attention(backend: str) -> Iterator[None]:
    """Have attention take this backend within the block, or choose if it is "auto"; holds for all threads.

    Raises:
        ValueError: neither "auto" nor a backend's name.
    """
    global _within
    before, _within = _within, _checked(backend, "use_attention's backend")
    try:
        yield
    finally:
        _within = before


def _checked(name: str, source: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(
            f"{source} is {name!r}: choose auto or one of {', '.join(BACKENDS)} "
            "(python -m mpdit_kernels.backends shows which of them run here)"
        )
    return name


Context = tuple[str, str, bool, tuple[Any, ...]]
"""Backend asked for, where that was said, whether gradients will be taken, and a Call's fields but the first: of the
kinds that a compiler's tracer can pass on to functions whose results it takes as constants."""


def context(qkv: Tensor, query_start: int, backend: str, deterministic: bool) -> Context:
    """Return what a choice for qkv [..., 3, H, d] depends on beside the number of tokens."""
    source = "backend" if backend != "auto" else VARIABLE if _within is None else "use_attention's backend"
    asked = backend if backend != "auto" else attention_mode()
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    kernels = "triton" if asked == "triton" else dispatch.mode()  # asked for by name, it runs wherever it can
    call = (fixed(qkv.shape[-1]), qkv.dtype, qkv.device, fixed(query_start), deterministic, strict, kernels)
    return asked, source, torch.is_grad_enabled() and qkv.requires_grad, call


def fixed(size: int) -> int:
    """Return the size; of a tracer's symbol, the number that it stands for, which the code is then compiled for."""
    return operator.index(size)


@dispatch.constant_to_compiler  # probes, reads files and logs; run where it is traced
def choose(tokens: int, asked: str, source: str, training: bool, call: tuple[Any, ...]) -> str:
    """Return the backend for sequences of so many tokens in a `context`.

    Raises:
        ValueError: the one asked for is unknown or can't serve them, or a probe is due while a CUDA graph is captured.
    """
    return remembered(tokens, asked, source, training, call)


@functools.lru_cache(maxsize=4096)
def remembered(tokens: int, asked: str, source: str, training: bool, call: tuple[Any, ...]) -> str:
    return choice(asked, training, Call(tokens, *call), source)


def choice(asked: str, training: bool, call: Call, source: str = "backend") -> str:
    """Return the backend for a class of calls; `source` is where it was asked for.

    Raises:
        ValueError: as `choose`.
    """
    if asked != "auto":
        known = asked in BACKENDS
        if known and (reason := probe.refusal(asked, call)) is None:
            return asked
        problem = f"which is refused: {reason}" if known else f"choose auto or one of {', '.join(BACKENDS)}"
        available = ", ".join(probe.available(call)) or "none"
        raise BackendError(
            f"{source} is {asked!r}{', ' if known else ': '}{problem}; available for {call}: {available}"
        )
    refusals = {}
    for name in order(call, training):
        reason = probe.refusal(name, call)
        if reason is None:
            return name
        refusals[name] = reason
        tell(name, reason, call)
    raise BackendError(f"no attention for {call}: {'; '.join(f'{name}: {why}' for name, why in refusals.items())}")


def order(call: Call, training: bool) -> list[str]:
    """Return all backends as "auto" tries them: the fastest measured first, then the rest in the default order."""
    default = default_order(call)
    times = seconds(call, "training" if training else "forward")
    fastest = sorted(times, key=lambda name: times[name])
    if call.device.type == "cpu":
        usual = next((name for name in default if name in times), None)
        if call.dtype not in HALVES or usual is None or times[usual] < CPU_MARGIN * times[fastest[0]]:
            fastest = []
    names = fastest + [name for name in default if name not in fastest]
    return sorted(names, key=lambda name: name != "triton") if call.kernels == "triton" else names


def seconds(call: Call, kind: str) -> dict[str, float]:
    """Return the seconds of "forward" or "training" by backend, of those measured in all `rows`."""
    times = [row[kind] for row in rows(call)]
    # In the table's order, not in a set's: which of two that tie is first must not differ from process to process.
    everywhere = [name for name in times[0] if all(name in each for each in times)] if times else []
    return {name: sum(each[name][0] for each in times) for name in everywhere}


def rows(call: Call) -> list[dict[str, Any]]:
    """Return the rows of the nearest measured shape, of any batch and heads; [] where none is near."""

    def apart(row: dict[str, Any]) -> tuple[float, float]:
        return abs(math.log(call.tokens / row["tokens"])), abs(math.log(call.head_dim / row["head_dim"]))

    table = dispatch.tuned_table(f"attention_{call.architecture}")
    found = [row for row in table.get("rows", ()) if f"torch.{row['dtype']}" == str(call.dtype)]
    near = min(found, key=lambda row: sum(apart(row)), default=None)
    if near is None or max(apart(near)) > math.log(REACH) + 1e-9:
        return []
    return [row for row in found if (row["tokens"], row["head_dim"]) == (near["tokens"], near["head_dim"])]


def tell(name: str, reason: str, call: Call) -> None:
    """Log a refusal once: a warning where the backend was thought to run, or was wanted."""
    static = BACKENDS[name].unfit(call) is not None
    line = f"attention does without {name}{'' if static else f' at {call}'}: {reason}"
    if line not in _told:
        _told.add(line)
        _log.log(logging.INFO if static and call.kernels != name else logging.WARNING, line)
