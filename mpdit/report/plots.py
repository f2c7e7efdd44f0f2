"""Results as pictures: models' rates, memory and MFU as bars, kernels' times as dots; roofline.py has the roofline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from mpdit.report.choose import fastest, kind, largest, opponents, ours
from mpdit.report.fields import Spread
from mpdit.report.results import Results, Row
from mpdit.report.roofline import draw_roofline
from mpdit.report.style import BLUE, GREY, OTHERS, SKY, footer, new_figure, own_name, style
from mpdit.report.tables import contender
from mpdit.report.words import number, seconds

_BAR = 0.26  # inches that a bar takes
_BEHIND = {"facecolor": "white", "edgecolor": "none", "pad": 1}


@dataclass(frozen=True)
class Plot:
    """A picture that was written."""

    title: str
    path: Path


def draw_all(results: Results, folder: Path) -> list[Plot]:
    """Write a PNG of all that was measured into `folder`, each named after the results file."""
    found: list[tuple[str, str, Figure | None]] = [
        ("throughput", "Training step: images a second", _bars(results, "step", "Training step", _THROUGHPUT)),
        ("memory", "Training step: peak memory", _bars(results, "step", "Training step", _MEMORY)),
        ("mfu", "Training step: model FLOPs utilisation", _bars(results, "step", "Training step", _MFU)),
        ("sampling", "Sampling: images a second", _bars(results, "sampling", "Sampling", _THROUGHPUT)),
        ("roofline", "Roofline of the kernels", draw_roofline(results)),
        ("kernels", "Time of each kernel", _kernels(results)),
    ]
    plots = []
    for name, title, figure in found:
        if figure is None:
            continue
        path = folder / f"{results.path.stem}-{name}.png"
        figure.savefig(path, format="png")
        plots.append(Plot(f"{title}, {results.hardware}", path))
    return plots


@dataclass(frozen=True)
class _Quantity:
    """What bars show: its value in the axis' unit, with a spread where it has one."""

    title: str
    axis: str
    value: Callable[[Row], Spread | None]
    show: Callable[[float], str]
    beyond: Callable[[Row], float | None] = lambda row: None
    marks: Callable[[Results, Row], dict[str, float]] = lambda results, row: {}


def _memory(row: Row) -> Spread | None:
    return None if row.allocated is None else Spread(*[row.allocated / 1e9] * 3)


def _mfu_marks(results: Results, row: Row) -> dict[str, float]:
    return {"matmul measured in the same run": 100 * row.ceiling / row.peak} if row.peak and row.ceiling else {}


def _memory_marks(results: Results, row: Row) -> dict[str, float]:
    return {} if results.memory_limit is None else {"limit": results.memory_limit}


_THROUGHPUT = _Quantity("images a second", "images / s", lambda row: row.images_per_second, number)
_MEMORY = _Quantity(
    "peak memory", "GB (1e9 bytes): filled allocated, outlined reserved", _memory, number,
    beyond=lambda row: None if row.reserved is None else row.reserved / 1e9, marks=_memory_marks,
)  # fmt: skip
_MFU = _Quantity(
    "model FLOPs utilisation", "% of the datasheet's dense peak, in exact FLOPs of the reference graph",
    lambda row: row.mfu and row.seconds.per(100 * (row.flops or 0) / (row.peak or 1)),
    lambda x: f"{x:.1f}", marks=_mfu_marks,
)  # fmt: skip


def _bars(results: Results, part: str, name: str, quantity: _Quantity) -> Figure | None:
    """A panel a case, a bar a contender; None where no contender has the quantity."""
    cases = largest(results, part) if part == "step" else results.cases(part)
    panels = {case: [row for row in rows if quantity.value(row)] for case, rows in cases.items()}
    panels = {case: rows for case, rows in panels.items() if rows}
    if not panels:
        return None
    heights = [0.9 + _BAR * len(rows) for rows in panels.values()]
    figure = new_figure(9, 0.6 + sum(heights))
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (case, rows) in zip(grid, panels.items(), strict=True):
        _panel(axes, case, rows, results, quantity)
    grid[-1].set_xlabel(quantity.axis)
    figure.suptitle(f"{name}: {quantity.title}", x=0.01, ha="left", fontweight="bold")
    footer(figure, results, "Bars are medians, whiskers 20 % and 80 % quantiles." if quantity is not _MEMORY else "")
    return figure


def _panel(axes: Axes, case: str, rows: Sequence[Row], results: Results, quantity: _Quantity) -> None:
    colours = _colours(rows)
    most = 0.0
    for place, row in enumerate(rows):
        value = quantity.value(row)
        assert value is not None
        beyond = quantity.beyond(row)
        end = max(value.q80, beyond or 0)
        if beyond is not None:
            axes.barh(place, beyond, height=0.7, facecolor="none", edgecolor=colours[kind(row.way)], linewidth=1)
        axes.barh(place, value.median, height=0.7, color=colours[kind(row.way)])
        if value.q80 > value.q20:
            around = [[value.median - value.q20], [value.q80 - value.median]]
            axes.errorbar(value.median, place, xerr=around, color="black", capsize=2.5, linewidth=0.9)
        text = quantity.show(value.median) + ("" if beyond is None else f" ({quantity.show(beyond)})")
        axes.annotate(text, (end, place), (5, 0), textcoords="offset points", va="center", fontsize=8.5, bbox=_BEHIND)
        most = max(most, end)
    for name, at in quantity.marks(results, rows[0]).items():
        axes.axvline(at, color="black", linewidth=1, linestyle="--")
        axes.annotate(f"{name} {quantity.show(at)} ", (at, 1), (0, 2), xycoords=axes.get_xaxis_transform(),
                      textcoords="offset points", ha="right", va="bottom", fontsize=8.5)  # fmt: skip
        most = max(most, at)
    axes.set_xlim(0, 1.16 * most)
    axes.set_yticks(range(len(rows)), [contender(row, rows) for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_title(case, loc="left", fontsize=10)
    style(axes, "x")


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    """Ours blue, our code in plain PyTorch grey, each other model and project its own."""
    fixed = {"ours": BLUE, "ours, compiled": SKY, "plain": GREY}
    projects = [name for name in dict.fromkeys(kind(row.way) for row in rows) if name not in fixed]
    families = list(dict.fromkeys(name.split(",")[0] for name in projects))
    return fixed | {name: OTHERS[families.index(name.split(",")[0]) % len(OTHERS)] for name in projects}


def _kernels(results: Results) -> Figure | None:
    """A line a call: our time and that of its best opponent."""
    duels = []
    for case, rows in results.cases("kernels").items():
        own, best = ours(rows), fastest(opponents(rows))
        if own is not None and best is not None:
            duels.append((case, own, best))
    if not duels:
        return None
    figure = new_figure(9, 1.9 + 0.21 * len(duels))
    axes = figure.subplots()
    ways = list(dict.fromkeys(best.way for _, _, best in duels))
    looks = dict(zip(ways, zip(cycle("sD^vPX*"), cycle(OTHERS)), strict=False))
    for place, (_, own, best) in enumerate(duels):
        axes.plot([own.seconds.median, best.seconds.median], [place] * 2, color="#bbbbbb", linewidth=1.5, zorder=1)
        if best.ratio is not None:
            axes.annotate(f"{best.ratio.median:.2f}x", (1.01, place), xycoords=axes.get_yaxis_transform(), va="center",
                          fontsize=8, color=gain_colour(best.ratio))  # fmt: skip
    for way in ways:
        places = [place for place, (_, _, best) in enumerate(duels) if best.way == way]
        _dots(axes, places, [duels[place][2] for place in places], *looks[way], f"best opponent: {way}")
    _dots(axes, range(len(duels)), [own for _, own, _ in duels], "o", BLUE, "ours")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: seconds(x).replace(".00", "").replace(".0", "")))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda x, _: ""))
    axes.set_yticks(range(len(duels)), [case for case, _, _ in duels], fontsize=8)
    axes.set_ylim(len(duels) - 0.4, -0.6)
    axes.set_xlabel("time of a call (log scale); on the right, the best opponent's time over ours")
    style(axes, "both")
    figure.suptitle(f"Time of {own_name(results)}", x=0.01, ha="left", fontweight="bold")
    figure.legend(loc="outside upper right", ncols=4, frameon=False, fontsize=8.5)
    footer(
        figure,
        results,
        "Medians, 20 % and 80 % quantiles. Ratio black: ours faster; orange: slower; grey: spread holds 1.",
    )
    return figure


def gain_colour(ratio: Spread) -> str:
    """Black where ours is faster, orange where slower, grey where the spread, in the digits shown, holds 1."""
    return "black" if round(ratio.q20, 2) > 1 else OTHERS[1] if round(ratio.q80, 2) < 1 else GREY


def _dots(axes: Axes, places: Sequence[int], rows: Sequence[Row], marker: str, colour: str, label: str) -> None:
    middle, low, high = zip(*((row.seconds.median, row.seconds.q20, row.seconds.q80) for row in rows), strict=True)
    around = [[m - x for m, x in zip(middle, low, strict=True)], [x - m for m, x in zip(middle, high, strict=True)]]
    axes.errorbar(middle, places, xerr=around, fmt=marker, color=colour, markersize=5, linewidth=1, label=label)
