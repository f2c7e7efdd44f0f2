"""Reads the results files that benchmarks/ writes, and tells which rows stand for the rest."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mpdit.core.errors import DataError
from mpdit.core.files import read_bytes
from mpdit.model.presets import PRESETS

FORMAT = "mpdit-bench-1"
PARTS = ("kernels", "block", "forward", "step", "sampling", "optimizer", "loader")
OURS = "ours"
"""The variant that every other of its case is compared with."""
RATES = {"bf16": ("bf16", "matmul"), "fp16": ("bf16", "matmul"), "fp32": ("fp32", "matmul32")}
"""Names of the datasheet peak and the measured ceiling of products, by a row's dtype; TF32 has neither."""

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
        """Return what names the row in every file: part, case, variant."""
        return self.part, self.case, self.variant

    @property
    def images_per_second(self) -> Spread | None:
        """Return the images a second; None where the case has none."""
        return self._rate(self.images)

    @property
    def mfu(self) -> Spread | None:
        """Return the share of the datasheet's peak FLOP/s."""
        return self._rate(self.flops, self.peak)

    @property
    def of_ceiling(self) -> Spread | None:
        """Return the share of the FLOP/s of products measured in the same run."""
        return self._rate(self.flops, self.ceiling)

    @property
    def of_copy(self) -> Spread | None:
        """Return the share of the bytes a second of copies measured in the same run."""
        return self._rate(self.bytes, self.copy)

    @property
    def operation(self) -> str:
        """Return the operation of a kernel's case: "adaln" of "adaln, XL, 80 tokens, forward"."""
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
        """Tell whether these are a GPU's figures."""
        return self.device == "cuda"

    @property
    def hardware(self) -> str:
        """Name the GPU, or the CPU and its threads; two runs on the same can be compared."""
        if self.on_gpu:
            return str(self.machine["gpu"])
        threads = self.machine.get("threads")
        return f"{self.machine['cpu']} (CPU{f', {threads} threads' if threads else ''})"

    @property
    def place(self) -> str:
        """Name the machine, and the memory it was held to."""
        return self.hardware + ("" if self.memory_limit is None else f", limited to {self.memory_limit:g} GB")

    def to_dict(self) -> Json:
        """Return the file without its samples, with what follows from its figures."""
        names = ("date", "device", "hardware", "machine", "peaks", "ceilings", "memory_limit", "commit")
        plain = {name: getattr(self, name) for name in names}
        skipped = [named(key) | {"reason": reason} for key, reason in self.skipped.items()]
        return {"path": str(self.path), **plain, "rows": [row.to_dict() for row in self.rows], "skipped": skipped}

    def of(self, part: str) -> list[Row]:
        """Return the rows of a part."""
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
    """Return the row of our code on our kernels, None where it was not timed."""
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
    """Read a results file; DataError names file, row, fault and remedy when it is none, damaged, or another format."""
    path = Path(path)
    try:
        content = json.loads(read_bytes(path), parse_constant=_refuse)
    except FileNotFoundError:
        raise DataError(f"{path}: no such results file; give JSON from benchmarks/results") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder: give the results files in it") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); {_MEASURE}") from error
    return parse_results(path, content)


def _refuse(constant: str) -> None:
    raise ValueError(f"it holds {constant}")  # as NaN, which Python reads and no benchmark gives


def parse_results(path: Path, content: Any) -> Results:
    """Read the content of a results file; raises as `read_results`."""
    info = content.get("mpdit") if isinstance(content, dict) else None
    if not isinstance(info, dict):
        raise DataError(f'{path}: has no object "mpdit", so it is not of our benchmarks; {_MEASURE}')
    if (found := info.get("format")) != FORMAT:
        raise DataError(f"{path}: mpdit.format is {found!r}, and {FORMAT!r} is read: update mpdit, or {_MEASURE}")
    place = "mpdit"
    try:
        head = _head(path, content, info)
        rows: dict[Key, Row] = {}
        for index, entry in enumerate(content["benchmarks"]):
            place = f"benchmarks[{index}]"
            row = _row(entry["extra_info"], entry["stats"], (head.peaks or {}) | (head.ceilings or {}))
            if row.key in rows:
                raise ValueError(f"{row.variant!r} of {row.case!r} is there twice")
            rows[row.key] = row
    except KeyError as error:
        raise DataError(f"{path}: {place} lacks {error}; {_MEASURE}") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(f"{path}: {place} is damaged ({error}); {_MEASURE}") from None
    return replace(head, rows=tuple(rows.values()))


def _head(path: Path, content: Json, info: Json) -> Results:
    """Return what a file says of all its rows, without those."""
    limit = info["memory_limit_gb"]
    peaks = _numbers(info["peaks"], ("bf16", "fp32", "bandwidth"))
    # As pytest-benchmark found it: all of it may be missing, outside of a checkout.
    commit = content.get("commit_info") or {}
    dirty = " with changes" if commit.get("dirty") else ""
    return Results(
        path,
        date=str(info["date"]),
        time=str(content.get("datetime") or ""),
        device=str(info["device"]),
        machine={**info["machine"]} | {name: str(info["machine"][name]) for name in ("gpu", "cpu", "torch")},
        peaks=peaks and {**peaks, "source": str(info["peaks"]["source"])},
        ceilings=_numbers(info["ceilings"], ("copy", "matmul", "matmul32")),
        memory_limit=None if limit is None else float(limit),
        commit=str(commit["id"])[:12] + dirty if commit.get("id") else "",
        rows=(),
        skipped={_key(entry): str(entry["reason"]) for entry in info["skipped"]},
    )


def _row(info: Json, stats: Json, rates: Json) -> Row:
    samples = tuple(map(float, stats["data"]))
    if not samples or not 0 < min(samples) <= max(samples) < math.inf:
        raise ValueError("stats.data is not a list of times above 0")
    part, case, variant = _key(info)
    dtype, model, gate = str(info["dtype"]), info["model"], info["gate"]
    memory = info["memory"] or {"allocated": None, "reserved": None}
    peak, ceiling = (rates.get(name) for name in RATES.get(dtype, ("", "")))
    return Row(
        part,
        case,
        variant,
        model=None if model is None else str(model),
        images=_count(info["images"]),
        flops=_count(info["flops"]),
        bytes=_count(info["bytes"]),
        dtype=dtype,
        samples=samples,
        seconds=_spread(info["seconds"]),
        ratio=None if info["ratio"] is None else _spread(info["ratio"]),
        allocated=_count(memory["allocated"]),
        reserved=_count(memory["reserved"]),
        gate={**gate} if gate and "same" in gate else _numbers(gate, ("error", "allowed")),
        peak=peak,
        ceiling=ceiling,
        copy=rates.get("copy"),
    )


def _key(entry: Json) -> Key:
    part, case, variant = (str(entry[name]) for name in ("part", "case", "way"))
    return part, case, variant


def _numbers(found: Json | None, names: Sequence[str]) -> dict[str, float] | None:
    return None if found is None else {name: float(found[name]) for name in names}


def _count(found: Any) -> int | None:
    count = None if found is None else int(found)
    if count is not None and not 0 <= count < 1e30:
        raise ValueError(f"a count is {count:.3g}")
    return count


def _spread(found: Json) -> Spread:
    spread = Spread(*(float(found[name]) for name in ("median", "q20", "q80")))
    if not 0 < spread.q20 <= spread.median <= spread.q80 < math.inf:
        raise ValueError(f"median and quantiles are {found}, where numbers above 0 in order are needed")
    return spread
