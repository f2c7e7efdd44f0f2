"""Two results files against each other: which rows changed, and is it more than chance?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpdit.model.presets import PRESETS
from mpdit.report.choose import kind
from mpdit.report.results import OURS, Results, Row, Skipped
from mpdit.report.significance import holm, least_p, mann_whitney, ratio_interval
from mpdit.report.tables import place
from mpdit.report.words import line, percent, seconds, table

ALPHA = 0.05
VERDICTS = ("slower", "undecided", "faster", "no difference")
"""In the order in which rows are shown."""
_ENOUGH = 5
"""Samples from which `ratio_interval` covers what it says; a test holds it to that."""
_VERSIONS = ("torch", "triton", "python", "driver", "power limit", "highest sm clock")


@dataclass(frozen=True)
class Change:
    """One row in both files.

    Attributes:
        ratio: median time in B over that in A: above 1, B is slower; low, high: its 95 % bootstrap interval.
        p: Mann-Whitney, two-sided, adjusted by Holm for the number of rows.
        memory: peak memory allocated in B over that in A; None where it was not measured in both.
        verdict: "faster", "slower", "no difference", or "undecided": the change would matter, but with so few samples
            none of any size could be significant among so many rows.
        larger: memory grew by the threshold or more.
    """

    a: Row
    b: Row
    ratio: float
    low: float
    high: float
    p: float
    memory: float | None
    verdict: str
    larger: bool

    def to_dict(self) -> dict[str, Any]:
        figures = {name: getattr(self, name) for name in ("ratio", "low", "high", "p", "memory", "verdict", "larger")}
        keys = dict(zip(("part", "case", "way"), self.a.key, strict=True))
        return {**keys, "a": self.a.seconds.to_dict(), "b": self.b.seconds.to_dict(), **figures,
                "gate_a": self.a.gate, "gate_b": self.b.gate}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Two results files.

    Attributes:
        threshold: the least change of a median that matters, 0.02 for 2 %.
        comparable: both were measured on the same hardware, so that a change can be the code's.
        warnings: what differs between the runs, a line each.
        only_a, only_b: rows of one file; missing: why the other file has no time of some of them.
    """

    a: Results
    b: Results
    threshold: float
    comparable: bool
    warnings: tuple[str, ...]
    changes: tuple[Change, ...]
    only_a: tuple[Row, ...]
    only_b: tuple[Row, ...]
    missing: dict[tuple[str, str, str], str]

    @property
    def regressions(self) -> list[Change]:
        """Rows that are slower or need more memory; none on other hardware."""
        return [c for c in self.changes if c.verdict == "slower" or c.larger] if self.comparable else []

    @property
    def lost(self) -> list[Row]:
        """Rows of ours that B tried and could not time, for a red gate or too little memory; none on other hardware."""
        ours = [row for row in self.only_a if row.way.startswith(OURS) and row.key in self.missing]
        return ours if self.comparable else []

    @property
    def drift(self) -> float | None:
        """Median ratio of the contenders without our kernels: what machine and versions did to all."""
        others = [c.ratio for c in self.changes if not c.a.way.startswith(OURS) and kind(c.a.way) not in PRESETS]
        return float(np.median(others)) if others else None

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "a": str(self.a.path),
            "b": str(self.b.path),
            "threshold": self.threshold,
            "alpha": ALPHA,
            "comparable": self.comparable,
            "warnings": list(self.warnings),
            "drift": self.drift,
            "regressions": len(self.regressions),
            "lost": len(self.lost),
            "rows": [change.to_dict() for change in self.changes],
            "only_a": [self._lone(row) for row in self.only_a],
            "only_b": [self._lone(row) for row in self.only_b],
        }

    def _lone(self, row: Row) -> dict[str, Any]:
        return dict(zip(("part", "case", "way"), row.key, strict=True)) | {"reason": self.missing.get(row.key)}

    def __str__(self) -> str:
        counts = {v: sum(c.verdict == v for c in self.changes) for v in VERDICTS}
        elsewhere = "" if self.comparable else " on other hardware, so not the code's doing alone"
        blocks = [
            line(f"A: {_source(self.a)}")
            + line(f"B: {_source(self.b)}")
            + "".join(line(f"Differs: {warning}") for warning in self.warnings),
            f"B against A, {len(self.changes)} rows in both: {counts['faster']} faster, {counts['slower']} slower, "
            f"{counts['no difference']} without a difference, {counts['undecided']} undecided; "
            f"memory larger in {sum(c.larger for c in self.changes)}{elsewhere}.\n",
            self._table(),
            *(self._lonely(name, rows) for name, rows in (("A", self.only_a), ("B", self.only_b)) if rows),
            self._notes(),
        ]
        return "\n".join(block for block in blocks if block).rstrip("\n")

    def _table(self) -> str:
        ordered = sorted(self.changes, key=lambda c: 0 if c.larger else VERDICTS.index(c.verdict))
        head = ("part", "case", "way", "A", "B", "B / A (95 %)", "p", "memory", "gate's error", "verdict")
        return table(head, [self._cells(change) for change in ordered], left=3) if ordered else ""

    def _cells(self, change: Change) -> list[str]:
        errors = [(row.gate or {}).get("error") for row in (change.a, change.b)]
        verdict = change.verdict + (", larger" if change.larger else "")
        return [
            *change.a.key,
            seconds(change.a.seconds.median),
            seconds(change.b.seconds.median),
            f"{change.ratio:.3f} ({change.low:.3f} - {change.high:.3f})",
            f"{change.p:.2g}" if change.p >= 1e-4 else "< 1e-4",
            "" if change.memory is None else f"{100 * (change.memory - 1):+.1f} %",
            " to ".join(f"{error:.2g}" for error in errors if error is not None),
            verdict if self.comparable or verdict == "no difference" else f"{verdict} (other hardware)",
        ]

    def _lonely(self, name: str, rows: tuple[Row, ...]) -> str:
        reasons = [f": {self.missing[row.key]}" if row.key in self.missing else "" for row in rows]
        lines = (line(f"- {', '.join(row.key)}{reason}") for row, reason in zip(rows, reasons, strict=True))
        return line(f"Only in {name}:") + line("") + "".join(lines)

    def _notes(self) -> str:
        notes = [
            f"Faster and slower: Mann-Whitney p < {ALPHA}, adjusted by Holm for {len(self.changes)} rows, and the "
            f"median changed by {percent(self.threshold)} or more; larger: peak memory allocated grew by as much.",
            "Samples of one process are correlated, so p is too small: repeat both runs before trusting small changes.",
        ]
        if self.drift is not None:
            notes.append(
                f"Median B / A of contenders without our kernels: {self.drift:.3f}; far from 1, the machine changed."
            )
        fewest = min((len(r.samples) for c in self.changes for r in (c.a, c.b)), default=_ENOUGH)
        if fewest < _ENOUGH:
            notes.append(f"Intervals of rows with fewer than {_ENOUGH} samples, here from {fewest} on, are too narrow.")
        if any(change.verdict == "undecided" for change in self.changes):
            notes.append(
                "Undecided: too few samples for any change to be significant among so many rows; use more rounds."
            )
        return "".join(map(line, notes))


def compare(a: Results, b: Results, threshold: float = 0.02) -> Comparison:
    """Match rows by part, case and way, and judge each."""
    rows_a, rows_b = ({row.key: row for row in results.rows} for results in (a, b))
    pairs = [(row, rows_b[key]) for key, row in rows_a.items() if key in rows_b]
    adjusted = holm([mann_whitney(one.samples, other.samples) for one, other in pairs])
    comparable = (a.device, a.hardware) == (b.device, b.hardware)
    return Comparison(
        a,
        b,
        threshold,
        comparable,
        tuple(_differences(a, b)),
        tuple(_judge(*pair, p, threshold, len(pairs)) for pair, p in zip(pairs, adjusted, strict=True)),
        tuple(row for key, row in rows_a.items() if key not in rows_b),
        tuple(row for key, row in rows_b.items() if key not in rows_a),
        _reasons((*a.skipped, *b.skipped)),
    )


def _judge(a: Row, b: Row, p: float, threshold: float, family: int) -> Change:
    ratio = float(np.median(b.samples) / np.median(a.samples))
    low, high = ratio_interval(a.samples, b.samples)
    verdict = "no difference"
    if abs(ratio - 1) >= threshold and p < ALPHA:
        verdict = "slower" if ratio > 1 else "faster"
    elif abs(ratio - 1) >= threshold and family * least_p(len(a.samples), len(b.samples)) >= ALPHA:
        verdict = "undecided"
    memory = b.allocated / a.allocated if a.allocated and b.allocated is not None else None
    larger = memory is not None and memory - 1 >= threshold and not math.isclose(memory, 1)
    return Change(a, b, ratio, low, high, p, memory, verdict, larger)


def _source(results: Results) -> str:
    commit = f", commit {results.commit}" if results.commit else ""
    return f"{results.path} ({place(results)}, {results.date}, torch {results.machine['torch']}{commit})"


def _reasons(skipped: tuple[Skipped, ...]) -> dict[tuple[str, str, str], str]:
    return {entry.key: entry.reason for entry in skipped}


def _differences(a: Results, b: Results) -> list[str]:
    found = []
    if (a.device, a.hardware) != (b.device, b.hardware):
        found.append(f"hardware: {a.hardware} and {b.hardware}; no change below is called a regression")
    if a.memory_limit != b.memory_limit:
        limits = ("none" if r.memory_limit is None else f"{r.memory_limit:g} GB" for r in (a, b))
        found.append(f"memory limit: {' and '.join(limits)}")
    for name in _VERSIONS:
        one, other = (r.machine.get(name) for r in (a, b))
        if one != other:
            found.append(f"{name}: {one or 'unknown'} and {other or 'unknown'}")
    return found
