"""How our pictures look. The colours are Okabe and Ito's, which colour-blind people tell apart."""

from __future__ import annotations

from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mpdit.report.results import Results
from mpdit.report.tables import place

BLUE, SKY, GREY = "#0072B2", "#56B4E9", "#8c8c8c"
OTHERS = ("#E69F00", "#D55E00", "#009E73", "#CC79A7", "#000000")
"""For what is not ours."""


def new_figure(width: float, height: float) -> Figure:
    """Inches; drawn without a display."""
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def style(axes: Axes, grid: Literal["x", "y", "both"]) -> None:
    axes.grid(axis=grid, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def own_name(results: Results) -> str:
    """What `ours` runs as kernels there."""
    return "our kernels" if results.on_gpu else "our kernels' references (on a CPU)"


def footer(figure: Figure, results: Results, note: str) -> None:
    """Where and when it was measured, below the picture."""
    source = f"{place(results)}; {results.date}; torch {results.machine['torch']}."
    figure.supxlabel(f"{source} {note}".rstrip(), x=0.01, ha="left", fontsize=8, color="#555555")
