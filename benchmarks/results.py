"""Writes the results file: pytest-benchmark's JSON with an object "mpdit" and rows whose extra_info can be compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import OURS, Case, Outcome
from mpdit_kernels.hardware import find_gpu
from tools.timing import Times

from mpdit.core.files import write_atomically
from mpdit.report.results import PARTS

SAME = ("gpu", "cpu", "threads", "torch", "triton", "python", "driver", "power limit", "highest sm clock")
"""Of a machine: figures are merged only where these agree."""

Json = dict[str, Any]


def extra_info(case: Case, variant: str, outcome: Outcome) -> Json:
    """Return what a row says beyond pytest-benchmark's statistics."""
    group = case.group(variant)
    return {
        "part": case.part,
        "case": case.name,
        "way": variant,
        "model": group.model,
        "images": case.images,
        "flops": group.flops,
        "bytes": group.bytes,
        "dtype": group.dtype,
        "seconds": _spread(outcome.samples),
        "ratio": None if outcome.ratios is None else {"to": OURS, **_spread(outcome.ratios)},
        "memory": outcome.memory,
        "gate": outcome.gate,
    }


def _spread(values: Sequence[float]) -> Json:
    times = Times.of(values)
    return {"median": times.median, "q20": times.low, "q80": times.high}


def peaks(gpu: str) -> Json | None:
    """Return the datasheet's limits of a GPU by its driver's name; None where we have none."""
    found = find_gpu(gpu)
    if found is None:
        return None
    return {"bf16": found.flops, "fp32": found.flops32, "bandwidth": found.bandwidth, "source": found.source}


def save(folder: Path, new: Json) -> Path:
    """Merge a run into its day's and machine's file, or into a new one where machine or versions differ."""
    info = new["mpdit"]
    gpu = info["machine"]["gpu"]
    known = find_gpu(gpu)
    name = "cpu" if info["device"] == "cpu" else known.key if known else "-".join(gpu.lower().split())
    if info["memory_limit_gb"] is not None:
        name += f"-limit{info['memory_limit_gb']:g}"
    folder.mkdir(parents=True, exist_ok=True)
    for count in range(1, 100):
        path = folder / f"{info['date']}-{name}{'' if count == 1 else f'-{count}'}.json"
        old = json.loads(path.read_text()) if path.exists() else None
        if old is None or all(old["mpdit"]["machine"].get(field) == info["machine"].get(field) for field in SAME):
            write_atomically(path, json.dumps(merge(old, new) if old else new, indent=1) + "\n")
            return path
    raise RuntimeError(f"{folder} holds 99 files of {info['date']}-{name}: remove some")


def merge(old: Json, new: Json) -> Json:
    """Return `new`, and those rows and skips of `old` whose variant was not tried again.

    Rows are in the order of PARTS, each part's by case as first seen, so that a row that was measured again stays with
    its case. The head is the new run's, and each ceiling the highest that was measured.
    """

    def key(entry: Json) -> tuple[str, str, str]:
        return entry["part"], entry["case"], entry["way"]

    tried = {key(entry) for entry in (*(row["extra_info"] for row in new["benchmarks"]), *new["mpdit"]["skipped"])}
    rows = [row for row in old["benchmarks"] if key(row["extra_info"]) not in tried] + new["benchmarks"]
    order = {case: place for place, case in enumerate(dict.fromkeys(row["extra_info"]["case"] for row in rows))}
    rows.sort(key=lambda row: (PARTS.index(row["extra_info"]["part"]), order[row["extra_info"]["case"]]))
    measured = {row["extra_info"]["part"] for row in rows}
    before, now = old["mpdit"], new["mpdit"]
    merged = {
        "skipped": [entry for entry in before["skipped"] if key(entry) not in tried] + now["skipped"],
        "ceilings": {name: max(before["ceilings"][name], value) for name, value in now["ceilings"].items()},
        "parts": [part for part in PARTS if part in measured],
    }
    return new | {"benchmarks": rows, "mpdit": now | merged}
