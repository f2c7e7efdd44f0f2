"""Runs the suite and writes its results file.

The file is pytest-benchmark's JSON with an object "mpdit" and rows whose extra_info can be compared.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import pytest_benchmark
import setting as settings
import torch
from harness import NO_TIME, OURS, Case, Comparison, Measurement, release
from mpdit_kernels.hardware import find_gpu
from tools import timing

from mpdit.core.files import write_atomically
from mpdit.report.results import FORMAT, PARTS

ROUNDS, SECONDS, LEAST = {"cuda": 30, "cpu": 5}, {"cuda": 20.0, "cpu": 6.0}, {"cuda": 5, "cpu": 3}
FITS = " fits"
"""Behind the name of a larger case, why a smaller one is left out."""
SAME = ("gpu", "cpu", "threads", "torch", "triton", "python", "driver", "power limit", "highest sm clock")
"""Facts of a machine: figures are merged only where these agree."""

Json = dict[str, Any]


class Session:
    """Cases by name, and the variants of each that this session's tests ask for, `selected`.

    Raises pytest.UsageError for options that can't be.
    """

    def __init__(self, config: pytest.Config) -> None:
        option = config.getoption
        self.setting = settings.from_options(option)
        self.cases: dict[str, Case] = {}
        self.selected: dict[str, list[str]] = {}
        self.rows: list[Json] = []
        self.skipped: list[Json] = []
        self._config = config
        self._rounds = option("--rounds") or ROUNDS[self.setting.device]
        self._seconds = option("--seconds") or SECONDS[self.setting.device]
        minutes: float | None = option("--minutes")
        self._until = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._folder = Path(option("--results")) if option("--results") else None
        self.saved: Path | None = None
        self._outcomes: dict[str, dict[str, Measurement]] = {}
        self._clocks: dict[bool, timing.Clock] = {}  # by Case.on_gpu
        self._ceilings: dict[str, float] | None = None

    def outcome(self, case: Case, variant: str, quick: bool) -> Measurement:
        """Return that of one variant; the case is run when the first of them is asked for."""
        if case.name not in self._outcomes:
            self._outcomes[case.name] = self._compare(case, self.selected[case.name], quick)
        return self._outcomes[case.name][variant]

    def _compare(self, case: Case, variants: list[str], quick: bool) -> dict[str, Measurement]:
        if time.monotonic() > self._until:
            return {variant: Measurement(skipped=NO_TIME) for variant in variants}
        if not self._clocks:
            self._begin()
        spared: dict[str, Measurement] = {}
        if self.setting.largest:
            # Those for which there was room in a larger case.
            larger = self._outcomes.get(case.smaller_than or "", {})
            fitted = {name for name, found in larger.items() if found.samples or (found.skipped or "").endswith(FITS)}
            spared = {name: Measurement(skipped=f"{case.smaller_than}{FITS}") for name in variants if name in fitted}
            if len(spared) == len(variants):
                return spared
            spared.pop(OURS, None)
        clock, least = self._clocks[case.on_gpu], min(LEAST[self.setting.device], self._rounds)
        comparison = Comparison(case, clock, self._rounds, self._seconds, least, quick, self._until)
        return comparison.run([name for name in variants if name not in spared]) | spared

    def _begin(self) -> None:
        """Set the limit and measure the ceilings, now that something is to be timed."""
        device, limit = self.setting.device, self.setting.memory_limit
        if limit is not None:
            total = torch.cuda.get_device_properties().total_memory
            if limit * 1e9 > total:
                raise pytest.UsageError(
                    f"--memory-limit is {limit:g} GB, and this GPU has {total / 1e9:.1f}: give less"
                )
            torch.cuda.set_per_process_memory_fraction(limit * 1e9 / total)
        on_gpu = timing.GpuClock() if device == "cuda" else timing.WallClock()
        self._clocks = {False: timing.WallClock(device), True: on_gpu}
        self._ceilings = timing.ceilings(on_gpu, device)
        release()

    def add(self, benchmark: Json) -> None:
        """Keep a test's row, as pytest-benchmark writes it."""
        self.rows.append(benchmark)
        self._save()

    def leave_out(self, case: Case, variant: str, reason: str) -> None:
        self.skipped.append({"part": case.part, "case": case.name, "way": variant, "reason": reason})
        self._save()

    def _save(self) -> None:
        """Merge what there is into the dated file, after every figure, so that a run that is killed leaves its own."""
        if self._folder is not None and self._clocks:
            head = self._head | {"datetime": datetime.now(UTC).isoformat(), "version": pytest_benchmark.__version__}
            self.saved = save(self._folder, head | {"benchmarks": self.rows, "mpdit": self.describe()})

    @cached_property
    def _head(self) -> Json:
        """Return what pytest-benchmark says of machine and commit."""
        hook = self._config.hook
        machine_info = hook.pytest_benchmark_generate_machine_info(config=self._config)
        hook.pytest_benchmark_update_machine_info(config=self._config, machine_info=machine_info)
        commit_info = hook.pytest_benchmark_generate_commit_info(config=self._config)
        return {"machine_info": machine_info, "commit_info": commit_info}

    def describe(self) -> Json:
        """Return the object "mpdit" of the results file."""
        device = self.setting.device
        machine = timing.machine(device) | {"python": platform.python_version()}
        gpu = find_gpu(machine["gpu"])  # None where we have no datasheet
        parts = {self.cases[name].part for name in self._outcomes}
        return {
            "format": FORMAT,
            "date": datetime.now(UTC).date().isoformat(),
            "device": device,
            "machine": machine,
            "peaks": gpu and {"bf16": gpu.flops, "fp32": gpu.flops32, "bandwidth": gpu.bandwidth, "source": gpu.source},
            "ceilings": self._ceilings,
            "memory_limit_gb": self.setting.memory_limit,
            "parts": [part for part in PARTS if part in parts],
            "skipped": self.skipped,
        }


def extra_info(case: Case, variant: str, outcome: Measurement) -> Json:
    """Return what a row says beyond pytest-benchmark's statistics."""
    group = case.group(variant)
    return {
        "part": case.part,
        "case": case.name,
        "way": variant,
        "model": group.model,
        "images": case.images,
        "flops": group.flops,
        "bytes": group.bytes,
        "dtype": group.dtype,
        "seconds": _spread(outcome.samples),
        "ratio": None if outcome.ratios is None else {"to": OURS, **_spread(outcome.ratios)},
        "memory": outcome.memory,
        "gate": outcome.gate,
    }


def _spread(values: Sequence[float]) -> Json:
    times = timing.Times.of(values)
    return {"median": times.median, "q20": times.low, "q80": times.high}


def save(folder: Path, new: Json) -> Path:
    """Merge a run into its day's and machine's file, or into a new one where machine or versions differ."""
    info = new["mpdit"]
    gpu = info["machine"]["gpu"]
    known = find_gpu(gpu)
    name = "cpu" if info["device"] == "cpu" else known.key if known else "-".join(gpu.lower().split())
    if info["memory_limit_gb"] is not None:
        name += f"-limit{info['memory_limit_gb']:g}"
    folder.mkdir(parents=True, exist_ok=True)
    for count in range(1, 100):
        path = folder / f"{info['date']}-{name}{'' if count == 1 else f'-{count}'}.json"
        old = json.loads(path.read_text()) if path.exists() else None
        if old is None or all(old["mpdit"]["machine"].get(field) == info["machine"].get(field) for field in SAME):
            write_atomically(path, json.dumps(merge(old, new) if old else new, indent=1) + "\n")
            return path
    raise RuntimeError(f"{folder} holds 99 files of {info['date']}-{name}: remove some")


def merge(old: Json, new: Json) -> Json:
    """Return `new`, and those rows and skips of `old` whose variant was not tried again.

    Rows are in the order of PARTS, each part's by case as first seen, so that a row that was measured again stays with
    its case. The head is the new run's, and each ceiling the highest that was measured.
    """

    def key(entry: Json) -> tuple[str, str, str]:
        return entry["part"], entry["case"], entry["way"]

    tried = {key(entry) for entry in (*(row["extra_info"] for row in new["benchmarks"]), *new["mpdit"]["skipped"])}
    rows = [row for row in old["benchmarks"] if key(row["extra_info"]) not in tried] + new["benchmarks"]
    order = {case: place for place, case in enumerate(dict.fromkeys(row["extra_info"]["case"] for row in rows))}
    rows.sort(key=lambda row: (PARTS.index(row["extra_info"]["part"]), order[row["extra_info"]["case"]]))
    measured = {row["extra_info"]["part"] for row in rows}
    before, now = old["mpdit"], new["mpdit"]
    merged = {
        "skipped": [entry for entry in before["skipped"] if key(entry) not in tried] + now["skipped"],
        "ceilings": {name: max(before["ceilings"][name], value) for name, value in now["ceilings"].items()},
        "parts": [part for part in PARTS if part in measured],
    }
    return new | {"benchmarks": rows, "mpdit": now | merged}
