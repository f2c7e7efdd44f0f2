"""Results files: what benchmarks/ leaves, read and checked field by field, and which rows stand for the rest."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpdit.core.errors import DataError
from mpdit.model.presets import PRESETS

FORMAT = "mpdit-bench-1"
PARTS = ("kernels", "block", "forward", "step", "sampling", "optimizer", "loader")
OURS = "ours"
"""The variant that every other of its case is compared with."""
RATES = {"bf16": ("bf16", "matmul"), "fp16": ("bf16", "matmul"), "fp32": ("fp32", "matmul32")}
"""By a row's dtype, the datasheet peak and the measured ceiling of its products; TF32 has neither."""

_PLAIN = ("eager", "compile")
"""Our code without its kernels: PyTorch's operators as they are, and under torch.compile."""
_MEASURE = "measure again: `make bench-gpu`, or `pytest benchmarks/ --benchmark-only --benchmark-json FILE`"
"""What to do about a file that can't be used."""

Json = dict[str, Any]
Key = tuple[str, str, str]
"""Part, case and variant of a row."""


@dataclass(frozen=True)
class Spread:
    """A median and the quantiles that enclose the middle three fifths."""

    median: float
    q20: float
    q80: float

    def per(self, work: float) -> Spread:
        """Return the rate at which `work` is done in this time; quantiles are those of the time, turned over."""
        return Spread(work / self.median, work / self.q80, work / self.q20)


@dataclass(frozen=True)
class Row:
    """One variant at one problem (`case`).

    Attributes:
        model: preset it runs, if any.
        images: images or samples of a call.
        flops: exact FLOP of a call on the reference graph; bytes: the least it must move.
        dtype: what products take.
        samples: seconds of a call, as measured; seconds: their summary.
        ratio: time over that of "ours", turn by turn: above 1, ours is faster. None for ours.
        allocated, reserved: peak bytes of a call of this variant alone.
        gate: the check it passed before it was timed: {"error", "allowed"} or {"same"}.
        peak, ceiling: FLOP a second, of the datasheet and of products measured in the same run, for this dtype.
        copy: bytes a second of copies measured in the same run.
    """

    part: str
    case: str
    variant: str
    model: str | None
    images: int | None
    flops: int | None
    bytes: int | None
    dtype: str
    samples: tuple[float, ...]
    seconds: Spread
    ratio: Spread | None
    allocated: int | None
    reserved: int | None
    gate: Json | None
    peak: float | None
    ceiling: float | None
    copy: float | None

    @property
    def key(self) -> Key:
        return self.part, self.case, self.variant

    @property
    def images_per_second(self) -> Spread | None:
        return self._rate(self.images)

    @property
    def mfu(self) -> Spread | None:
        """Share of the datasheet's peak."""
        return self._rate(self.flops, self.peak)

    @property
    def of_ceiling(self) -> Spread | None:
        """Share of the rate of products measured in the same run."""
        return self._rate(self.flops, self.ceiling)

    @property
    def of_copy(self) -> Spread | None:
        """Share of the rate of copies measured in the same run."""
        return self._rate(self.bytes, self.copy)

    @property
    def operation(self) -> str:
        """Of a kernel's case: "adaln" of "adaln, XL, 80 tokens, forward"."""
        return self.case.removeprefix(f"{self.part}, ").partition(",")[0].strip()

    def to_dict(self) -> Json:
        """Return the figures and what follows from them, without the samples."""
        plain = ("model", "images", "flops", "bytes", "dtype", "allocated", "reserved", "gate")
        rates = {"flops_per_second": self._rate(self.flops), "bytes_per_second": self._rate(self.bytes)}
        names = ("seconds", "ratio", "images_per_second", "mfu", "of_ceiling", "of_copy")
        spreads = {name: getattr(self, name) for name in names} | rates
        return {
            **named(self.key),
            **{name: getattr(self, name) for name in plain},
            "samples": len(self.samples),
            **{name: spread and asdict(spread) for name, spread in spreads.items()},
        }

    def _rate(self, work: float | None, limit: float | None = 1.0) -> Spread | None:
        return self.seconds.per(work / limit) if work and limit else None


@dataclass(frozen=True)
class Results:
    """A results file.

    Attributes:
        date, time: of the last part that was measured; time is ISO 8601, "" where unknown.
        machine: hardware, versions, clocks and power, as the run found them.
        peaks: the datasheet's bf16 and fp32 (FLOP/s), bandwidth (bytes/s) and its source; None for a CPU.
        ceilings: measured in the same run: copy (bytes/s), matmul and matmul32 (FLOP/s).
        memory_limit: GB that the process was allowed on the GPU.
        commit: of the code that was measured, "" where unknown.
        skipped: why variants have no time.
    """

    path: Path
    date: str
    time: str
    device: str
    machine: Json
    peaks: Json | None
    ceilings: dict[str, float] | None
    memory_limit: float | None
    commit: str
    rows: tuple[Row, ...]
    skipped: dict[Key, str]

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def hardware(self) -> str:
        """The GPU, or the CPU and its threads; two runs on the same can be compared."""
        if self.on_gpu:
            return str(self.machine["gpu"])
        threads = self.machine.get("threads")
        return f"{self.machine['cpu']} (CPU{f', {threads} threads' if threads else ''})"

    @property
    def place(self) -> str:
        """The machine, and what it was held to."""
        return self.hardware + ("" if self.memory_limit is None else f", limited to {self.memory_limit:g} GB")

    def to_dict(self) -> Json:
        """Return the file without its samples, with what follows from its figures."""
        names = ("date", "device", "hardware", "machine", "peaks", "ceilings", "memory_limit", "commit")
        plain = {name: getattr(self, name) for name in names}
        skipped = [named(key) | {"reason": reason} for key, reason in self.skipped.items()]
        return {"path": str(self.path), **plain, "rows": [row.to_dict() for row in self.rows], "skipped": skipped}

    def of(self, part: str) -> list[Row]:
        return [row for row in self.rows if row.part == part]

    def cases(self, part: str) -> dict[str, list[Row]]:
        """Return the part's rows by case, in the order of the file."""
        cases: dict[str, list[Row]] = {}
        for row in self.of(part):
            cases.setdefault(row.case, []).append(row)
        return cases

    def largest(self, part: str) -> dict[str, list[Row]]:
        """Return of each model the case with the most images, of those that ours has run."""
        cases, found = self.cases(part), dict[str | None, Row]()
        for own in filter(None, map(ours, cases.values())):
            best = found.get(own.model)
            if best is None or (own.images or 0) > (best.images or 0):
                found[own.model] = own
        return {own.case: cases[own.case] for own in found.values()}


def named(key: Key) -> Json:
    """Return a row's key by the names that it has in files."""
    return dict(zip(("part", "case", "way"), key, strict=True))


def ours(rows: Iterable[Row]) -> Row | None:
    return next((row for row in rows if row.variant == OURS), None)


def best_opponent(rows: Sequence[Row]) -> Row | None:
    """Return the fastest of a case that is not our code on our kernels."""
    others = (row for row in rows if not row.variant.startswith(OURS))
    return min(others, key=lambda row: row.seconds.median, default=None)


def kind(variant: str) -> str:
    """Return "ours", "ours, compiled", "plain", the name of another model in our code, or of another project."""
    if variant in _PLAIN:
        return "plain"
    return next((name for name in PRESETS if variant.startswith(name)), variant)


def read_results(path: str | Path) -> Results:
    """Read a results file; DataError names file, field and remedy when it is none, damaged, or of a newer format."""
    path = Path(path)
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such results file; give JSON from benchmarks/results") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder: give the results files in it") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); {_MEASURE}") from error
    return parse_results(path, content)


def parse_results(path: Path, content: Any) -> Results:
    """Check the content of a results file; raises as `read_results`."""
    top = _Object.of(path, content)
    if "mpdit" not in top.values:
        raise DataError(f'{path}: has no object "mpdit", so it is not of our benchmarks; {_MEASURE}')
    info = top.object("mpdit")
    found = info.get("format", "a text")
    if found != FORMAT:
        (family, number), (name, ours) = (text.rpartition("-")[::2] for text in (found, FORMAT))
        if family == name and number.isdigit() and int(number) > int(ours):
            raise DataError(f"{path}: mpdit.format is {found!r}, newer than {FORMAT!r}: update mpdit")
        raise DataError(f"{path}: mpdit.format is {found!r}, and {FORMAT!r} is read; {_MEASURE}")
    device = info.one_of("device", ("cuda", "cpu"))
    machine, peaks, ceilings = info.object("machine"), info.optional("peaks"), info.optional("ceilings")
    for name in ("gpu" if device == "cuda" else "cpu", "torch"):
        machine.get(name, "a text")
    rates: dict[str, float] = {}
    if peaks:
        peaks.get("source", "a text")
        rates |= {name: peaks.get(name, _POSITIVE) for name in ("bf16", "fp32", "bandwidth")}
    if ceilings:
        rates |= {name: ceilings.get(name, _POSITIVE) for name in ("copy", "matmul", "matmul32")}
    rows = tuple(_row(entry.object("extra_info"), entry, rates) for entry in top.objects("benchmarks"))
    seen: set[Key] = set()
    for row in rows:
        if row.key in seen:
            raise DataError(f"{path}: benchmarks holds {row.variant!r} of {row.case!r} twice; remove one of them")
        seen.add(row.key)
    return Results(
        path,
        date=info.get("date", "a text"),
        time=str(top.values.get("datetime") or ""),
        device=device,
        machine=machine.values,
        peaks=peaks.values if peaks else None,
        ceilings=ceilings.values if ceilings else None,
        memory_limit=info.get("memory_limit_gb", _POSITIVE, optional=True),
        commit=_commit(top.values.get("commit_info")),
        rows=rows,
        skipped={_key(entry): entry.get("reason", "a text") for entry in info.objects("skipped")},
    )


def _row(info: _Object, entry: _Object, rates: dict[str, float]) -> Row:
    dtype = info.get("dtype", "a text")
    memory, gate, ratio = info.optional("memory"), info.optional("gate"), info.optional("ratio")
    if gate and "same" not in gate.values:
        for name in ("error", "allowed"):
            gate.get(name, "a finite number of at least 0")
    if ratio:
        ratio.one_of("to", (OURS,))
    peak, ceiling = (rates.get(name) for name in RATES.get(dtype, ("", "")))
    samples = entry.object("stats").items("data", "a list of times")
    part, case, variant = _key(info)
    return Row(
        part,
        case,
        variant,
        model=info.get("model", "a text", optional=True),
        images=info.get("images", _WHOLE, optional=True),
        flops=info.get("flops", _WHOLE, optional=True),
        bytes=info.get("bytes", _WHOLE, optional=True),
        dtype=dtype,
        samples=tuple(samples.get(index, "a finite number of seconds above 0") for index in samples.values),
        seconds=_spread(info.object("seconds")),
        ratio=_spread(ratio) if ratio else None,
        allocated=memory.get("allocated", _WHOLE) if memory else None,
        reserved=memory.get("reserved", _WHOLE) if memory else None,
        gate=gate.values if gate else None,
        peak=peak,
        ceiling=ceiling,
        copy=rates.get("copy"),
    )


def _key(entry: _Object) -> Key:
    return entry.one_of("part", PARTS), entry.get("case", "a text"), entry.get("way", "a text")


def _spread(entry: _Object) -> Spread:
    found = Spread(*(entry.get(name, _POSITIVE) for name in ("median", "q20", "q80")))
    if not found.q20 <= found.median <= found.q80:
        entry.fail(entry.place, entry.values, "quantiles in order: q20, median, q80")
    return found


def _commit(info: Any) -> str:
    """Return what pytest-benchmark found: all of it may be missing, outside of a checkout."""
    if not isinstance(info, dict) or not info.get("id"):
        return ""
    return str(info["id"])[:12] + (" with changes" if info.get("dirty") else "")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_POSITIVE, _WHOLE = "a finite number above 0", "a whole number of at least 0"
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "an object": lambda value: isinstance(value, dict),
    "a list": lambda value: isinstance(value, list),
    "a list of times": lambda value: isinstance(value, list) and len(value) > 0,
    "a text": lambda value: isinstance(value, str) and value != "",
    _POSITIVE: lambda value: _number(value) and value > 0,
    "a finite number of seconds above 0": lambda value: _number(value) and value > 0,
    "a finite number of at least 0": lambda value: _number(value) and value >= 0,
    _WHOLE: lambda value: _number(value) and value >= 0 and value == int(value),
}


@dataclass(frozen=True)
class _Object:
    """A JSON object, or a list by index, at `place` of a file; raises DataError naming file, field, value, remedy."""

    path: Path
    place: str
    values: dict[Any, Any]

    @classmethod
    def of(cls, path: Path, content: Any) -> _Object:
        """Return the file's own object."""
        return cls(path, "", {"the file": content}).object("the file", "")

    def get(self, name: str | int, wanted: str, optional: bool = False) -> Any:
        """Return the value of a field that is `wanted`, one of _CHECKS."""
        if name not in self.values:
            raise DataError(f"{self.path}: {self._name(name)} is missing; {_MEASURE}")
        value = self.values[name]
        if not (optional and value is None) and not _CHECKS[wanted](value):
            self.fail(self._name(name), value, wanted)
        return value

    def one_of(self, name: str, allowed: Sequence[str]) -> str:
        value: str = self.get(name, "a text")
        if value not in allowed:
            self.fail(self._name(name), value, f"one of {', '.join(allowed)}")
        return value

    def object(self, name: str | int, place: str | None = None) -> _Object:
        return _Object(self.path, self._name(name) if place is None else place, self.get(name, "an object"))

    def optional(self, name: str) -> _Object | None:
        return None if self.get(name, "an object", optional=True) is None else self.object(name)

    def items(self, name: str, wanted: str = "a list") -> _Object:
        return _Object(self.path, self._name(name), dict(enumerate(self.get(name, wanted))))

    def objects(self, name: str) -> Iterator[_Object]:
        items = self.items(name)
        return map(items.object, items.values)

    def fail(self, name: str, value: Any, wanted: str) -> None:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise DataError(f"{self.path}: {name} is {shown}, where {wanted} is needed; {_MEASURE}")

    def _name(self, name: str | int) -> str:
        if isinstance(name, int):
            return f"{self.place}[{name}]"
        return f"{self.place}.{name}" if self.place else name
