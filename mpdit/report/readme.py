"""The figures in docs/benchmarks.md, written from committed results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mpdit.core.errors import DataError
from mpdit.core.files import write_atomically
from mpdit.report.choose import largest, newest
from mpdit.report.results import Results
from mpdit.report.tables import model_table, operation_table, place

BEGIN = "<!-- performance: written by mpdit report --update -->"
END = "<!-- end of performance -->"
_MODELS = (("step", "Training step, the largest batch of each model"), ("sampling", "Sampling"))


def performance_block(results: Sequence[Results]) -> str:
    """The Markdown between the markers, of the newest figures of each machine; a CPU's only where no GPU has any."""
    if not any(r.rows for r in results):
        return "No GPU has been measured yet."
    blocks = [] if any(r.rows for r in results if r.on_gpu) else [_CPU_ONLY]
    for part, title in _MODELS:
        if chosen := newest(results, part):
            cases = [largest(r, part) if part == "step" else r.cases(part) for r in chosen]
            blocks += [_caption(title, chosen), model_table(chosen, cases).rstrip()]
    if chosen := [r for r in newest(results, "kernels") if r.on_gpu]:
        blocks += [
            _caption("Kernels, by operation: geometric mean over its calls, least and most", chosen),
            operation_table(chosen).rstrip(),
        ]
    return "\n\n".join([*blocks, _LEGEND])


_LEGEND = (
    "Each figure is a median with its 20 % and 80 % quantiles. Times ours: a contender's time over ours, turn by turn "
    "in one process, so above 1 ours is faster. MFU: exact FLOPs of the model's reference graph over the datasheet's "
    "dense peak. `eager` and `compile` are our code on PyTorch's operators alone. Of the ways to run one model in our "
    "code the fastest is shown; `mpdit report` prints all."
)
_CPU_ONLY = "No GPU has been measured yet: what follows is a CPU's, and says nothing about a GPU."


def update_readme(path: Path, results: Sequence[Results]) -> bool:
    """Put the block between the markers of a page; False when it was there already.

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


def _caption(title: str, results: Sequence[Results]) -> str:
    machines = "; ".join(f"{place(r)}, {r.date}, torch {r.machine['torch']}" for r in results)
    return f"**{title}.** {machines}:"
