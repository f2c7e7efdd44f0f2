"""Numbers and tables as people read them, in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mpdit.report.fields import Spread


def line(text: str) -> str:
    return f"{text}\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table, the first `left` columns flush left; a column without any entry is left out."""
    used = [i for i in range(len(head)) if any(row[i] for row in rows)]
    rule = [":--" if i < left else "--:" for i in used]
    lines = [[head[i] for i in used], rule, *([_cell(row[i]) for i in used] for row in rows)]
    return "".join(line(f"| {' | '.join(cells)} |") for cells in lines)


def spread(values: Spread | None, show: Callable[[float], str], unit: str = "") -> str:
    """ "4.12 (4.10 - 4.15) ms"; nothing for None."""
    if values is None:
        return ""
    return f"{show(values.median)} ({show(values.q20)} - {show(values.q80)}){unit and ' ' + unit}"


def times(values: Spread | None) -> str:
    """Seconds with their spread, in the unit that suits the median."""
    if values is None:
        return ""
    unit, factor = _unit(values.median)
    return spread(values, lambda x: number(factor * x), unit)


def shares(values: Spread | None) -> str:
    return spread(values, lambda x: f"{100 * x:.1f}", "%")


def ratios(values: Spread | None) -> str:
    return spread(values, lambda x: f"{x:.2f}")


def seconds(value: float) -> str:
    unit, factor = _unit(value)
    return f"{number(factor * value)} {unit}"


def gigabytes(value: float | None) -> str:
    """Of 1e9 bytes."""
    return "" if value is None else f"{number(value / 1e9)} GB"


def percent(share: float) -> str:
    return f"{100 * share:g} %"


def rate(value: float, unit: str) -> str:
    """ "4.80 TB/s" of 4.8e12 and "B/s"."""
    prefix, factor = next(((name, size) for name, size in (("T", 1e12), ("G", 1e9)) if value >= size), ("M", 1e6))
    return f"{number(value / factor)} {prefix}{unit}"


def number(value: float) -> str:
    """Three significant digits, and all those before the point."""
    decimals = next((d for d, least in enumerate((99.95, 9.995, 0.9995)) if value >= least), 3)
    return f"{value:.{decimals}f}"


def _unit(value: float) -> tuple[str, float]:
    return next(((name, factor) for name, factor in (("s", 1.0), ("ms", 1e3)) if value * factor >= 1), ("µs", 1e6))


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
