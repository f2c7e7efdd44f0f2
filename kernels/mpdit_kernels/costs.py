"""python -m mpdit_kernels.costs: bytes, FLOP and time floor of every case, beside what was measured.

Prints a table in Markdown; --update puts it between its markers in kernels/README.md. Exit codes: 0, 2 bad usage.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpdit_kernels import hardware
from mpdit_kernels.cases import Case, Cost, all_cases
from mpdit_kernels.command import Parser, write_atomically

README = Path(__file__).parents[1] / "README.md"
TUNED = Path(__file__).parent / "tuned"
BEGIN, END = "<!-- costs: written by python -m mpdit_kernels.costs --update -->", "<!-- end of costs -->"


@dataclass(frozen=True)
class Rates:
    """What a GPU does at best, a second: bytes, bf16 FLOP on tensor cores, and fp32 FLOP outside of them."""

    name: str
    bandwidth: float
    flops: float
    flops32: float

    def floor(self, cost: Cost) -> float:
        """Seconds that moving the bytes or either kind of arithmetic takes at least, whichever is longest."""
        return max(cost.bytes / self.bandwidth, cost.flops / self.flops, cost.flops32 / self.flops32)


GPUS = tuple(
    Rates(gpu.name, gpu.bandwidth, gpu.flops, gpu.flops32)
    for gpu in (hardware.GPUS["a100-40gb"], hardware.GPUS["h200"])
)
"""What the table's floors are for."""


_COMPOSED = (
    "`block` is a whole block's elementwise work: both residuals with their modulated norms, and GELU, without the "
    "products between them. It has no kernels of its own."
)


def block(cases: Sequence[Case], measured: dict[str, dict[str, Any]]) -> str:
    """The Markdown between the markers: floors of all cases and, for each table in `measured`, what it holds."""
    text = [
        "Each cell is forward / backward. MB (1e6 bytes) and GFLOP are the least a call must do with bf16 activations. "
        "GFLOP are those of products and transforms; elementwise arithmetic is not counted, as it takes less time than "
        "its bytes. The floors are the longest of bytes at datasheet bandwidth, FLOP at datasheet dense bf16 rate and, "
        f"for products in fp32 outside of tensor cores, at datasheet fp32 rate ({'; '.join(map(_rates, GPUS))}).",
        "",
        *([_COMPOSED, ""] if any(case.composed for case in cases) else []),
        *([] if measured else ["No GPU figures have been measured yet, so the measured columns are empty.", ""]),
    ]
    head = ["operation", "case", "MB", "GFLOP", *(f"{gpu.name} floor, µs" for gpu in GPUS)]
    columns = ["time, µs", "of ceiling", "against the best of eager, torch.compile and others named"]
    tables = list(measured.values()) or [{}]
    head += [
        f"{table['machine']['gpu']}: {column}" if table else f"measured {column}"
        for table in tables
        for column in columns
    ]
    text += [_line(head), _line(["---", "---", *["---:"] * (len(head) - 2)])]
    for case in cases:
        costs = [case.forward, case.backward]
        row = [f"`{case.operation}`", case.label]
        row += [_pair(costs, lambda c: c.bytes / 1e6), _pair(costs, lambda c: (c.flops + c.flops32) / 1e9)]
        row += [_pair(costs, lambda c, gpu=gpu: 1e6 * gpu.floor(c)) for gpu in GPUS]
        for table in tables:
            row += _measured(table.get("cases", {}).get(case.name, {}))
        text.append(_line(row))
    text += [line for table in measured.values() for line in _provenance(table)]
    return "\n".join(text)


def _rates(gpu: Rates) -> str:
    rates = f"{gpu.flops / 1e12:.0f} and {gpu.flops32 / 1e12:.3g} TFLOP/s"
    return f"{gpu.name}: {gpu.bandwidth / 1e9:.0f} GB/s, {rates}"


def _measured(figures: dict[str, Any]) -> list[str]:
    if "red" in figures:
        return [f"gate failed: {figures['red']}".replace("|", "/"), "", ""]
    passes = [figures.get(name) for name in ("forward", "backward")]
    if not passes[0]:
        return ["", "", ""]
    return [
        _pair(passes, lambda p: 1e6 * p["seconds"]["triton"][0]),
        _pair(passes, lambda p: 100 * p["share"], " %"),
        _pair(passes, lambda p: p["ratio"], "x", 2) + "".join(_named(figures)).replace("|", "/"),
    ]


def _named(figures: dict[str, Any]) -> list[str]:
    """Of each opponent beside eager and torch.compile how many times as fast we were, and which ones failed."""
    seconds = figures["forward"]["seconds"]
    others = [name for name in seconds if name not in ("triton", "eager", "compile")]
    ratios = [f"; {name} {_number(seconds[name][0] / seconds['triton'][0], 2)}x" for name in others]
    return ratios + [f"; {name}" for name in figures if name.endswith(" failed")]


def _provenance(table: dict[str, Any]) -> list[str]:
    """What a measured table was measured on, and which operations are off by default because of it."""
    machine = ", ".join(f"{name} {value}" for name, value in table["machine"].items())
    lines = ["", f"Measured: {machine}."]
    if table.get("ceilings"):
        copy, matmul, matmul32 = (table["ceilings"][name] for name in ("copy", "matmul", "matmul32"))
        lines[-1] += (
            f" Ceilings of the same run: copying {copy / 1e12:.2f} TB/s (read and written), 8192³ bf16 products "
            f"{matmul / 1e12:.0f} TFLOP/s, 4096³ fp32 products without TF32 {matmul32 / 1e12:.1f} TFLOP/s."
        )
    lines += [f"`{operation}` is off by default there: {why}." for operation, why in table.get("losses", {}).items()]
    return lines


def _pair(values: Sequence[Any], number: Any, unit: str = "", decimals: int | None = None) -> str:
    """ "47.3 / 70.9": a number of each, leaving out what is None."""
    return " / ".join(_number(number(value), decimals) + unit for value in values if value is not None)


def _number(x: float, decimals: int | None) -> str:
    """Three significant digits, unless a number of decimals is given."""
    if decimals is None:
        decimals = 0 if x >= 99.95 or x == 0 else 1 if x >= 9.995 else 2
    return f"{x:.{decimals}f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def measured_tables(folder: Path = TUNED) -> dict[str, dict[str, Any]]:
    """What the tuner left, by architecture."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("sm_*.json"))}


def replaced(text: str, new: str) -> str:
    """The text with `new` between its markers.

    Raises:
        ValueError: it hasn't exactly one pair of them.
    """
    before, *rest = text.split(BEGIN)
    if len(rest) != 1 or rest[0].count(END) != 1:
        raise ValueError(f"expected exactly one block from {BEGIN} to {END}")
    return f"{before}{BEGIN}\n{new}\n{END}{rest[0].split(END)[1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m mpdit_kernels.costs", description="Bytes, FLOP and time floor of every case")
    parser.add_argument("--update", action="store_true", help="write the table into kernels/README.md")
    parser.add_argument("--readme", type=Path, default=README, help="another file than kernels/README.md")
    parser.add_only()
    options = parser.parse_args(arguments)
    new = block(all_cases(folders=options.only, composed=True), measured_tables())
    if not options.update:
        print(new)
        return 0
    try:
        write_atomically(options.readme, replaced(options.readme.read_text(), new))
    except (OSError, ValueError) as error:
        parser.error(f"{options.readme}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
