"""Draws the loss curve of a run, from its metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import ArrayLike, NDArray

_BLUE, _ORANGE = "#2a6fbb", "#d9822b"
_MAX_SMOOTHING = 50  # logged points


def smooth(values: ArrayLike, points: int) -> NDArray[np.float64]:
    """Average over about `points` values, centred (a trailing average would lag); NaN and inf are passed over."""
    values = np.asarray(values, dtype=np.float64)
    # scipy's gaussian_filter1d is the same, but takes longer to import than the plot takes.
    kernel = np.exp(-0.5 * (4 * np.arange(-points, points + 1) / points) ** 2)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    weight = np.convolve(known, kernel, mode="same")
    return np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > 0)


def plot_loss(metrics: str | Path, png: str | Path, title: str = "Training loss") -> None:
    """Draw loss and images per second of a metrics.jsonl over the steps into a PNG (folders are made where missing).

    Works without a display; draws nothing where no step is logged.
    """
    records = [json.loads(line) for line in Path(metrics).read_text().splitlines()]
    if not records:
        return
    steps, loss, speed = (
        np.array([np.nan if record.get(name) is None else float(record[name]) for record in records])
        for name in ("step", "loss", "images_per_second")
    )
    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    line: dict[str, Any] = {"linewidth": 1.2, "marker": "o" if len(steps) <= 30 else None, "markersize": 4}
    points, last = min(_MAX_SMOOTHING, len(steps) // 20), loss[-1]
    if points < 2:
        upper.plot(steps, loss, color=_BLUE, **line, label="loss")
    else:
        curve = smooth(loss, points)
        upper.plot(steps, loss, color=_BLUE, alpha=0.3, linewidth=0.9, label="loss")
        upper.plot(steps, curve, color=_BLUE, linewidth=2, label=f"smoothed over {points} logged steps")
        last = curve[-1]
    upper.set_title(title, loc="left", fontweight="bold")
    upper.set_title(f"last {last:.4f}", loc="right", color=_BLUE, fontsize="medium")
    upper.set_ylabel("loss (mean-squared error of the velocity)")
    upper.legend(frameon=False, loc="upper right")
    lower.plot(steps, speed, color=_ORANGE, **line)
    fastest = speed[np.isfinite(speed)].max(initial=0)
    lower.set_ylim(0, 1.15 * fastest or 1)
    lower.set_ylabel("images / s")
    lower.set_xlabel("step")
    lower.set_xlim(steps[0] - 1, steps[-1] + 1)
    lower.yaxis.set_major_formatter(EngFormatter(sep=""))
    lower.yaxis.set_major_locator(MaxNLocator(3))
    lower.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    for axes in (upper, lower):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    Path(png).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, format="png")
