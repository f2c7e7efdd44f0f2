"""Results files: what benchmarks/ leaves, read and checked field by field."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpdit.core.errors import DataError
from mpdit.report.fields import MEASURE, Fields, Spread

FORMAT = "mpdit-bench-1"
PARTS = ("kernels", "block", "forward", "step", "sampling", "optimizer", "loader")
OURS = "ours"
"""The contender that every other of its case is held against."""

_FAMILY = FORMAT.rpartition("-")[0]
RATES = {"bf16": ("bf16", "matmul"), "fp16": ("bf16", "matmul"), "fp32": ("fp32", "matmul32")}
"""By a row's dtype, the datasheet peak and the measured ceiling of its products; TF32 has neither."""


@dataclass(frozen=True)
class Row:
    """One contender (`way`) at one problem (`case`).

    Attributes:
        model: preset it runs, if any.
        images: images or samples of a call.
        flops: exact FLOP of a call on the reference graph; bytes: the least it must move.
        dtype: what products take.
        samples: seconds of a call, as measured; seconds: their summary.
        ratio: time over that of "ours", turn by turn: above 1, ours is faster. None for ours.
        allocated, reserved: peak bytes of a call of this contender alone.
        gate: the check it passed before it was timed: {"error", "allowed"} or {"same"}.
        peak, ceiling: FLOP a second, of the datasheet and of products measured in the same run, for this dtype.
        copy: bytes a second of copies measured in the same run.
    """

    part: str
    case: str
    way: str
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
    gate: dict[str, Any] | None
    peak: float | None
    ceiling: float | None
    copy: float | None

    @property
    def key(self) -> tuple[str, str, str]:
        return self.part, self.case, self.way

    @property
    def images_per_second(self) -> Spread | None:
        return self.seconds.per(self.images) if self.images else None

    @property
    def flops_per_second(self) -> Spread | None:
        return self.seconds.per(self.flops) if self.flops else None

    @property
    def bytes_per_second(self) -> Spread | None:
        return self.seconds.per(self.bytes) if self.bytes else None

    @property
    def mfu(self) -> Spread | None:
        """Share of the datasheet's peak."""
        return self.seconds.per(self.flops / self.peak) if self.flops and self.peak else None

    @property
    def of_ceiling(self) -> Spread | None:
        """Share of the rate of products measured in the same run."""
        return self.seconds.per(self.flops / self.ceiling) if self.flops and self.ceiling else None

    @property
    def of_copy(self) -> Spread | None:
        """Share of the rate of copies measured in the same run."""
        return self.seconds.per(self.bytes / self.copy) if self.bytes and self.copy else None

    def to_dict(self) -> dict[str, Any]:
        """The figures and what follows from them, without the samples."""
        names = ("seconds", "ratio", "images_per_second", "flops_per_second", "bytes_per_second", "mfu", "of_ceiling")
        spreads = {name: getattr(self, name) for name in (*names, "of_copy")}
        plain = ("part", "case", "way", "model", "images", "flops", "bytes", "dtype", "allocated", "reserved", "gate")
        return {
            **{name: getattr(self, name) for name in plain},
            "samples": len(self.samples),
            **{name: spread and spread.to_dict() for name, spread in spreads.items()},
        }


@dataclass(frozen=True)
class Skipped:
    """A contender without a time, and why."""

    part: str
    case: str
    way: str
    reason: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.part, self.case, self.way


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
    """

    path: Path
    date: str
    time: str
    device: str
    machine: dict[str, Any]
    peaks: dict[str, Any] | None
    ceilings: dict[str, float] | None
    memory_limit: float | None
    commit: str
    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...]

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def hardware(self) -> str:
        """The GPU, or the CPU and its threads; two runs with the same can be held against each other."""
        if self.on_gpu:
            return str(self.machine["gpu"])
        threads = self.machine.get("threads")
        return f"{self.machine['cpu']} (CPU{f', {threads} threads' if threads else ''})"

    def to_dict(self) -> dict[str, Any]:
        """The file without its samples, with what follows from its figures."""
        names = ("date", "device", "hardware", "machine", "peaks", "ceilings", "memory_limit", "commit")
        plain = {name: getattr(self, name) for name in names}
        skipped = [dataclasses.asdict(entry) for entry in self.skipped]
        return {"path": str(self.path), **plain, "rows": [row.to_dict() for row in self.rows], "skipped": skipped}

    def of(self, part: str) -> list[Row]:
        return [row for row in self.rows if row.part == part]

    def cases(self, part: str) -> dict[str, list[Row]]:
        """The part's rows by case, in the order of the file."""
        rows = self.of(part)
        return {case: [row for row in rows if row.case == case] for case in dict.fromkeys(row.case for row in rows)}


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
        raise DataError(f"{path}: not JSON ({error}); {MEASURE}") from error
    top = Fields(path, "", content)
    if "mpdit" not in top.values:
        raise DataError(f'{path}: has no object "mpdit", so it is not of our benchmarks; {MEASURE}')
    info = top.object("mpdit")
    _check_format(path, info.text("format"))
    device = info.one_of("device", ("cuda", "cpu"))
    machine = info.object("machine")
    for name in ("gpu" if device == "cuda" else "cpu", "torch"):
        machine.text(name)
    peaks, ceilings = info.optional("peaks"), info.optional("ceilings")
    rates = {
        **({name: peaks.positive(name) for name in ("bf16", "fp32", "bandwidth")} if peaks else {}),
        **({name: ceilings.positive(name) for name in ("copy", "matmul", "matmul32")} if ceilings else {}),
    }
    if peaks:
        peaks.text("source")
    rows = tuple(_row(entry, rates) for entry in top.list("benchmarks"))
    _check_unique(path, rows)
    return Results(
        path,
        date=info.text("date"),
        time=str(top.values.get("datetime") or ""),
        device=device,
        machine=machine.values,
        peaks=peaks.values if peaks else None,
        ceilings=ceilings.values if ceilings else None,
        memory_limit=info.positive_or_none("memory_limit_gb"),
        commit=_commit(top.values.get("commit_info")),
        rows=rows,
        skipped=tuple(
            Skipped(entry.one_of("part", PARTS), *(entry.text(name) for name in ("case", "way", "reason")))
            for entry in info.list("skipped")
        ),
    )


def _check_format(path: Path, found: str) -> None:
    if found == FORMAT:
        return
    family, _, number = found.rpartition("-")
    if family == _FAMILY and number.isdigit() and int(number) > int(FORMAT.rpartition("-")[2]):
        raise DataError(f"{path}: mpdit.format is {found!r}, newer than {FORMAT!r}: update mpdit")
    raise DataError(f"{path}: mpdit.format is {found!r}, and {FORMAT!r} is read; {MEASURE}")


def _commit(info: Any) -> str:
    """As pytest-benchmark found it: all of it may be missing, outside of a checkout."""
    if not isinstance(info, dict) or not info.get("id"):
        return ""
    return str(info["id"])[:12] + (" with changes" if info.get("dirty") else "")


def _check_unique(path: Path, rows: Sequence[Row]) -> None:
    seen: set[tuple[str, str, str]] = set()
    for row in rows:
        if row.key in seen:
            raise DataError(f"{path}: benchmarks holds {row.way!r} of {row.case!r} twice; remove one of them")
        seen.add(row.key)


def _row(entry: Fields, rates: dict[str, float]) -> Row:
    info = entry.object("extra_info")
    dtype = info.text("dtype")
    memory, gate, ratio = info.optional("memory"), info.optional("gate"), info.optional("ratio")
    if gate and "same" not in gate.values:
        for name in ("error", "allowed"):
            gate.at_least_0(name)
    if ratio:
        ratio.one_of("to", (OURS,))
    peak, ceiling = (rates.get(name) for name in RATES.get(dtype, ("", "")))
    return Row(
        part=info.one_of("part", PARTS),
        case=info.text("case"),
        way=info.text("way"),
        model=info.text_or_none("model"),
        images=info.whole_or_none("images"),
        flops=info.whole_or_none("flops"),
        bytes=info.whole_or_none("bytes"),
        dtype=dtype,
        samples=entry.object("stats").samples("data"),
        seconds=info.object("seconds").spread(),
        ratio=ratio.spread() if ratio else None,
        allocated=memory.whole("allocated") if memory else None,
        reserved=memory.whole("reserved") if memory else None,
        gate=gate.values if gate else None,
        peak=peak,
        ceiling=ceiling,
        copy=rates.get("copy"),
    )
