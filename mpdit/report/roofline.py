"""Kernels under the machine's roofs: FLOP/s by FLOP a byte, and bytes/s of those that count no FLOP."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray

from mpdit.report.choose import operation
from mpdit.report.results import OURS, Results, Row
from mpdit.report.style import BLUE, GREY, OTHERS, SKY, footer, new_figure, own_name, style
from mpdit.report.words import rate

_COLOURS = (BLUE, *OTHERS, SKY, GREY)
_MARKERS = "os^DvPX*<>h"  # 11 against 8 colours: a pair comes again after 88
_DARK = "#555555"

Looks = dict[str, tuple[str, str]]
"""Colour and marker by operation."""


def draw_roofline(results: Results) -> Figure | None:
    """None unless one of our kernels has its bytes counted."""
    rows = [row for row in results.of("kernels") if row.way == OURS and row.bytes]
    if not rows:
        return None
    names = list(dict.fromkeys(map(operation, rows)))
    looks = looks_of(names)
    counted, moved = ([row for row in rows if bool(row.flops) is wanted] for wanted in (True, False))
    figure = new_figure(9, 5.6)
    panels = [
        (draw, chosen, width) for draw, chosen, width in ((_roofline, counted, 3), (_bandwidth, moved, 1)) if chosen
    ]
    grid = figure.subplots(1, len(panels), squeeze=False, width_ratios=[width for _, _, width in panels])[0]
    for axes, (draw, chosen, _) in zip(grid, panels, strict=True):
        draw(axes, results, chosen, looks)
        style(axes, "both")
    for name, (colour, marker) in looks.items():
        grid[0].plot([], [], marker, color=colour, label=name)
    grid[0].plot([], [], "o", color="black", label="forward")
    grid[0].plot([], [], "o", color="black", markerfacecolor="white", label="backward")
    figure.suptitle(f"Roofline of {own_name(results)}", x=0.01, ha="left", fontweight="bold")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8.5)
    footer(figure, results, "Medians; bytes are the least that a call must move.")
    return figure


def looks_of(names: Sequence[str]) -> Looks:
    """No two alike."""
    return {name: (_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]) for i, name in enumerate(names)}


def _roofline(axes: Axes, results: Results, rows: Sequence[Row], looks: Looks) -> None:
    """FLOP/s by FLOP a byte, below the datasheet's roof and the measured one."""
    known = [row.flops / row.bytes for row in rows if row.flops and row.bytes]
    x = np.geomspace(min(known) / 4, max(4 * max(known), 1000), 200)
    dtypes = {"fp32" if row.dtype == "fp32" else "bf16" for row in rows}
    for dtype in sorted(dtypes):
        if results.peaks:
            _roof(axes, x, results.peaks["bandwidth"], results.peaks[dtype], f"datasheet {dtype}", above=True)
        if results.ceilings:
            flat = results.ceilings["matmul32" if dtype == "fp32" else "matmul"]
            _roof(axes, x, results.ceilings["copy"], flat, f"measured {dtype}", above=False)
    for row in rows:
        assert row.flops and row.bytes
        _dot(axes, row.flops / row.bytes, row.flops / row.seconds.median, row, looks)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(x[0], x[-1])
    axes.set_xlabel("FLOP a byte")
    axes.set_ylabel("FLOP / s")
    axes.set_title("calls with products", loc="left", fontsize=10)


def _roof(axes: Axes, x: NDArray[np.float64], slope: float, flat: float, name: str, above: bool) -> None:
    colour = "black" if above else _DARK
    axes.plot(x, np.minimum(slope * x, flat), "-" if above else "--", color=colour, linewidth=1.2, zorder=1)
    axes.annotate(
        f"{name}, {rate(flat, 'FLOP/s')}", (x[-1], flat), (-2, 3 if above else -3), textcoords="offset points",
        ha="right", va="bottom" if above else "top", fontsize=8, color=colour,
    )  # fmt: skip


def _bandwidth(axes: Axes, results: Results, rows: Sequence[Row], looks: Looks) -> None:
    """Bytes a second of calls without products, below the datasheet's bandwidth and the rate of copies."""
    names = list(dict.fromkeys(map(operation, rows)))
    for row in rows:
        assert row.bytes
        _dot(axes, names.index(operation(row)), row.bytes / row.seconds.median, row, looks)
    if results.peaks:
        axes.axhline(results.peaks["bandwidth"], color="black", linewidth=1.2, zorder=1)
    if results.ceilings:
        axes.axhline(results.ceilings["copy"], color=_DARK, linestyle="--", linewidth=1.2, zorder=1)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    rates = [row.bytes / row.seconds.median for row in rows if row.bytes]
    roofs = [
        r for r in (results.peaks and results.peaks["bandwidth"], results.ceilings and results.ceilings["copy"]) if r
    ]
    most = max(*rates, *roofs) if roofs else max(rates)
    if min(rates) < most / 20:  # on a linear axis they would all lie on its floor
        axes.set_yscale("log")
        axes.set_ylim(min(rates) / 2, 2 * most)
    else:
        axes.set_ylim(0, 1.1 * most)
    if results.peaks:
        _name(axes, results.peaks["bandwidth"], "datasheet", "black", above=True)
    if results.ceilings:
        low = results.ceilings["copy"] < 0.1 * most and axes.get_yscale() == "linear"  # no room below
        _name(axes, results.ceilings["copy"], "copies", _DARK, above=low)
    axes.yaxis.set_major_formatter(EngFormatter(unit="B/s"))
    axes.set_title("elementwise calls", loc="left", fontsize=10)


def _name(axes: Axes, y: float, name: str, colour: str, above: bool) -> None:
    axes.annotate(
        f"{name}, {rate(y, 'B/s')}", (0.02, y), (0, 3 if above else -3), xycoords=axes.get_yaxis_transform(),
        textcoords="offset points", va="bottom" if above else "top", fontsize=8, color=colour,
    )  # fmt: skip


def _dot(axes: Axes, x: float, y: float, row: Row, looks: Looks) -> None:
    colour, marker = looks[operation(row)]
    face = "white" if "backward" in row.case else colour
    axes.plot(x, y, marker, color=colour, markerfacecolor=face, markersize=6, zorder=3)
