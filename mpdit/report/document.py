"""The whole report: every figure of the results files, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mpdit.report.results import Results
from mpdit.report.tables import case_table, kernel_table, place, skipped_list
from mpdit.report.words import line, rate

TITLES = {
    "step": "Training step",
    "sampling": "Sampling",
    "forward": "Forward pass",
    "block": "Transformer block",
    "kernels": "Kernels",
    "optimizer": "Optimiser and average",
    "loader": "Data loader",
}
"""Of the parts, in the order of the report."""

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


def report(results: Sequence[Results], plots: Mapping[Path, Sequence[tuple[str, str]]] | None = None) -> str:
    """Markdown of these files; `plots` gives each file's pictures as (title, path to link to)."""
    sections = [_section(r, (plots or {}).get(r.path, ())) for r in results]
    return "\n".join([line("# Performance"), line(_LEGEND), *sections]).rstrip() + "\n"


def _section(results: Results, plots: Sequence[tuple[str, str]]) -> str:
    blocks = [line(f"## {place(results)}, {results.date}"), line(_provenance(results))]
    if not results.on_gpu:
        blocks.append(line(_ON_CPU))
    absent = [TITLES[part].lower() for part in TITLES if not results.of(part)]
    if absent:
        blocks.append(line(f"Not measured: {', '.join(absent)}."))
    blocks += [line(f"![{title}]({path})") for title, path in plots]
    for part, title in TITLES.items():
        cases = results.cases(part)
        if not cases:
            continue
        blocks.append(line(f"### {title}"))
        if part == "kernels":
            blocks.append(kernel_table(cases))
        else:
            blocks += [line(f"{case}:") + line("") + case_table(rows) for case, rows in cases.items()]
    if results.skipped:
        blocks.append(line("### Not timed") + line("") + skipped_list(results.skipped))
    return "\n".join(blocks)


def _provenance(results: Results) -> str:
    """Where the figures come from: file, code, machine, ceilings and datasheet."""
    machine = ", ".join(f"{name} {value}" for name, value in results.machine.items() if name != "date")
    commit = f", commit {results.commit}" if results.commit else ""
    words = [f"From `{results.path.name}`{commit}: {machine}."]
    if results.ceilings:
        copy, matmul, matmul32 = (results.ceilings[name] for name in ("copy", "matmul", "matmul32"))
        words.append(
            f"Ceilings, the highest measured beside these: copies {rate(copy, 'B/s')} (read and written), products "
            f"{rate(matmul, 'FLOP/s')} in bf16 and {rate(matmul32, 'FLOP/s')} in fp32."
        )
    if results.peaks:
        bf16, fp32, bandwidth = (results.peaks[name] for name in ("bf16", "fp32", "bandwidth"))
        words.append(
            f"Datasheet ({results.peaks['source']}): {rate(bandwidth, 'B/s')}, {rate(bf16, 'FLOP/s')} in bf16 and "
            f"{rate(fp32, 'FLOP/s')} in fp32."
        )
    if any(share.median > 1 for row in results.rows for share in (row.of_copy, row.of_ceiling) if share):
        words.append(_ABOVE)
    return " ".join(words)
