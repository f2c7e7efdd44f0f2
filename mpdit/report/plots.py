"""Draws results: models' rates and memory as bars, kernels' times as dots.

Colours are Okabe and Ito's, which colour-blind people tell apart. Drawn without a display.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from mpdit.report.markdown import TITLES, number, seconds, variant_name
from mpdit.report.results import Results, Row, Spread, best_opponent, kind, ours

BLUE, SKY, GREY, DARK = "#0072B2", "#56B4E9", "#8c8c8c", "#555555"
OTHERS = ("#E69F00", "#D55E00", "#009E73", "#CC79A7", "#000000")
"""For what is not ours."""
_BAR = 0.26  # inches that a bar takes


def draw_all(results: Results, folder: Path) -> list[tuple[str, Path]]:
    """Write a PNG of all that was measured into `folder`; return each one's title and path."""
    figures = {
        "throughput": ("Training step: images a second", _draw_rates(results, "step")),
        "memory": ("Training step: peak memory", _draw_memory(results)),
        "sampling": ("Sampling: images a second", _draw_rates(results, "sampling")),
        "kernels": ("Time of each kernel", draw_kernels(results)),
    }
    drawn = []
    for name, (title, figure) in figures.items():
        if figure is not None:
            path = folder / f"{results.path.stem}-{name}.png"
            figure.savefig(path, format="png")
            drawn.append((f"{title}, {results.hardware}", path))
    return drawn


Bars = Callable[[Row], tuple[Spread | None, float | None]]
"""Takes a row to the length of its filled bar, in the axis' unit, and of an outlined one around it."""


def _draw_rates(results: Results, part: str) -> Figure | None:
    title = f"{TITLES[part]}: images a second"
    return _draw_bars(results, part, title, "images / s", lambda row: (row.images_per_second, None))


def _draw_memory(results: Results) -> Figure | None:
    def bars(row: Row) -> tuple[Spread | None, float | None]:
        filled = None if row.allocated is None else Spread(*[row.allocated / 1e9] * 3)
        return filled, None if row.reserved is None else row.reserved / 1e9

    axis = "GB (1e9 bytes): filled allocated, outlined reserved"
    return _draw_bars(results, "step", "Training step: peak memory", axis, bars, results.memory_limit)


def _draw_bars(
    results: Results, part: str, title: str, axis: str, bars: Bars, limit: float | None = None
) -> Figure | None:
    """Draw a panel a case, a bar a variant, and a line at a limit; None where no variant has the quantity."""
    cases = results.largest(part) if part == "step" else results.cases(part)
    panels = {case: [row for row in rows if bars(row)[0]] for case, rows in cases.items()}
    panels = {case: rows for case, rows in panels.items() if rows}
    if not panels:
        return None
    heights = [0.9 + _BAR * len(rows) for rows in panels.values()]
    spreads = any(bars(row)[1] is None for rows in panels.values() for row in rows)  # a peak of memory has none
    note = "Bars are medians, whiskers 20 % and 80 % quantiles." if spreads else ""
    figure = _figure(results, 0.6 + sum(heights), title, note)
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (case, rows) in zip(grid, panels.items(), strict=True):
        most = _draw_panel(axes, rows, bars)
        if limit is not None:
            axes.axvline(limit, color="black", linewidth=1, linestyle="--")
            above = axes.get_xaxis_transform()
            _label(axes, f"limit {number(limit)} ", (limit, 1), (0, 2), above, ha="right", va="bottom")
        axes.set_xlim(0, 1.16 * max(most, limit or 0))
        axes.set_title(case, loc="left", fontsize=10)
        _style(axes, "x")
    grid[-1].set_xlabel(axis)
    return figure


def _draw_panel(axes: Axes, rows: Sequence[Row], bars: Bars) -> float:
    """Draw a case's bars and return where the longest one ends."""
    # Ours blue, our code in plain PyTorch grey, each other model and project its own.
    colours = {"ours": BLUE, "ours, compiled": SKY, "plain": GREY}
    ends, others = [], cycle(OTHERS)
    for place, row in enumerate(rows):
        (value, outline), name = bars(row), kind(row.variant)
        project = name if name in colours else name.partition(",")[0]
        colour = colours.get(project) or colours.setdefault(project, next(others))
        assert value is not None
        if outline is not None:
            axes.barh(place, outline, height=0.7, facecolor="none", edgecolor=colour, linewidth=1)
        axes.barh(place, value.median, height=0.7, color=colour)
        if value.q80 > value.q20:
            axes.errorbar(value.median, place, xerr=_whiskers([value]), color="black", capsize=2.5, linewidth=0.9)
        ends.append(max(value.q80, outline or 0))
        text = number(value.median) + ("" if outline is None else f" ({number(outline)})")
        _label(axes, text, (ends[-1], place), (5, 0), va="center", bbox={"facecolor": "white", "lw": 0, "pad": 1})
    axes.set_yticks(range(len(rows)), [variant_name(row, rows) for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    return max(ends)


def draw_kernels(results: Results) -> Figure | None:
    """Draw a line a call: our time and that of its best opponent."""
    found = [(case, ours(rows), best_opponent(rows)) for case, rows in results.cases("kernels").items()]
    pairs = [(case, own, best) for case, own, best in found if own is not None and best is not None]
    if not pairs:
        return None
    note = "Medians, 20 % and 80 % quantiles. Ratio black: ours faster; orange: slower; grey: spread holds 1."
    kernels = "our kernels" if results.on_gpu else "our kernels' references (on a CPU)"
    figure = _figure(results, 1.9 + 0.21 * len(pairs), f"Time of {kernels}", note)
    axes = figure.subplots()
    dots: dict[str, list[tuple[int, Row]]] = {}
    for place, (_, own, best) in enumerate(pairs):
        axes.plot([own.seconds.median, best.seconds.median], [place] * 2, color="#bbbbbb", linewidth=1.5, zorder=1)
        if best.ratio is not None:
            text, colour = f"{best.ratio.median:.2f}x", gain_colour(best.ratio)
            _label(axes, text, (1.01, place), (0, 0), axes.get_yaxis_transform(), va="center", color=colour)
        dots.setdefault(f"best opponent: {best.variant}", []).append((place, best))
    looks = [*zip(cycle("sD^vPX*"), cycle(OTHERS), dots, strict=False), ("o", BLUE, "ours")]
    dots["ours"] = [(place, own) for place, (_, own, _) in enumerate(pairs)]
    for marker, colour, label in looks:
        times = [row.seconds for _, row in dots[label]]
        places, medians = [place for place, _ in dots[label]], [time.median for time in times]
        whiskers = _whiskers(times)
        axes.errorbar(medians, places, xerr=whiskers, fmt=marker, c=colour, markersize=5, linewidth=1, label=label)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: seconds(x).replace(".00", "").replace(".0", "")))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda x, _: ""))
    axes.set_yticks(range(len(pairs)), [case for case, _, _ in pairs], fontsize=8)
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    axes.set_xlabel("time of a call (log scale); on the right, the best opponent's time over ours")
    _style(axes, "both")
    figure.legend(loc="outside upper right", ncols=4, frameon=False, fontsize=8.5)
    return figure


def gain_colour(ratio: Spread) -> str:
    """Return black where ours is faster, orange where slower, grey where the spread, as it is shown, holds 1."""
    return "black" if round(ratio.q20, 2) > 1 else OTHERS[1] if round(ratio.q80, 2) < 1 else GREY


def _figure(results: Results, height: float, title: str, note: str) -> Figure:
    """Return a figure 9 inches wide that says where and when it was measured."""
    figure = Figure(figsize=(9, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    source = f"{results.place}; {results.date}; torch {results.machine['torch']}."
    figure.supxlabel(f"{source} {note}".rstrip(), x=0.01, ha="left", fontsize=8, color=DARK)
    return figure


def _style(axes: Axes, grid: Literal["x", "y", "both"]) -> None:
    axes.grid(axis=grid, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _label(
    axes: Axes, text: str, at: tuple[float, float], by: tuple[float, float], transform: Any = "data", **style: Any
) -> None:
    """Write beside a point, so many typographic points away."""
    axes.annotate(text, at, by, transform, "offset points", fontsize=8, **style)


def _whiskers(values: Sequence[Spread]) -> list[list[float]]:
    """Return the lengths of error bars, below and above."""
    return [[value.median - value.q20 for value in values], [value.q80 - value.median for value in values]]
