"""Calibrates the planner by measured steps: python -m mpdit.planning.calibrate [RESULTS ...]

Prints measured beside predicted times of every training step in the results (those in benchmarks/results by default).
With --update writes measured.json, which the planner reads: for each GPU the shares of its datasheet that products and
copies reached in the same run, the factor between roofline and the large steps, and the largest error left among them.
Results that are named replace their GPUs' entries alone. Exit codes: 0, 2 bad input.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpdit_kernels.hardware import Gpu, find_gpu

from mpdit.core.errors import DataError, UserError
from mpdit.core.files import write_atomically
from mpdit.core.parser import to_path
from mpdit.core.text import aligned
from mpdit.model.presets import PRESETS
from mpdit.planning.time import ATTENTION, LINK, MEASURED, Efficiency, measured, step_time
from mpdit.report.results import OURS, Results, read_results

RESULTS = Path("benchmarks", "results")
LEAST_ERROR = 0.05
"""No prediction is called better than this."""
LEAST_STEP = 0.2
"""Least share of the longest step's roofline that counts: shorter ones are bound by launches."""


@dataclass(frozen=True)
class Step:
    """A measured training step of our code, seconds, beside the roofline's."""

    model: str
    images: int
    measured: float
    roofline: float


def calibrate(results: Results) -> tuple[Gpu, Efficiency, list[Step]] | None:
    """Return the device, its efficiency, and the steps it was taken from; None where no step of our code was measured.

    A device without a datasheet, such as a CPU, goes by the ceilings measured in the same run.
    """
    name, ceilings = str(results.machine["gpu" if results.on_gpu else "cpu"]), results.ceilings
    if ceilings is None:
        return None
    copy, matmul, matmul32 = (ceilings[name] for name in ("copy", "matmul", "matmul32"))
    gpu = find_gpu(name) if results.on_gpu else None
    gpu = gpu or Gpu(name, name, 0.0, copy, matmul, matmul32, (0, 0), 0.0, "measured ceilings")
    products = matmul / gpu.flops
    share = Efficiency(products, ATTENTION * products, copy / gpu.bandwidth, LINK, 1.0, 0.0, "")
    if not results.on_gpu:  # fp32 products, at the rate measured for them
        share = dataclasses.replace(share, matmul=1.0, attention=ATTENTION)
    # The fastest variant of our code on each model and batch; variants on another model bear its name.
    fastest: dict[tuple[str, int], tuple[float, str]] = {}
    for row in results.of("step"):
        if row.variant.partition(",")[0] in (OURS, *PRESETS) and row.model is not None and row.images is not None:
            found = row.seconds.median, row.dtype
            fastest[row.model, row.images] = min(fastest.get((row.model, row.images), found), found)
    steps = [
        Step(model, images, seconds, step_time(PRESETS[model], gpu, share, images, dtype=dtype).total)
        for (model, images), (seconds, dtype) in fastest.items()
    ]
    if not steps:
        return None
    longest = max(step.roofline for step in steps)
    large = [step for step in steps if step.roofline >= LEAST_STEP * longest]
    # The median step sets what a whole step takes over its roofline, the one farthest from it the error.
    factor = statistics.median(step.measured / step.roofline for step in large)
    error = max(abs(step.measured / (factor * step.roofline) - 1) for step in large)
    source = (
        f"{len(large)} large steps on {results.hardware}, {results.date}: products at {products:.0%} of the "
        f"datasheet, copies at {share.bandwidth:.0%}, a whole step {factor:.2f} times its roofline; links at 70 % are "
        "assumed"
    )
    share = dataclasses.replace(share, step=factor, error=max(error, LEAST_ERROR), source=source, measured=True)
    return gpu, share, steps


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m mpdit.planning.calibrate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", nargs="*", type=to_path, metavar="RESULTS", help=f"(default: all in {RESULTS})")
    parser.add_argument("--update", action="store_true", help="write what the planner reads")
    options = parser.parse_args(arguments)
    try:
        paths = options.results or sorted(RESULTS.glob("*.json"))
        if not paths:
            raise DataError(f"no results files in {RESULTS}: give some")
        gpus = measured() if options.results else {}
        for path in paths:
            found = calibrate(results := read_results(path))
            print(f"{path}, {results.hardware}: {'no step of our code in it' if found is None else found[1].source}")
            if found is not None:
                print(_table(found[1], found[2]))
                if results.on_gpu and find_gpu(found[0].key):
                    gpus[found[0].key] = dataclasses.asdict(found[1])
        if options.update:
            write_atomically(MEASURED, json.dumps({"gpus": gpus}, indent=1) + "\n")
            print(f"written to {MEASURED}: {', '.join(gpus) or 'no GPU'}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _table(share: Efficiency, steps: Sequence[Step]) -> str:
    rows = [("model", "images", "measured, ms", "predicted, ms", "off by")]
    for step in steps:
        predicted = share.step * step.roofline
        times = (f"{1e3 * step.measured:.1f}", f"{1e3 * predicted:.1f}", f"{predicted / step.measured - 1:+.0%}")
        rows.append((step.model, str(step.images), *times))
    return aligned(rows)


if __name__ == "__main__":
    sys.exit(main())
