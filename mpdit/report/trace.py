"""Reads a trace of torch's profiler: time by range, the kernels that take most of it, copies, how busy the GPU is.

The trace is the JSON that torch.profiler exports (Chrome's event format, times in microseconds, the GPU's on the
clock of the CPU). What runs on the GPU belongs to the range in which it was launched: event -> its launch, by
"correlation" -> the range around the launch, on whichever thread, since backward launches from one of its own.
Several of our kernels are called alike ("_forward"), so those have their operator's name before their own; it is the
operator with the same "External id".
"""

from __future__ import annotations

import bisect
import gzip
import json
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mpdit.core.errors import DataError
from mpdit.core.files import read_bytes
from mpdit.core.text import aligned

RANGES = ("data", "h2d", "forward", "backward", "optimizer", "ema", "checkpoint", "sample")
"""The parts of a step as training names them in every trace, in the order of a step."""

_OPERATORS = "mpdit_kernels::"
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_KINDS = {"user_annotation", "cpu_op", *_LAUNCHES, *_ON_GPU}
_OUTSIDE = "(outside)"
_WIDEST = 80
"""Letters of a kernel's name in the text."""
_REMEDY = "give one that launch/train.py wrote with --profile torch"

Json = dict[str, Any]


class _Span(NamedTuple):
    """An event with a duration, in microseconds. A tuple, because there may be millions."""

    name: str
    kind: str
    thread: tuple[str, str]
    start: float
    end: float
    correlation: int | None
    operator: int | None
    bytes: int

    @property
    def duration(self) -> float:
        """Return microseconds."""
        return self.end - self.start


def trace_report(path: str | Path, top: int = 15) -> Json:
    """Read OUT/profile/trace-*.json.gz (or .json) and return where the time of the profiled window goes.

    Returns:
        JSON types, all times in seconds:
        steps: how many were profiled; 0 when the trace doesn't say.
        seconds: from the start of the first step to the end of the last and of all that it launched.
        gpu: whether anything ran on a GPU.
        gpu_busy: share of `seconds` in which a kernel or a copy ran; None without GPU.
        ranges: over all calls, seconds on the CPU and of GPU work launched within, in the order of a step; what is
            outside of all of them last.
        ops: the `top` GPU kernels, or without a GPU operators by their own CPU time, with what they called left out;
            the longest first, with their share of all.
        copies: by kind, on or to the GPU.

    Raises:
        DataError: the file can't be read, is no trace of torch's profiler, or holds none of our ranges.
    """
    spans = _spans(path)
    annotations = [span for span in spans if span.kind == "user_annotation"]
    ranges = sorted((span for span in annotations if span.name in RANGES), key=lambda span: span.start)
    if not ranges:
        raise DataError(f"{path} holds no range of a training step ({', '.join(RANGES)}): {_REMEDY}")
    steps = [span for span in annotations if span.name.startswith("step ")]
    on_gpu = [span for span in spans if span.kind in _ON_GPU]
    start = min(span.start for span in steps or ranges)
    end = max(span.end for span in (*(steps or ranges), *on_gpu))
    ops = _sums(_kernels(spans) if on_gpu else _own_times(spans))
    total = sum(row["seconds"] for row in ops)
    copies = [span for span in on_gpu if span.kind != "kernel"]
    return {
        "path": str(path),
        "steps": len(steps),
        "seconds": (end - start) / 1e6,
        "gpu": bool(on_gpu),
        "gpu_busy": _covered(on_gpu, start, end) / (end - start) if on_gpu and end > start else None,
        "ranges": _by_range(ranges, on_gpu, spans, (end - start) / 1e6),
        "ops": [row | {"share": row["seconds"] / total if total else 0.0} for row in ops[:top]],
        "copies": [
            row | {"bytes": sum(span.bytes for span in copies if span.name == row["name"])}
            for row in _sums((span.name, span.duration) for span in copies)
        ],
    }


def trace_text(report: Json) -> str:
    """Return a trace's report for people."""
    steps, seconds, gpu = report["steps"], report["seconds"], report["gpu"]
    window = f"{steps} step{'s' * (steps > 1)}" if steps else "a window"
    each = f", {_ms(seconds / steps)} ms a step" if steps else ""
    busy = "no GPU" if report["gpu_busy"] is None else f"GPU busy {report['gpu_busy']:.1%}"
    title = f"{report['path']}: {window} in {_ms(seconds)} ms{each}, {busy}. Profiled, so no measure of speed."
    gpu_total = sum(row["gpu_seconds"] for row in report["ranges"])
    columns = 6 if gpu else 4
    ranges = [("range", "calls", "CPU ms", "share", "GPU ms", "share")[:columns]]
    for row in report["ranges"]:
        times = ((row["seconds"], seconds), (row["gpu_seconds"], gpu_total))
        cells = [cell for part, whole in times for cell in (_ms(part), f"{part / whole:.1%}" if whole else "")]
        ranges.append((row["name"], str(row["calls"] or ""), *cells)[:columns])
    ops = [("kernel" if gpu else "operator, without what it calls", "calls", "ms", "mean ms", "share")]
    for row in report["ops"]:
        name, calls = row["name"], row["calls"]
        shown = name if len(name) <= _WIDEST else f"{name[: _WIDEST - 3]}..."
        ops.append((shown, str(calls), _ms(row["seconds"]), _ms(row["seconds"] / calls), f"{row['share']:.1%}"))
    copies = [("copy", "calls", "MB", "ms", "GB/s")]
    for row in report["copies"]:
        if row["seconds"]:
            size, speed = f"{row['bytes'] / 1e6:.3f}", f"{row['bytes'] / row['seconds'] / 1e9:.1f}"
            copies.append((row["name"], str(row["calls"]), size, _ms(row["seconds"]), speed))
    shown = [ranges, ops, copies] if report["copies"] else [ranges, ops]
    return "\n\n".join([title, *map(aligned, shown)])


def _spans(path: str | Path) -> list[_Span]:
    try:
        content = read_bytes(path)
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        document = json.loads(content.decode("utf-8-sig", errors="replace"))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"trace {path} can't be read: {error}; give a .json or .json.gz file that is whole") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"trace {path} is not JSON ({error}): {_REMEDY}") from None
    try:
        events = document["traceEvents"]
        return [_span(event) for event in events if event.get("ph") == "X" and event.get("cat") in _KINDS]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"an event lacks {error}" if isinstance(error, KeyError) else "it is JSON of another kind"
        raise DataError(f"{path} is not a trace of torch's profiler ({reason}): {_REMEDY}") from None


def _span(event: Json) -> _Span:
    args = event.get("args", {})
    start, correlation, operator = float(event["ts"]), args.get("correlation"), args.get("External id")
    return _Span(
        name=str(event["name"]),
        kind=str(event["cat"]),
        thread=(str(event.get("pid")), str(event.get("tid"))),
        start=start,
        end=start + float(event["dur"]),
        correlation=None if correlation is None else int(correlation),
        operator=None if operator is None else int(operator),
        bytes=int(args.get("bytes", 0)),
    )


def _kernels(spans: Iterable[_Span]) -> Iterator[tuple[str, float]]:
    """Yield name and microseconds of each kernel on the GPU."""
    ours = [span for span in spans if span.kind == "cpu_op" and span.name.startswith(_OPERATORS)]
    names = {span.operator: f"{span.name.removeprefix(_OPERATORS)}: " for span in ours if span.operator}
    for span in spans:
        if span.kind == "kernel":
            yield names.get(span.operator or 0, "") + span.name, span.duration


def _own_times(spans: Iterable[_Span]) -> Iterator[tuple[str, float]]:
    """Yield name and microseconds on the CPU of each operator, without those of the operators it called."""
    open_spans: dict[Any, list[list[Any]]] = defaultdict(list)  # by thread: span and what is left, outermost first
    for span in sorted((span for span in spans if span.kind == "cpu_op"), key=lambda span: (span.start, -span.end)):
        outer = open_spans[span.thread]
        while outer and outer[-1][0].end <= span.start:
            done, left = outer.pop()
            yield done.name, left
        if outer:
            outer[-1][1] -= span.duration
        outer.append([span, span.duration])
    for outer in open_spans.values():
        yield from ((span.name, left) for span, left in outer)


def _by_range(ranges: Sequence[_Span], on_gpu: Iterable[_Span], spans: Iterable[_Span], window: float) -> list[Json]:
    """Return calls, CPU seconds and GPU seconds of each range, and of the rest of a window of so many seconds."""
    launched: dict[int | None, float] = {span.correlation: span.start for span in spans if span.kind in _LAUNCHES}
    launched.pop(None, None)
    starts = [span.start for span in ranges]
    gpu: dict[str, float] = defaultdict(float)
    for span in on_gpu:
        name, launch = _OUTSIDE, launched.get(span.correlation)
        if launch is not None and (after := bisect.bisect_right(starts, launch)):
            around = ranges[after - 1]  # the last range to begin before the launch
            name = around.name if launch < around.end else _OUTSIDE
        gpu[name] += span.duration / 1e6
    cpu = sorted(_sums((span.name, span.duration) for span in ranges), key=lambda row: RANGES.index(row["name"]))
    outside = max(0.0, window - sum(row["seconds"] for row in cpu))
    rows = [*cpu, {"name": _OUTSIDE, "calls": 0, "seconds": outside}]
    return [row | {"gpu_seconds": gpu[row["name"]]} for row in rows]


def _sums(times: Iterable[tuple[str, float]]) -> list[Json]:
    """Return name, calls and seconds over all of a name, from microseconds, the longest first."""
    calls: dict[str, int] = defaultdict(int)
    seconds: dict[str, float] = defaultdict(float)
    for name, microseconds in times:
        calls[name] += 1
        seconds[name] += microseconds / 1e6
    longest = sorted(seconds, key=lambda name: -seconds[name])
    return [{"name": name, "calls": calls[name], "seconds": seconds[name]} for name in longest]


def _covered(spans: Iterable[_Span], start: float, end: float) -> float:
    """Return the microseconds of the window in which at least one of the spans runs."""
    covered, reached = 0.0, start  # streams overlap, and no moment counts twice
    for span in sorted(spans, key=lambda span: span.start):
        covered += max(0.0, min(span.end, end) - max(span.start, reached))
        reached = max(reached, span.end)
    return covered


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"
