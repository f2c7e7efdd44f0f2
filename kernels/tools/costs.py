"""The table of costs in kernels/README.md: bytes, FLOP and time floor of every case, beside what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mpdit_kernels import hardware
from mpdit_kernels.dispatch import TUNED

from tools.cases import Case, Cost
from tools.command import write_atomically

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- costs: written by python -m tools.tune --update -->", "<!-- end of costs -->"
GPUS = (hardware.GPUS["a100-40gb"], hardware.GPUS["h200"])
"""GPUs that the table has floors for."""


def floor(cost: Cost, gpu: hardware.Gpu) -> float:
    """Return the least seconds that a pass takes on a GPU, by its datasheet."""
    return cost.floor(gpu.bandwidth, gpu.flops, gpu.flops32)


def table(cases: Sequence[Case], measured: dict[str, dict[str, Any]]) -> str:
    """Return the Markdown between the markers: floors of all cases and, for each table in `measured`, what it holds."""
    rates = "; ".join(
        f"{gpu.name}: {gpu.bandwidth / 1e9:.0f} GB/s, {gpu.flops / 1e12:.0f} and {gpu.flops32 / 1e12:.3g} TFLOP/s"
        for gpu in GPUS
    )
    text = [
        "Each cell is forward / backward. MB (1e6 bytes) and GFLOP are the least a call must do with bf16 activations. "
        "GFLOP are those of products and transforms; elementwise arithmetic is not counted, as it takes less time than "
        "its bytes. The floors are the longest of bytes at datasheet bandwidth, FLOP at datasheet dense bf16 rate and, "
        f"for products in fp32 outside of tensor cores, at datasheet fp32 rate ({rates}).",
        "",
        *([] if measured else ["No GPU figures have been measured yet, so the measured columns are empty.", ""]),
    ]
    head = ["operation", "case", "MB", "GFLOP", *(f"{gpu.name} floor, µs" for gpu in GPUS)]
    machines = [figures["machine"]["gpu"] + ":" for figures in measured.values()] or ["measured"]
    columns = ("time, µs", "of ceiling", "against the best of eager and torch.compile")
    head += [f"{machine} {column}" for machine in machines for column in columns]
    rows = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for case in cases:
        costs = [cost for cost in (case.forward, case.backward) if cost]
        row = [f"`{case.operation}`", case.label]
        row += [_pair(costs, lambda c: c.bytes / 1e6), _pair(costs, lambda c: (c.flops + c.flops32) / 1e9)]
        row += [_pair(costs, lambda c, gpu=gpu: 1e6 * floor(c, gpu)) for gpu in GPUS]  # type: ignore[misc]
        for figures in list(measured.values()) or [{}]:
            row += _measured(figures.get("cases", {}).get(case.name, {}))
        rows.append(row)
    text += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(text + [line for figures in measured.values() for line in _provenance(figures)])


def _measured(figures: dict[str, Any]) -> list[str]:
    """Return the measured cells of a case."""
    passes = [figures[name] for name in ("forward", "backward") if name in figures]
    if not passes:
        return [f"gate failed: {figures['red']}".replace("|", "/") if "red" in figures else "", "", ""]
    return [
        _pair(passes, lambda p: 1e6 * p["seconds"]["triton"][0]),
        _pair(passes, lambda p: 100 * p["share"], " %"),
        _pair(passes, lambda p: p["ratio"], "x", 2) + "; compile failed" * ("compile failed" in figures),
    ]


def _provenance(figures: dict[str, Any]) -> list[str]:
    """Say what a measured table was measured on, and which operations are off by default because of it."""
    machine = ", ".join(f"{name} {value}" for name, value in figures["machine"].items())
    lines = ["", f"Measured: {machine}."]
    if figures.get("ceilings"):
        copy, matmul, matmul32 = (figures["ceilings"][name] for name in ("copy", "matmul", "matmul32"))
        lines[-1] += (
            f" Ceilings of the same run: copying {copy / 1e12:.2f} TB/s (read and written), 8192³ bf16 products "
            f"{matmul / 1e12:.0f} TFLOP/s, 4096³ fp32 products without TF32 {matmul32 / 1e12:.1f} TFLOP/s."
        )
    for where, verdict in (("", figures), (" under torch.compile", figures.get("compiled", {}))):
        losses = verdict.get("losses", {})
        lines += [f"`{name}` is off by default there{where}: {why}." for name, why in losses.items()]
    return lines


def _pair(values: Sequence[Any], number: Callable[[Any], float], unit: str = "", decimals: int | None = None) -> str:
    """Return "47.3 / 70.9", a number of each value: three significant digits, unless `decimals` are given."""

    def text(x: float) -> str:
        digits = decimals if decimals is not None else 0 if x >= 99.95 or x == 0 else 1 if x >= 9.995 else 2
        return f"{x:.{digits}f}{unit}"

    return " / ".join(text(number(value)) for value in values)


def measured_tables(folder: Path = TUNED) -> dict[str, dict[str, Any]]:
    """Read what the tuner left, by architecture."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("sm_*.json"))}


def updated(text: str, new: str) -> str:
    """Return the text with `new` between its markers.

    Raises:
        ValueError: it hasn't exactly one pair of them.
    """
    before, *rest = text.split(BEGIN)
    if len(rest) != 1 or rest[0].count(END) != 1:
        raise ValueError(f"expected exactly one block from {BEGIN} to {END}")
    return f"{before}{BEGIN}\n{new}\n{END}{rest[0].split(END)[1]}"


def update(path: Path, cases: Sequence[Case]) -> None:
    """Write the table into a file with markers."""
    write_atomically(path, updated(path.read_text(), table(cases, measured_tables())))
