"""Time all attention backends that run here, in turns in one process: the table that choices are made from."""

from __future__ import annotations

import contextlib
import json
import math
import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from mpdit_kernels import dispatch
from mpdit_kernels.backends import BACKENDS, Backend, Call, probe
from torch import Tensor

from tools import timing
from tools.command import aligned, write_atomically

LIBRARIES = ("flash-attn", "flash-attn-4", "xformers")
KINDS = ("forward", "training")
BRACKET = 5e-3
"""Seconds that a timed bracket lasts on a CPU, at least."""


@dataclass(frozen=True)
class CallShape:
    tokens: int
    head_dim: int
    dtype: str
    batch: int
    heads: int

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {self.heads} heads of {self.head_dim}, {self.dtype}, batch {self.batch}"


def shapes(device: torch.device) -> list[CallShape]:
    """Return those of the presets' training, the most valuable first; on a CPU few images and the digits."""
    if device.type == "cuda":
        wide = [(tokens, *heads) for heads in ((72, 16), (64, 12)) for tokens in (80, 272, 1040, 256, 1024)]
        return [CallShape(tokens, d, "bfloat16", batch, heads) for tokens, d, heads in wide for batch in (128, 32)]
    small = [(20, 48, 2), (68, 48, 2), (80, 72, 16), (272, 72, 16), (80, 64, 12), (272, 64, 12)]
    return [CallShape(tokens, d, dtype, 4, heads) for dtype in ("float32", "bfloat16") for tokens, d, heads in small]


def measure(device: torch.device, minutes: float, out: Path | None) -> int:
    """Time every shape that fits into the minutes, and write the table after each; the rest stays as it was there."""
    end = time.monotonic() + 60 * minutes
    if device.type == "cuda":
        torch.cuda.set_device(device)
    clock = timing.GpuClock() if device.type == "cuda" else timing.WallClock()
    todo, machine = shapes(device), _machine(device)
    file = out or dispatch.TUNED / f"attention_{_call(todo[0], device).architecture}.json"
    rows: list[dict[str, Any]] = []
    before = _earlier(file, machine)
    write_atomically(file, _json(machine, [*before.values()]))  # what can't be written is found out first
    while todo and time.monotonic() < end:
        shape = todo.pop(0)
        rows.append(_row(clock, shape, device, (end - time.monotonic()) / (len(todo) + 1)))
        before.pop(shape, None)
        write_atomically(file, _json(machine, [*rows, *before.values()]))
        print(f"{shape}\n{_lines(rows[-1])}", flush=True)
    if todo:
        print(f"not reached: {'; '.join(map(str, todo))}")
    print(f"written to {file}")
    return 0


def _earlier(file: Path, now: dict[str, Any]) -> dict[CallShape, dict[str, Any]]:
    """Return rows of a table that was measured on such a machine with these libraries, whatever the day."""
    old = json.loads(file.read_text()) if file.exists() else {}
    same = ("gpu", "cpu", "threads", "torch", "triton", *LIBRARIES)
    if any(old.get("machine", {}).get(name) != now.get(name) for name in same):
        return {}
    return {CallShape(*(found[name] for name in CallShape.__dataclass_fields__)): found for found in old["rows"]}


def _row(clock: timing.Clock, shape: CallShape, device: torch.device, seconds: float) -> dict[str, Any]:
    """Return a row of the table, taken in about so many seconds: only backends that pass the probe are timed."""
    call, found = _call(shape, device), asdict(shape)
    reasons = {name: probe.refusal(name, call) for name in BACKENDS}
    qkv = torch.randn(shape.batch, shape.tokens, 3, shape.heads, shape.head_dim, device=device, dtype=call.dtype)
    gradient = torch.randn_like(qkv[:, :, 0])
    for kind, work in zip(KINDS, (_forward, _training), strict=True):
        contenders: dict[str, timing.Prepare] = {}
        for name in [name for name, reason in reasons.items() if reason is None]:
            try:
                contenders[name] = _contender(partial(work, BACKENDS[name], qkv, gradient), device)
            except torch.OutOfMemoryError:
                reasons[name] = "out of memory"
        times = timing.compare(clock, contenders, rounds=60, seconds=min(5.0, seconds / 2))
        found[kind] = {name: [float(f"{x:.4g}") for x in (t.median, t.low, t.high)] for name, t in times.items()}
    return found | {"refused": {name: reason for name, reason in reasons.items() if reason}}


def _contender(work: Callable[[], None], device: torch.device) -> timing.Prepare:
    """Return calls enough to be timed by a CPU's clock; a GPU is timed by its own, one call in cold memory."""
    work()  # compilation, and whether memory suffices
    start = time.perf_counter()
    work()
    repeats = 1 if device.type == "cuda" else math.ceil(BRACKET / (time.perf_counter() - start))
    return lambda: [work] * repeats


def _forward(backend: Backend, qkv: Tensor, gradient: Tensor) -> None:
    with torch.no_grad():
        backend.run(qkv, qkv.shape[-1] ** -0.5, 0, False)


def _training(backend: Backend, qkv: Tensor, gradient: Tensor) -> None:
    leaf = qkv.detach().requires_grad_()
    torch.autograd.grad(backend.run(leaf, qkv.shape[-1] ** -0.5, 0, False), leaf, gradient)


def _call(shape: CallShape, device: torch.device) -> Call:
    return Call(shape.tokens, shape.head_dim, getattr(torch, shape.dtype), device, kernels=dispatch.mode())


def _machine(device: torch.device) -> dict[str, Any]:
    """Return what is measured on, with the libraries' versions."""
    found = timing.machine(device.type)
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _json(machine: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return a line for the machine, and one for each row."""
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    return f'{{\n "machine": {json.dumps(machine)},\n "rows": [\n{lines}\n ]\n}}\n'


def _lines(row: dict[str, Any]) -> str:
    """Return microseconds of each backend."""
    names = sorted(row["training"], key=lambda name: row["training"][name])
    cells = [(name, *(f"{kind} {1e6 * row[kind][name][0]:.0f} us" for kind in KINDS)) for name in names]
    text = textwrap.indent(aligned(cells), "  ") if cells else "  nothing available"
    if len(names) > 1 and "triton" in names:
        best = {kind: min(row[kind][name][0] for name in names if name != "triton") for kind in KINDS}
        ratios = ", ".join(f"{kind} {best[kind] / row[kind]['triton'][0]:.2f}x" for kind in KINDS)
        text += f"\n  triton against the best library: {ratios}"
    return text
