"""Runs the suite: its cases, what became of them, and what goes into the results file."""

from __future__ import annotations

import math
import platform
import time
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import pytest
import pytest_benchmark
import setting as settings
import torch
from harness import NO_TIME, OURS, Case, Comparison, Outcome, release
from results import Json, peaks, save
from tools import timing

from mpdit.report.results import FORMAT, PARTS

ROUNDS, SECONDS, LEAST = {"cuda": 30, "cpu": 5}, {"cuda": 20.0, "cpu": 6.0}, {"cuda": 5, "cpu": 3}
FITS = " fits"
"""Behind the name of a larger case, why a smaller one is left out."""


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
        self._outcomes: dict[str, dict[str, Outcome]] = {}
        self._clocks: dict[bool, timing.Clock] = {}  # by Case.on_gpu
        self._ceilings: dict[str, float] | None = None

    def outcome(self, case: Case, variant: str, quick: bool) -> Outcome:
        """Return that of one variant; the case is run when the first of them is asked for."""
        if case.name not in self._outcomes:
            self._outcomes[case.name] = self._compare(case, self.selected[case.name], quick)
        return self._outcomes[case.name][variant]

    def _compare(self, case: Case, variants: list[str], quick: bool) -> dict[str, Outcome]:
        if time.monotonic() > self._until:
            return {variant: Outcome(skipped=NO_TIME) for variant in variants}
        if not self._clocks:
            self._begin()
        spared: dict[str, Outcome] = {}
        if self.setting.largest:
            # Those for which there was room in a larger case.
            larger = self._outcomes.get(case.smaller_than or "", {})
            fitted = {name for name, found in larger.items() if found.samples or (found.skipped or "").endswith(FITS)}
            spared = {name: Outcome(skipped=f"{case.smaller_than}{FITS}") for name in variants if name in fitted}
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
        entry = {"part": case.part, "case": case.name, "way": variant, "reason": reason}
        self.skipped.append(entry)
        self._save()

    def _save(self) -> None:
        """Merge what there is into the dated file, after every figure, so that a run that is killed leaves its own."""
        if self._folder is not None and self._clocks:
            head = self._head | {"datetime": datetime.now(UTC).isoformat(), "version": pytest_benchmark.__version__}
            self.saved = save(self._folder, head | {"benchmarks": self.rows, "mpdit": self.describe()})

    @cached_property
    def _head(self) -> Json:
        """What pytest-benchmark says of machine and commit."""
        hook = self._config.hook
        machine_info = hook.pytest_benchmark_generate_machine_info(config=self._config)
        hook.pytest_benchmark_update_machine_info(config=self._config, machine_info=machine_info)
        commit_info = hook.pytest_benchmark_generate_commit_info(config=self._config)
        hook.pytest_benchmark_update_commit_info(config=self._config, commit_info=commit_info)
        return {"machine_info": machine_info, "commit_info": commit_info}

    def describe(self) -> Json:
        """Return the object "mpdit" of the results file."""
        device = self.setting.device
        machine = timing.machine(device) | {"python": platform.python_version()}
        parts = {self.cases[name].part for name in self._outcomes}
        return {
            "format": FORMAT,
            "date": datetime.now(UTC).date().isoformat(),
            "device": device,
            "machine": machine,
            "peaks": peaks(machine["gpu"]),
            "ceilings": self._ceilings,
            "memory_limit_gb": self.setting.memory_limit,
            "parts": [part for part in PARTS if part in parts],
            "skipped": self.skipped,
        }
