"""Results files: what benchmarks/ leaves, read and checked field by field, and which rows stand for the rest."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
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
    _check(path, "", content, {})
    if "mpdit" not in content:
        raise DataError(f'{path}: has no object "mpdit", so it is not of our benchmarks; {_MEASURE}')
    _check(path, "", content, {"mpdit": {"format": _TEXT}})
    info = content["mpdit"]
    _check_format(path, info["format"])
    _check(path, "", content, _FILE)
    rates = {**(info["peaks"] or {}), **(info["ceilings"] or {})}
    rows = tuple(_row(entry["extra_info"], entry["stats"]["data"], rates) for entry in content["benchmarks"])
    for index, row in enumerate(rows):
        if not row.samples:
            raise _wrong(path, f"benchmarks[{index}].stats.data", [], "a list of times")
        for name, values in (("seconds", row.seconds), ("ratio", row.ratio)):
            if values and not values.q20 <= values.median <= values.q80:
                place = f"benchmarks[{index}].extra_info.{name}"
                raise _wrong(path, place, asdict(values), "quantiles in order: q20, median, q80")
    keys = [row.key for row in rows]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise DataError(f"{path}: benchmarks holds {twice[2]!r} of {twice[1]!r} twice; remove one of them")
    # As pytest-benchmark found it: all of it may be missing, outside of a checkout.
    commit = content.get("commit_info") or {}
    dirty = " with changes" if commit.get("dirty") else ""
    return Results(
        path,
        date=info["date"],
        time=str(content.get("datetime") or ""),
        device=info["device"],
        machine=info["machine"],
        peaks=info["peaks"],
        ceilings=info["ceilings"],
        memory_limit=info["memory_limit_gb"],
        commit=str(commit["id"])[:12] + dirty if commit.get("id") else "",
        rows=rows,
        skipped={(entry["part"], entry["case"], entry["way"]): entry["reason"] for entry in info["skipped"]},
    )


def _check_format(path: Path, found: str) -> None:
    (family, number), (name, ours) = (text.rpartition("-")[::2] for text in (found, FORMAT))
    if family == name and number.isdigit() and int(number) > int(ours):
        raise DataError(f"{path}: mpdit.format is {found!r}, newer than {FORMAT!r}: update mpdit")
    if found != FORMAT:
        raise DataError(f"{path}: mpdit.format is {found!r}, and {FORMAT!r} is read; {_MEASURE}")


def _row(info: Json, samples: list[float], rates: Json) -> Row:
    peak, ceiling = (rates.get(name) for name in RATES.get(info["dtype"], ("", "")))
    seconds, ratio, memory = info["seconds"], info["ratio"], info["memory"] or {}
    same = ("part", "case", "model", "images", "flops", "bytes", "dtype", "gate")
    return Row(
        **{name: info[name] for name in same},
        variant=info["way"],
        samples=tuple(samples),
        seconds=Spread(seconds["median"], seconds["q20"], seconds["q80"]),
        ratio=ratio and Spread(ratio["median"], ratio["q20"], ratio["q80"]),
        allocated=memory.get("allocated"),
        reserved=memory.get("reserved"),
        peak=peak,
        ceiling=ceiling,
        copy=rates.get("copy"),
    )


def _number(value: Any, least: float = 0.0) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= least


_TEXT, _POSITIVE, _WHOLE = "a text", "a finite number above 0", "a whole number of at least 0"
_NOT_NEGATIVE, _SECONDS = "a finite number of at least 0", "a finite number of seconds above 0"
_CHECKS: dict[str, Callable[[Any], bool]] = {
    _TEXT: lambda value: isinstance(value, str) and value != "",
    _POSITIVE: lambda value: _number(value) and value > 0,
    _SECONDS: lambda value: _number(value) and value > 0,
    _NOT_NEGATIVE: _number,
    _WHOLE: lambda value: _number(value) and value == int(value),
}
_KEY = {"part": PARTS, "case": _TEXT, "way": _TEXT}
_SPREAD = dict.fromkeys(("median", "q20", "q80"), _POSITIVE)
_GATE = {"error": _NOT_NEGATIVE, "allowed": _NOT_NEGATIVE}
_ROW = {
    **_KEY,
    "dtype": _TEXT,
    "model?": _TEXT,
    **dict.fromkeys(("images?", "flops?", "bytes?"), _WHOLE),
    "seconds": _SPREAD,
    "ratio?": {"to": (OURS,), **_SPREAD},
    "memory?": {"allocated": _WHOLE, "reserved": _WHOLE},
    "gate?": lambda gate: {} if isinstance(gate, dict) and "same" in gate else _GATE,
}
_FILE = {
    "mpdit": {
        "date": _TEXT,
        "device": ("cuda", "cpu"),
        "machine": {"torch": _TEXT, "gpu": _TEXT, "cpu": _TEXT},
        "peaks?": {"bf16": _POSITIVE, "fp32": _POSITIVE, "bandwidth": _POSITIVE, "source": _TEXT},
        "ceilings?": {"copy": _POSITIVE, "matmul": _POSITIVE, "matmul32": _POSITIVE},
        "memory_limit_gb?": _POSITIVE,
        "skipped": [_KEY | {"reason": _TEXT}],
    },
    "benchmarks": [{"extra_info": _ROW, "stats": {"data": [_SECONDS]}}],
}
"""What is read of a file: objects, lists of one kind, choices, and names of _CHECKS; a field with "?" may be null."""


def _check(path: Path, place: str, value: Any, wanted: Any) -> None:
    """Raise DataError naming file, field, value and remedy where a value at `place` is not as `_FILE` wants it."""
    if callable(wanted):
        wanted = wanted(value)
    if isinstance(wanted, dict):
        if not isinstance(value, dict):
            raise _wrong(path, place or "the file", value, "an object")
        for field, inner in wanted.items():
            name = field.removesuffix("?")
            where = f"{place}.{name}" if place else name
            if name not in value:
                raise DataError(f"{path}: {where} is missing; {_MEASURE}")
            if value[name] is not None or name == field:
                _check(path, where, value[name], inner)
    elif isinstance(wanted, list):
        if not isinstance(value, list):
            raise _wrong(path, place, value, "a list")
        for index, item in enumerate(value):
            _check(path, f"{place}[{index}]", item, wanted[0])
    elif isinstance(wanted, tuple):
        if value not in wanted:
            raise _wrong(path, place, value, f"one of {', '.join(wanted)}")
    elif not _CHECKS[wanted](value):
        raise _wrong(path, place, value, wanted)


def _wrong(path: Path, place: str, value: Any, wanted: str) -> DataError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return DataError(f"{path}: {place} is {shown}, where {wanted} is needed; {_MEASURE}")
