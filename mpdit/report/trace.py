"""A trace of torch's profiler read: time by range, the kernels that take most of it, copies, how busy the GPU is.

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mpdit_kernels.command import aligned

from mpdit.core.errors import DataError
from mpdit.training.profiling import RANGES

_OPERATORS = "mpdit_kernels::"
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_KINDS = {"user_annotation", "cpu_op", *_LAUNCHES, *_ON_GPU}
_OUTSIDE = "(outside)"
_WIDEST = 80
"""Letters of a kernel's name in the text."""


@dataclass(frozen=True)
class RangeTime:
    """A range, over all of its calls: seconds it took on the CPU, seconds of GPU work launched within it."""

    name: str
    calls: int
    seconds: float
    gpu_seconds: float


@dataclass(frozen=True)
class OpTime:
    """A GPU kernel, or an operator with what it called left out: seconds over all calls, its share of the total."""

    name: str
    calls: int
    seconds: float
    share: float


@dataclass(frozen=True)
class CopyTime:
    """A kind of copy on or to the GPU."""

    name: str
    calls: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class TraceReport:
    """Where the time of a profiled window goes.

    Attributes:
        steps: how many were profiled; 0 when the trace doesn't say.
        seconds: from the start of the first step to the end of the last and of all that it launched.
        gpu: whether anything ran on a GPU.
        gpu_busy: share of `seconds` in which a kernel or a copy ran; None without GPU.
        ranges: in the order of a step, with what is outside of all of them last.
        ops: GPU kernels, or operators by their own CPU time without a GPU; the longest first.
    """

    path: str
    steps: int
    seconds: float
    gpu: bool
    gpu_busy: float | None
    ranges: tuple[RangeTime, ...]
    ops: tuple[OpTime, ...]
    copies: tuple[CopyTime, ...]

    @property
    def figures(self) -> dict[str, Any]:
        """JSON types; all times in seconds."""
        return asdict(self)

    @property
    def text(self) -> str:
        steps = f"{self.steps} step{'s' * (self.steps > 1)}" if self.steps else "a window"
        each = f", {_ms(self.seconds / self.steps)} ms a step" if self.steps else ""
        busy = "no GPU" if self.gpu_busy is None else f"GPU busy {self.gpu_busy:.1%}"
        parts = [f"{self.path}: {steps} in {_ms(self.seconds)} ms{each}, {busy}. Profiled, so no measure of speed."]
        gpu_total = sum(r.gpu_seconds for r in self.ranges)
        head = ("range", "calls", "CPU ms", "share") + (("GPU ms", "share") if self.gpu else ())
        rows = []
        for r in self.ranges:
            row = (r.name, str(r.calls or ""), _ms(r.seconds), _percent(r.seconds, self.seconds))
            rows.append(row + ((_ms(r.gpu_seconds), _percent(r.gpu_seconds, gpu_total)) if self.gpu else ()))
        parts.append(aligned([head, *rows]))
        ops = [
            (_short(op.name), str(op.calls), _ms(op.seconds), _ms(op.seconds / op.calls), f"{op.share:.1%}")
            for op in self.ops
        ]
        kind = "kernel" if self.gpu else "operator, without what it calls"
        parts.append(aligned([(kind, "calls", "ms", "mean ms", "share"), *ops]))
        if self.copies:
            copies = [
                (c.name, str(c.calls), f"{c.bytes / 1e6:.3f}", _ms(c.seconds), f"{c.bytes / c.seconds / 1e9:.1f}")
                for c in self.copies
                if c.seconds
            ]
            parts.append(aligned([("copy", "calls", "MB", "ms", "GB/s"), *copies]))
        return "\n\n".join(parts)

    def __str__(self) -> str:
        return self.text


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


def trace_report(path: str | Path, top: int = 15) -> TraceReport:
    """Read OUT/profile/trace-*.json.gz (or .json) and report the `top` kernels or operators.

    Raises DataError when the file can't be read, is no trace of torch's profiler, or holds none of our ranges.
    """
    spans = _spans(path)
    annotations = [span for span in spans if span.kind == "user_annotation"]
    ranges = sorted((span for span in annotations if span.name in RANGES), key=lambda span: span.start)
    if not ranges:
        raise DataError(
            f"{path} holds no range of a training step ({', '.join(RANGES)}): give a trace that launch/train.py "
            "wrote with --profile torch"
        )
    steps = [span for span in annotations if span.name.startswith("step ")]
    on_gpu = [span for span in spans if span.kind in _ON_GPU]
    start = min(span.start for span in steps or ranges)
    end = max(span.end for span in (*(steps or ranges), *on_gpu))
    ops = _sums(_kernels(spans)) if on_gpu else _own_times(spans)
    total = sum(seconds for _, seconds in ops.values())
    longest = sorted(ops.items(), key=lambda item: -item[1][1])[:top]
    return TraceReport(
        path=str(path),
        steps=len(steps),
        seconds=(end - start) / 1e6,
        gpu=bool(on_gpu),
        gpu_busy=_covered(on_gpu, start, end) / (end - start) if on_gpu and end > start else None,
        ranges=_by_range(ranges, on_gpu, _launches(spans), (end - start) / 1e6),
        ops=tuple(OpTime(name, calls, s, s / total if total else 0.0) for name, (calls, s) in longest),
        copies=_copies(on_gpu),
    )


def _spans(path: str | Path) -> list[_Span]:
    try:
        content = Path(path).read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        document = json.loads(content.decode(errors="replace"))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"trace {path} can't be read: {error}; give a .json or .json.gz file that is whole") from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"trace {path} is not JSON ({error}): give one that launch/train.py wrote with --profile torch"
        ) from None
    try:
        events = document["traceEvents"]
        return [_span(event) for event in events if event.get("ph") == "X" and event.get("cat") in _KINDS]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"an event lacks {error}" if isinstance(error, KeyError) else "it is JSON of another kind"
        raise DataError(
            f"{path} is not a trace of torch's profiler ({reason}): give one that launch/train.py wrote with "
            "--profile torch"
        ) from None


def _span(event: dict[str, Any]) -> _Span:
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


def _launches(spans: Iterable[_Span]) -> dict[int | None, float]:
    """When the CPU launched what has a correlation id."""
    return {span.correlation: span.start for span in spans if span.kind in _LAUNCHES and span.correlation is not None}


def _kernels(spans: Iterable[_Span]) -> Iterator[tuple[str, float]]:
    """Name and microseconds of each kernel on the GPU."""
    ours = [span for span in spans if span.kind == "cpu_op" and span.name.startswith(_OPERATORS)]
    names = {span.operator: f"{span.name.removeprefix(_OPERATORS)}: " for span in ours if span.operator is not None}
    for span in spans:
        if span.kind == "kernel":
            yield names.get(span.operator or 0, "") + span.name, span.end - span.start


def _by_range(
    ranges: Sequence[_Span], on_gpu: Iterable[_Span], launches: dict[int | None, float], window: float
) -> tuple[RangeTime, ...]:
    starts = [span.start for span in ranges]
    gpu: dict[str, float] = defaultdict(float)
    for span in on_gpu:
        launched = launches.get(span.correlation)
        index = -1 if launched is None else bisect.bisect_right(starts, launched) - 1
        inside = index >= 0 and launched is not None and launched < ranges[index].end
        gpu[ranges[index].name if inside else _OUTSIDE] += (span.end - span.start) / 1e6
    cpu = _sums((span.name, span.end - span.start) for span in ranges)
    found = [RangeTime(name, *cpu[name], gpu[name]) for name in RANGES if name in cpu]
    outside = max(0.0, window - sum(entry.seconds for entry in found))
    return (*found, RangeTime(_OUTSIDE, 0, outside, gpu[_OUTSIDE]))


def _own_times(spans: Iterable[_Span]) -> dict[str, tuple[int, float]]:
    """Of each operator, calls and seconds on the CPU without those of the operators it called."""
    own: list[tuple[str, float]] = []
    threads: dict[Any, list[_Span]] = defaultdict(list)
    for span in spans:
        if span.kind == "cpu_op":
            threads[span.thread].append(span)
    for called in threads.values():
        called.sort(key=lambda span: (span.start, -span.end))
        open_spans: list[list[Any]] = []  # span and what is left of its time, outermost first
        for span in called:
            while open_spans and open_spans[-1][0].end <= span.start:
                done, left = open_spans.pop()
                own.append((done.name, left))
            if open_spans:
                open_spans[-1][1] -= span.end - span.start
            open_spans.append([span, span.end - span.start])
        own += [(span.name, left) for span, left in open_spans]
    return _sums(own)


def _sums(times: Iterable[tuple[str, float]]) -> dict[str, tuple[int, float]]:
    """Calls and seconds by name, from microseconds."""
    sums: dict[str, tuple[int, float]] = {}
    for name, microseconds in times:
        calls, seconds = sums.get(name, (0, 0.0))
        sums[name] = calls + 1, seconds + microseconds / 1e6
    return sums


def _covered(spans: Iterable[_Span], start: float, end: float) -> float:
    """Microseconds of the window in which at least one of the spans runs."""
    covered, reached = 0.0, start
    for span in sorted(spans, key=lambda span: span.start):
        covered += max(0.0, min(span.end, end) - max(span.start, reached))
        reached = max(reached, span.end)
    return covered


def _copies(on_gpu: Iterable[_Span]) -> tuple[CopyTime, ...]:
    copies = [span for span in on_gpu if span.kind != "kernel"]
    sizes: dict[str, int] = defaultdict(int)
    for span in copies:
        sizes[span.name] += span.bytes
    sums = _sums((span.name, span.end - span.start) for span in copies)
    ordered = sorted(sums.items(), key=lambda item: -item[1][1])
    return tuple(CopyTime(name, calls, sizes[name], seconds) for name, (calls, seconds) in ordered)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _short(name: str) -> str:
    return name if len(name) <= _WIDEST else f"{name[: _WIDEST - 3]}..."
