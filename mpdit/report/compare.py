"""Compares two results files: which rows changed, and is it more than chance?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from mpdit.core.text import markdown
from mpdit.model.presets import PRESETS
from mpdit.report.markdown import seconds
from mpdit.report.results import OURS, Key, Results, Row, kind, named

ALPHA = 0.05
VERDICTS = ("slower", "undecided", "faster", "no difference")
"""The verdicts, in the order in which their rows are shown."""
ENOUGH = 5
"""Samples from which `ratio_interval` covers what it says; a test holds it to that."""
_EXACT = 400
"""Pairs of samples up to which p is counted out, where there are no ties."""
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
        """Return JSON types: the row's key, both times in seconds, and what was found."""
        figures = {name: getattr(self, name) for name in ("ratio", "low", "high", "p", "memory", "verdict", "larger")}
        times = {"a": asdict(self.a.seconds), "b": asdict(self.b.seconds)}
        return {**named(self.a.key), **times, **figures, "gate_a": self.a.gate, "gate_b": self.b.gate}


@dataclass(frozen=True)
class Changes:
    """The changes between two results files.

    Attributes:
        threshold: the least change of a median that matters, 0.02 for 2 %.
        rows: those of both files.
        only_a, only_b: rows of one file; missing: why the other file has no time of some of them.
    """

    a: Results
    b: Results
    threshold: float
    rows: tuple[Change, ...]
    only_a: tuple[Row, ...]
    only_b: tuple[Row, ...]
    missing: dict[Key, str]

    @property
    def comparable(self) -> bool:
        """Tell whether both were measured on the same hardware, so that a change can be the code's."""
        return (self.a.device, self.a.hardware) == (self.b.device, self.b.hardware)

    @property
    def warnings(self) -> list[str]:
        """Return what differs between the runs, a line each."""
        a, b, found = self.a, self.b, []
        if not self.comparable:
            found.append(f"hardware: {a.hardware} and {b.hardware}; no change below is called a regression")
        if a.memory_limit != b.memory_limit:
            limits = ("none" if r.memory_limit is None else f"{r.memory_limit:g} GB" for r in (a, b))
            found.append(f"memory limit: {' and '.join(limits)}")
        versions = {name: [r.machine.get(name) for r in (a, b)] for name in _VERSIONS}
        pairs = {
            name: f"{one or 'unknown'} and {two or 'unknown'}" for name, (one, two) in versions.items() if one != two
        }
        return found + [f"{name}: {pair}" for name, pair in pairs.items()]

    @property
    def regressions(self) -> list[Change]:
        """Return the rows that are slower or need more memory; none on other hardware."""
        return [c for c in self.rows if c.verdict == "slower" or c.larger] if self.comparable else []

    @property
    def lost(self) -> list[Row]:
        """Return ours that B tried and could not time (a red gate, too little memory); none on other hardware."""
        ours = [row for row in self.only_a if row.variant.startswith(OURS) and row.key in self.missing]
        return ours if self.comparable else []

    @property
    def drift(self) -> float | None:
        """Return the median ratio of the variants without our kernels: what machine and versions did to all."""
        others = [c.ratio for c in self.rows if not c.a.variant.startswith(OURS) and kind(c.a.variant) not in PRESETS]
        return float(np.median(others)) if others else None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types, for --json."""
        lone = {
            name: [named(row.key) | {"reason": self.missing.get(row.key)} for row in rows]
            for name, rows in (("only_a", self.only_a), ("only_b", self.only_b))
        }
        return {
            "a": str(self.a.path),
            "b": str(self.b.path),
            "threshold": self.threshold,
            "alpha": ALPHA,
            "comparable": self.comparable,
            "warnings": self.warnings,
            "drift": self.drift,
            "regressions": len(self.regressions),
            "lost": len(self.lost),
            "rows": [change.to_dict() for change in self.rows],
            **lone,
        }

    def __str__(self) -> str:
        counts = {verdict: sum(c.verdict == verdict for c in self.rows) for verdict in VERDICTS}
        elsewhere = "" if self.comparable else " on other hardware, so not the code's doing alone"
        blocks = [
            "\n".join([f"A: {_source(self.a)}", f"B: {_source(self.b)}", *(f"Differs: {w}" for w in self.warnings)]),
            f"B against A, {len(self.rows)} rows in both: {counts['faster']} faster, {counts['slower']} slower, "
            f"{counts['no difference']} without a difference, {counts['undecided']} undecided; "
            f"memory larger in {sum(c.larger for c in self.rows)}{elsewhere}.",
        ]
        if self.rows:
            ordered = sorted(self.rows, key=lambda c: 0 if c.larger else VERDICTS.index(c.verdict))
            head = ("part", "case", "way", "A", "B", "B / A (95 %)", "p", "memory", "gate's error", "verdict")
            blocks.append(markdown(head, [self._cells(change) for change in ordered], left=3).rstrip())
        for name, rows in (("A", self.only_a), ("B", self.only_b)):
            if rows:
                reasons = (f": {self.missing[row.key]}" if row.key in self.missing else "" for row in rows)
                lines = (f"- {', '.join(row.key)}{reason}" for row, reason in zip(rows, reasons, strict=True))
                blocks.append("\n".join([f"Only in {name}:", "", *lines]))
        return "\n\n".join([*blocks, "\n".join(self._notes())])

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

    def _notes(self) -> list[str]:
        notes = [
            f"Faster and slower: Mann-Whitney p < {ALPHA}, adjusted by Holm for {len(self.rows)} rows, and the "
            f"median changed by {100 * self.threshold:g} % or more; larger: peak memory allocated grew by as much.",
            "Samples of one process are correlated, so p is too small: repeat both runs before trusting small changes.",
        ]
        if self.drift is not None:
            notes.append(
                f"Median B / A of contenders without our kernels: {self.drift:.3f}; far from 1, the machine changed."
            )
        fewest = min((len(r.samples) for c in self.rows for r in (c.a, c.b)), default=ENOUGH)
        if fewest < ENOUGH:
            notes.append(f"Intervals of rows with fewer than {ENOUGH} samples, here from {fewest} on, are too narrow.")
        if any(change.verdict == "undecided" for change in self.rows):
            notes.append(
                "Undecided: too few samples for any change to be significant among so many rows; use more rounds."
            )
        return notes


def compare(a: Results, b: Results, threshold: float = 0.02) -> Changes:
    """Match rows by part, case and variant, and judge each; `threshold` is the least change that matters."""
    rows_a, rows_b = ({row.key: row for row in results.rows} for results in (a, b))
    pairs = [(row, rows_b[key]) for key, row in rows_a.items() if key in rows_b]
    adjusted = holm([mann_whitney(one.samples, other.samples) for one, other in pairs])
    return Changes(
        a,
        b,
        threshold,
        tuple(_judge(*pair, p, threshold, len(pairs)) for pair, p in zip(pairs, adjusted, strict=True)),
        tuple(row for key, row in rows_a.items() if key not in rows_b),
        tuple(row for key, row in rows_b.items() if key not in rows_a),
        a.skipped | b.skipped,
    )


def _judge(a: Row, b: Row, p: float, threshold: float, family: int) -> Change:
    ratio = float(np.median(b.samples) / np.median(a.samples))
    verdict = "no difference"
    if abs(ratio - 1) >= threshold:
        # The least p there is: all samples of the one below all of the other.
        least = 2 / math.comb(len(a.samples) + len(b.samples), len(a.samples))
        if p < ALPHA:
            verdict = "slower" if ratio > 1 else "faster"
        elif family * least >= ALPHA:
            verdict = "undecided"
    memory = b.allocated / a.allocated if a.allocated and b.allocated is not None else None
    larger = memory is not None and memory - 1 >= threshold and not math.isclose(memory, 1)
    return Change(a, b, ratio, *ratio_interval(a.samples, b.samples), p, memory, verdict, larger)


def mann_whitney(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the two-sided p that both are drawn from one distribution: exact without ties and with few samples."""
    exact = len(a) * len(b) <= _EXACT and len({*a, *b}) == len(a) + len(b)
    return float(stats.mannwhitneyu(a, b, method="exact" if exact else "asymptotic").pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Return p adjusted for their number (Holm 1979): one below ALPHA is significant in the family of all."""
    # The smallest of n is multiplied by n, the next by n - 1 and so on; none may fall below the one before it.
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    scaled = np.asarray(p, dtype=float)[order] * np.arange(len(p), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return list(map(float, adjusted))


def ratio_interval(a: Sequence[float], b: Sequence[float], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of median(b) / median(a).

    Of four samples it covers 0.93, of three 0.9. A single one has no spread.
    """
    if min(len(a), len(b)) < 2:
        return (float(np.median(b) / np.median(a)),) * 2
    found = stats.bootstrap(
        (a, b),
        lambda a, b, axis: np.median(b, axis=axis) / np.median(a, axis=axis),
        n_resamples=draws,
        method="percentile",
        rng=seed,
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _source(results: Results) -> str:
    commit = f", commit {results.commit}" if results.commit else ""
    return f"{results.path} ({results.place}, {results.date}, torch {results.machine['torch']}{commit})"
