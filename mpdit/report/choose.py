"""Which rows stand for the rest, where not all of them can be shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mpdit.model.presets import PRESETS
from mpdit.report.results import OURS, Results, Row

PLAIN = ("eager", "compile")
"""Our code without its kernels: PyTorch's operators as they are, and under torch.compile."""


def ours(rows: Iterable[Row]) -> Row | None:
    return next((row for row in rows if row.way == OURS), None)


def opponents(rows: Iterable[Row]) -> list[Row]:
    """Those of a case that are not our code on our kernels."""
    return [row for row in rows if not row.way.startswith(OURS)]


def fastest(rows: Sequence[Row]) -> Row | None:
    return min(rows, key=lambda row: row.seconds.median, default=None)


def kind(way: str) -> str:
    """What a contender is: "ours", "ours, compiled", "plain", another model in our code by its name, or its project."""
    if way in PLAIN:
        return "plain"
    return next((name for name in PRESETS if way.startswith(name)), way)


def representatives(rows: Sequence[Row]) -> list[Row]:
    """The fastest of each kind, in the order of the file: of several ways to run one thing, the best one is quoted."""
    kinds = dict.fromkeys(kind(row.way) for row in rows)
    best = [fastest([row for row in rows if kind(row.way) == name]) for name in kinds]
    return [row for row in best if row is not None]


def largest(results: Results, part: str) -> dict[str, list[Row]]:
    """Of each model the case with the most images, of those that ours has run."""
    found: dict[str | None, tuple[int, str]] = {}
    cases = results.cases(part)
    for case, rows in cases.items():
        own = ours(rows)
        if own is not None and (own.images or 0) > found.get(own.model, (-1, ""))[0]:
            found[own.model] = own.images or 0, case
    return {case: cases[case] for _, case in found.values()}


def newest(results: Sequence[Results], part: str) -> list[Results]:
    """Of each machine the newest file with this part; those of GPUs, or where there are none those of CPUs."""
    having = [r for r in results if r.of(part)]
    having = [r for r in having if r.on_gpu] or having
    latest = {(r.hardware, r.memory_limit): r for r in sorted(having, key=lambda r: (r.date, r.time))}
    return list(latest.values())


def operation(row: Row) -> str:
    """Of a kernel's case: "adaln" of "adaln, XL, 80 tokens, forward"."""
    names = [name.strip() for name in row.case.split(",")]
    return names[1] if names[0] == row.part and len(names) > 1 else names[0]
