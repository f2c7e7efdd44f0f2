"""Results as tables: a case's contenders under one another, and kernels a line each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from mpdit.report.choose import fastest, kind, operation, opponents, ours, representatives
from mpdit.report.fields import Spread
from mpdit.report.results import OURS, Results, Row, Skipped
from mpdit.report.words import gigabytes, number, ratios, shares, spread, table, times

CASE = (
    "contender", "time of a call", "per second", "times ours", "MFU", "of matmul ceiling", "of copy ceiling",
    "allocated", "reserved", "gate",
)  # fmt: skip


def contender(row: Row, rows: Sequence[Row]) -> str:
    """Its name, with its precision where that is not ours'."""
    own = ours(rows)
    return row.way if own is None or own.dtype == row.dtype else f"{row.way} ({row.dtype})"


def case_table(rows: Sequence[Row]) -> str:
    """Every contender of one case."""
    return table(CASE, [[contender(row, rows), times(row.seconds), *_rates(row), *_proof(row)] for row in rows])


def kernel_table(cases: dict[str, list[Row]]) -> str:
    """A line a case: our time and its share of what the machine can do, then each opponent's time over ours."""
    ways = dict.fromkeys(row.way for rows in cases.values() for row in rows if row.way != OURS)
    head = ["call", "ours", "of copy ceiling", "of matmul ceiling", *(f"{way} / ours" for way in ways)]
    lines = []
    for case, rows in cases.items():
        own = ours(rows)
        by_way = {row.way: ratios(row.ratio) or times(row.seconds) for row in rows}
        first = ["", "", ""] if own is None else [times(own.seconds), shares(own.of_copy), shares(own.of_ceiling)]
        lines.append([case, *first, *(by_way.get(way, "") for way in ways)])
    return table(head, lines)


def model_table(results: Sequence[Results], cases: Sequence[dict[str, list[Row]]]) -> str:
    """The best of each kind of contender in these cases of each file; the machine is named where there are several."""
    head = ("machine", "case", "contender", "images/s", "times ours", "MFU", "peak memory")
    lines: list[list[str]] = []
    for found, chosen in zip(results, cases, strict=True):
        machine = place(found) if len(results) > 1 else ""
        for case, rows in chosen.items():
            first = len(lines)
            lines += [
                ["", "", contender(row, rows), spread(row.images_per_second, number), ratios(row.ratio),
                 shares(row.mfu), gigabytes(row.allocated)]
                for row in representatives(rows)
            ]  # fmt: skip
            lines += [["", "", entry.way, entry.reason, "", "", ""] for entry in _without_time(found, case, rows)]
            lines[first][:2] = machine, case
    return table(head, lines, left=3)


def operation_table(results: Sequence[Results]) -> str:
    """A line an operation: how many times as fast as the best opponent its calls are, and how near to the ceilings."""
    head = ("machine", "operation", "calls", "times as fast as the best opponent", "of its nearer ceiling")
    lines = []
    for found in results:
        cases = found.cases("kernels")
        names = dict.fromkeys(operation(row) for row in found.of("kernels"))
        for name in names:
            chosen = [rows for rows in cases.values() if operation(rows[0]) == name]
            best = [fastest(opponents(rows)) for rows in chosen]
            gains = [row.ratio.median for row in best if row is not None and row.ratio is not None]
            near = [max(_medians(own.of_copy, own.of_ceiling), default=None) for own in map(ours, chosen) if own]
            lines.append([
                place(found) if len(results) > 1 else "", f"`{name}`", str(len(chosen)),
                _mean_and_range(gains, lambda x: f"{x:.2f}"),
                _mean_and_range([x for x in near if x], lambda x: f"{100 * x:.0f} %"),
            ])  # fmt: skip
    return table(head, lines, left=2)


def place(results: Results) -> str:
    """The machine, and what it was held to."""
    limit = "" if results.memory_limit is None else f", limited to {results.memory_limit:g} GB"
    return results.hardware + limit


def skipped_list(skipped: Sequence[Skipped]) -> str:
    return "".join(f"- {entry.case}, {entry.way}: {entry.reason}\n" for entry in skipped)


def _without_time(results: Results, case: str, rows: Sequence[Row]) -> list[Skipped]:
    """Contenders of a case of whose kind no other was timed."""
    kinds = {kind(row.way) for row in rows}
    return [entry for entry in results.skipped if entry.case == case and kind(entry.way) not in kinds]


def _rates(row: Row) -> list[str]:
    rate = spread(row.images_per_second, number)
    return [rate, ratios(row.ratio), shares(row.mfu), shares(row.of_ceiling), shares(row.of_copy)]


def _proof(row: Row) -> list[str]:
    gate = row.gate or {}
    passed = f"{gate['error']:.1e} of {gate['allowed']:.1e}" if {"error", "allowed"} <= gate.keys() else ""
    return [gigabytes(row.allocated), gigabytes(row.reserved), "same" if gate.get("same") else passed]


def _medians(*values: Spread | None) -> list[float]:
    return [value.median for value in values if value is not None]


def _mean_and_range(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Geometric mean, least and most."""
    if not values:
        return ""
    mean = math.exp(sum(map(math.log, values)) / len(values))
    return f"{show(mean)} ({show(min(values))} - {show(max(values))})"
