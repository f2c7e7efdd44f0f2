"""One run of the suite: its cases, what became of them, and what goes into the results file."""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import pytest_benchmark
import setting as settings
from harness import NO_TIME, OURS, Case, Duel, Outcome, clocks, release
from results import Journal, peaks, skip
from tools import timing

from mpdit.report.results import FORMAT, PARTS

ROUNDS, SECONDS, LEAST = {"cuda": 30, "cpu": 5}, {"cuda": 20.0, "cpu": 6.0}, {"cuda": 5, "cpu": 3}

FITS = " fits"
"""Behind the name of a larger case, why a smaller one is left out."""

Row = dict[str, Any]


def _fitted(outcome: Outcome) -> bool:
    """Whether there was room for it, in this case or in a larger one."""
    return bool(outcome.samples) or (outcome.skipped or "").endswith(FITS)


class Run:
    """Cases by name, and the ways of each that this session's tests ask for, `selected`.

    Raises pytest.UsageError for options that can't be.
    """

    def __init__(self, config: pytest.Config) -> None:
        option = config.getoption
        self.setting = settings.from_options(option)
        self.rounds = option("--rounds") or ROUNDS[self.setting.device]
        self.seconds = option("--seconds") or SECONDS[self.setting.device]
        self.minutes: float | None = option("--minutes")
        self.journal = Journal(Path(option("--journal"))) if option("--journal") else None
        self.cases: dict[str, Case] = {}
        self.selected: dict[str, list[str]] = {}
        self.rows: list[Row] = []
        self.skipped: list[dict[str, Any]] = []
        self._config = config
        self._outcomes: dict[str, dict[str, Outcome]] = {}
        self._clocks: dict[bool, timing.Clock] | None = None
        self._ceilings: dict[str, float] | None = None
        self._start = time.monotonic()

    def outcome(self, case: Case, way: str, quick: bool) -> Outcome:
        """Of one contender; the case's duel is run when the first of them is asked for."""
        if case.name not in self._outcomes:
            self._outcomes[case.name] = self._duel(case, quick)
        return self._outcomes[case.name][way]

    def _duel(self, case: Case, quick: bool) -> dict[str, Outcome]:
        ways = self.selected[case.name]
        until = math.inf if self.minutes is None else self._start + 60 * self.minutes
        if time.monotonic() > until:
            return {way: Outcome(skipped=NO_TIME) for way in ways}
        if self._clocks is None:
            self._begin()
        spared: dict[str, Outcome] = {}
        larger = self._outcomes.get(case.smaller_than or "")
        if self.setting.largest and larger is not None:
            fitted = {way for way in ways if way in larger and _fitted(larger[way])}
            spared = {way: Outcome(skipped=f"{case.smaller_than}{FITS}") for way in fitted}
            if fitted >= set(ways):
                return spared
            spared.pop(OURS, None)
        assert self._clocks is not None
        clock, least = self._clocks[case.on_gpu], LEAST[self.setting.device]
        duel = Duel(case, clock, self.rounds, self.seconds, min(least, self.rounds), quick, until)
        return duel.run([way for way in ways if way not in spared]) | spared

    def _begin(self) -> None:
        """Set the limit and measure the ceilings, now that something is to be timed."""
        if self.setting.memory_limit is not None:
            settings.limit_memory(self.setting.memory_limit)
        self._clocks = clocks(self.setting.device)
        self._ceilings = timing.ceilings(self._clocks[True], self.setting.device)
        release()
        if self.journal is not None:
            self.journal.start(self._head())

    def add(self, benchmark: Row) -> None:
        """A test's row, as pytest-benchmark writes it."""
        self.rows.append(benchmark)
        if self.journal is not None:
            self.journal.row(benchmark)

    def leave_out(self, case: Case, way: str, reason: str) -> None:
        entry = skip(case, way, reason)
        self.skipped.append(entry)
        if self.journal is not None and self._clocks is not None:
            self.journal.skip(entry)

    def _head(self) -> Row:
        """A results file without rows, for the journal."""
        hook = self._config.hook
        machine_info = hook.pytest_benchmark_generate_machine_info(config=self._config)
        hook.pytest_benchmark_update_machine_info(config=self._config, machine_info=machine_info)
        commit_info = hook.pytest_benchmark_generate_commit_info(config=self._config)
        hook.pytest_benchmark_update_commit_info(config=self._config, commit_info=commit_info)
        now = datetime.now(UTC).isoformat()
        head = {"machine_info": machine_info, "commit_info": commit_info, "datetime": now}
        return head | {"version": pytest_benchmark.__version__, "mpdit": self.describe() | {"skipped": []}}

    def describe(self) -> Row:
        """The object "mpdit" of the results file."""
        device = self.setting.device
        machine = settings.machine(device)
        parts = {case.part for name, case in self.cases.items() if name in self._outcomes}
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
