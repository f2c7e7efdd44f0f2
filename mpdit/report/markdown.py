"""Writes results as Markdown: the whole report, and the figures in docs/benchmarks.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mpdit.core.errors import DataError
from mpdit.core.files import write_atomically
from mpdit.core.text import markdown
from mpdit.report.results import OURS, Results, Row, Spread, best_opponent, kind, ours

TITLES = {
    "step": "Training step",
    "sampling": "Sampling",
    "forward": "Forward pass",
    "block": "Transformer block",
    "kernels": "Kernels",
    "optimizer": "Optimiser and average",
    "loader": "Data loader",
}
"""Headings of the parts, in the order of the report."""
BEGIN = "<!-- performance: written by mpdit report --update -->"
END = "<!-- end of performance -->"

_LEGEND = (
    "Each figure is a median, with the 20 % and 80 % quantiles of the samples in brackets. Times ours: a contender's "
    "time over that of `ours`, turn by turn in one process, so above 1 ours is faster. `eager` and `compile` are our "
    "code on PyTorch's operators alone, as they are and under torch.compile. MFU: exact FLOPs of the model's reference "
    "graph over the datasheet's dense peak; the ceilings are copies and products measured beside them. Memory is "
    "the peak of a call of that contender alone. Gate: its error against float64 before it was timed, of the allowed."
)
_ON_CPU = (
    "**Measured on a CPU: it says nothing about a GPU.** The kernels are for GPUs; here `ours` runs their references."
)
_ABOVE = (
    "Shares above 100 %: the call was faster than what set the ceiling. It may lie in a cache, or work in place, where "
    "a copy on a CPU also reads what it overwrites; or the machine was busy when the ceiling was measured."
)
_README_LEGEND = (
    "Each figure is a median with its 20 % and 80 % quantiles. Times ours: a contender's time over ours, turn by turn "
    "in one process, so above 1 ours is faster. MFU: exact FLOPs of the model's reference graph over the datasheet's "
    "dense peak. `eager` and `compile` are our code on PyTorch's operators alone. Of the ways to run one model in our "
    "code the fastest is shown; `mpdit report` prints all."
)
_CPU_ONLY = "No GPU has been measured yet: what follows is a CPU's, and says nothing about a GPU."


def report(results: Sequence[Results], plots: Mapping[Path, Sequence[tuple[str, str]]] | None = None) -> str:
    """Return Markdown of all figures of these files.

    Args:
        plots: each file's pictures as (title, path to link to).
    """
    blocks = ["# Performance", _LEGEND]
    for found in results:
        blocks += [f"## {found.place}, {found.date}", _provenance(found)]
        if not found.on_gpu:
            blocks.append(_ON_CPU)
        absent = [TITLES[part].lower() for part in TITLES if not found.of(part)]
        if absent:
            blocks.append(f"Not measured: {', '.join(absent)}.")
        blocks += [f"![{title}]({path})" for title, path in (plots or {}).get(found.path, ())]
        for part, title in TITLES.items():
            if not (cases := found.cases(part)):
                continue
            blocks.append(f"### {title}")
            if part == "kernels":
                blocks.append(_kernel_table(cases))
            else:
                for case, rows in cases.items():
                    blocks += [f"{case}:", _case_table(rows)]
        if found.skipped:
            lines = (f"- {case}, {variant}: {reason}" for (_, case, variant), reason in found.skipped.items())
            blocks += ["### Not timed", "\n".join(lines)]
    return "\n\n".join(blocks) + "\n"


def performance_block(results: Sequence[Results]) -> str:
    """Return the newest figures of each machine; a CPU's only where no GPU has any."""
    if not any(r.rows for r in results):
        return "No GPU has been measured yet."
    blocks = [] if any(r.rows for r in results if r.on_gpu) else [_CPU_ONLY]
    for part, title in (("step", "Training step, the largest batch of each model"), ("sampling", "Sampling")):
        if chosen := _newest(results, part):
            cases = [r.largest(part) if part == "step" else r.cases(part) for r in chosen]
            blocks += [_caption(title, chosen), _model_table(chosen, cases)]
    if chosen := [r for r in _newest(results, "kernels") if r.on_gpu]:
        title = "Kernels, by operation: geometric mean over its calls, least and most"
        blocks += [_caption(title, chosen), _operation_table(chosen)]
    return "\n\n".join([*blocks, _README_LEGEND])


def update_readme(path: Path, results: Sequence[Results]) -> bool:
    """Put the block between the markers of a page; return False when it was there already.

    DataError when there is not exactly one pair of markers.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; give the page to update: `mpdit report --update FILE`")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text ({error}): give the page to update") from error
    before, *rest = text.split(BEGIN)
    if len(rest) != 1 or text.count(END) != 1 or END not in rest[0]:
        raise DataError(f"{path}: has not exactly one block from {BEGIN} to {END}; put both markers where it is to be")
    new = f"{before}{BEGIN}\n{performance_block(results)}\n{END}{rest[0].split(END)[1]}"
    if new != text:
        write_atomically(path, new)
    return new != text


def variant_name(row: Row, rows: Sequence[Row]) -> str:
    """Return a variant's name, with its precision where that is not ours'."""
    own = ours(rows)
    return row.variant if own is None or own.dtype == row.dtype else f"{row.variant} ({row.dtype})"


def number(value: float) -> str:
    """Return three significant digits, and all those before the point."""
    decimals = next((d for d, least in enumerate((99.95, 9.995, 0.9995)) if value >= least), 3)
    return f"{value:.{decimals}f}"


def seconds(value: float) -> str:
    """Return seconds in the unit that suits them: "4.12 ms"."""
    factor, unit = _unit(value)
    return f"{number(factor * value)} {unit}"


def rate(value: float, unit: str) -> str:
    """Return "4.80 TB/s" of 4.8e12 and "B/s"."""
    prefix, factor = next(((name, size) for name, size in (("T", 1e12), ("G", 1e9)) if value >= size), ("M", 1e6))
    return f"{number(value / factor)} {prefix}{unit}"


def spread(values: Spread | None, show: Callable[[float], str] = number, factor: float = 1, unit: str = "") -> str:
    """Return "4.12 (4.10 - 4.15) ms"; nothing for None."""
    if values is None:
        return ""
    median, low, high = (show(factor * value) for value in (values.median, values.q20, values.q80))
    return f"{median} ({low} - {high}){unit and ' ' + unit}"


def times(values: Spread) -> str:
    """Return seconds with their spread, in the unit that suits the median."""
    return spread(values, number, *_unit(values.median))


def _unit(value: float) -> tuple[float, str]:
    return next(((factor, name) for factor, name in ((1.0, "s"), (1e3, "ms")) if value * factor >= 1), (1e6, "µs"))


def _ratios(values: Spread | None) -> str:
    return spread(values, lambda x: f"{x:.2f}")


def _shares(values: Spread | None) -> str:
    return spread(values, lambda x: f"{x:.1f}", 100, "%")


def _gigabytes(value: float | None) -> str:
    return "" if value is None else f"{number(value / 1e9)} GB"


def _case_table(rows: Sequence[Row]) -> str:
    """Return every variant of one case."""
    head = ("contender", "time of a call", "per second", "times ours", "MFU", "of matmul ceiling", "of copy ceiling",
            "allocated", "reserved", "gate")  # fmt: skip
    lines = []
    for row in rows:
        gate = row.gate or {}
        passed = f"{gate['error']:.1e} of {gate['allowed']:.1e}" if "error" in gate else ""
        lines.append([
            variant_name(row, rows), times(row.seconds), spread(row.images_per_second), _ratios(row.ratio),
            _shares(row.mfu), _shares(row.of_ceiling), _shares(row.of_copy),
            _gigabytes(row.allocated), _gigabytes(row.reserved), "same" if gate.get("same") else passed,
        ])  # fmt: skip
    return markdown(head, lines).rstrip()


def _kernel_table(cases: dict[str, list[Row]]) -> str:
    """Return a line a case: our time and its share of what the machine can do, then each opponent's time over ours."""
    variants = dict.fromkeys(row.variant for rows in cases.values() for row in rows if row.variant != OURS)
    head = ["call", "ours", "of copy ceiling", "of matmul ceiling", *(f"{name} / ours" for name in variants)]
    lines = []
    for case, rows in cases.items():
        own = ours(rows)
        first = ["", "", ""] if own is None else [times(own.seconds), _shares(own.of_copy), _shares(own.of_ceiling)]
        shown = {row.variant: _ratios(row.ratio) or times(row.seconds) for row in rows}
        lines.append([case, *first, *(shown.get(name, "") for name in variants)])
    return markdown(head, lines).rstrip()


def _model_table(results: Sequence[Results], cases: Sequence[dict[str, list[Row]]]) -> str:
    """Return the fastest of each kind of variant in these cases; the machine is named where there are several files."""
    head = ("machine", "case", "contender", "images/s", "times ours", "MFU", "peak memory")
    lines: list[list[str]] = []
    for found, chosen in zip(results, cases, strict=True):
        machine = found.place if len(results) > 1 else ""
        for case, rows in chosen.items():
            first, best = len(lines), dict[str, Row]()
            for row in rows:
                name = kind(row.variant)
                best[name] = min(best.get(name, row), row, key=lambda row: row.seconds.median)
            lines += [
                ["", "", variant_name(row, rows), spread(row.images_per_second), _ratios(row.ratio), _shares(row.mfu),
                 _gigabytes(row.allocated)]
                for row in best.values()
            ]  # fmt: skip
            for (_, where, name), reason in found.skipped.items():
                if where == case and kind(name) not in best:  # no other of its kind was timed
                    lines.append(["", "", name, reason, "", "", ""])
            lines[first][:2] = machine, case
    return markdown(head, lines, left=3).rstrip()


def _operation_table(results: Sequence[Results]) -> str:
    """Return a line an operation: its calls' speed against the best opponent, and how near they are to the ceilings."""
    head = ("machine", "operation", "calls", "times as fast as the best opponent", "of its nearer ceiling")
    lines = []
    for found in results:
        cases = found.cases("kernels").values()
        for name in dict.fromkeys(rows[0].operation for rows in cases):
            chosen = [rows for rows in cases if rows[0].operation == name]
            best = [best_opponent(rows) for rows in chosen]
            gains = [row.ratio.median for row in best if row is not None and row.ratio is not None]
            shares = [(own.of_copy, own.of_ceiling) for own in map(ours, chosen) if own]
            near = [max(share.median for share in pair if share) for pair in shares if any(pair)]
            machine = found.place if len(results) > 1 else ""
            cells = _mean_and_range(gains, lambda x: f"{x:.2f}"), _mean_and_range(near, lambda x: f"{100 * x:.0f} %")
            lines.append([machine, f"`{name}`", str(len(chosen)), *cells])
    return markdown(head, lines, left=2).rstrip()


def _mean_and_range(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Return the geometric mean, the least and the most."""
    if not values:
        return ""
    mean = math.exp(sum(map(math.log, values)) / len(values))
    return f"{show(mean)} ({show(min(values))} - {show(max(values))})"


def _newest(results: Sequence[Results], part: str) -> list[Results]:
    """Return of each machine the newest file with this part; those of GPUs, or where there are none those of CPUs."""
    having = [r for r in results if r.of(part)]
    having = [r for r in having if r.on_gpu] or having
    latest = {(r.hardware, r.memory_limit): r for r in sorted(having, key=lambda r: (r.date, r.time))}
    return list(latest.values())


def _caption(title: str, results: Sequence[Results]) -> str:
    machines = "; ".join(f"{r.place}, {r.date}, torch {r.machine['torch']}" for r in results)
    return f"**{title}.** {machines}:"


def _provenance(results: Results) -> str:
    """Return where the figures come from: file, code, machine, ceilings and datasheet."""
    machine = ", ".join(f"{name} {value}" for name, value in results.machine.items() if name != "date")
    commit = f", commit {results.commit}" if results.commit else ""
    words = [f"From `{results.path.name}`{commit}: {machine}."]
    if found := results.ceilings:
        words.append(
            f"Ceilings, the highest measured beside these: copies {rate(found['copy'], 'B/s')} (read and written), "
            f"products {rate(found['matmul'], 'FLOP/s')} in bf16 and {rate(found['matmul32'], 'FLOP/s')} in fp32."
        )
    if peaks := results.peaks:
        words.append(
            f"Datasheet ({peaks['source']}): {rate(peaks['bandwidth'], 'B/s')}, {rate(peaks['bf16'], 'FLOP/s')} in "
            f"bf16 and {rate(peaks['fp32'], 'FLOP/s')} in fp32."
        )
    if any(share.median > 1 for row in results.rows for share in (row.of_copy, row.of_ceiling) if share):
        words.append(_ABOVE)
    return " ".join(words)
