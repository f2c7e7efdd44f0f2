"""The results file: pytest-benchmark's JSON with an object "mpdit" and rows whose extra_info can be compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
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


def extra_info(case: Case, way: str, outcome: Outcome) -> Json:
    """What a row says beyond pytest-benchmark's statistics."""
    team = case.team(way)
    ratio = None if outcome.ratios is None else {"to": OURS, **_spread(outcome.ratios)}
    return {
        "part": case.part,
        "case": case.name,
        "way": way,
        "model": team.model,
        "images": case.images,
        "flops": team.flops,
        "bytes": team.bytes,
        "dtype": team.dtype,
        "seconds": _spread(outcome.samples),
        "ratio": ratio,
        "memory": outcome.memory,
        "gate": outcome.gate,
    }


def skip(case: Case, way: str, reason: str) -> Json:
    return {"part": case.part, "case": case.name, "way": way, "reason": reason}


def peaks(gpu: str) -> Json | None:
    """The datasheet's limits of a GPU by its driver's name; None where we have none."""
    found = find_gpu(gpu)
    if found is None:
        return None
    return {"bf16": found.flops, "fp32": found.flops32, "bandwidth": found.bandwidth, "source": found.source}


def _spread(values: Sequence[float]) -> Json:
    times = Times.of(values)
    return {"median": times.median, "q20": times.low, "q80": times.high}


@dataclass(frozen=True)
class Journal:
    """Finished figures, a line each as soon as there are any: what is left of a run that is killed.

    The first line is the head of the results file; every other holds one row ("benchmark") or one entry of "skipped".
    """

    path: Path

    def start(self, head: Json) -> None:
        self.path.write_text("")
        self._add({"head": head})

    def row(self, benchmark: Json) -> None:
        self._add({"benchmark": benchmark})

    def skip(self, entry: Json) -> None:
        self._add({"skipped": entry})

    def _add(self, line: Json) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def read(self) -> Json | None:
        """The results file of what is there; None when the run did not come as far as its head."""
        result: Json | None = None
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:  # the line that was being written when the run was killed
                break
            if "head" in entry:
                result = entry["head"] | {"benchmarks": []}
            elif result is not None and "benchmark" in entry:
                result["benchmarks"].append(entry["benchmark"])
            elif result is not None:
                result["mpdit"]["skipped"].append(entry["skipped"])
        return result


def merge(old: Json | None, new: Json) -> Json:
    """`new`, and those rows and skips of `old` whose contender was not tried again.

    Rows are in the order of PARTS, each part's as it was run. The head is the new run's, and each ceiling the highest
    that was measured.
    """
    if old is None:
        return new
    tried = {_key(entry) for entry in _entries(new)}
    rows = [row for row in old["benchmarks"] if _key(row["extra_info"]) not in tried]
    skipped = [entry for entry in old["mpdit"]["skipped"] if _key(entry) not in tried]
    merged = new | {"benchmarks": _ordered([*rows, *new["benchmarks"]])}
    parts = {row["extra_info"]["part"] for row in merged["benchmarks"]}
    ceilings = {name: max(old["mpdit"]["ceilings"][name], value) for name, value in new["mpdit"]["ceilings"].items()}
    mpdit = new["mpdit"] | {"skipped": [*skipped, *new["mpdit"]["skipped"]], "ceilings": ceilings}
    return merged | {"mpdit": mpdit | {"parts": [part for part in PARTS if part in parts]}}


def _entries(result: Json) -> list[Json]:
    return [*(row["extra_info"] for row in result["benchmarks"]), *result["mpdit"]["skipped"]]


def _key(entry: Json) -> tuple[str, str, str]:
    return entry["part"], entry["case"], entry["way"]


def _ordered(rows: list[Json]) -> list[Json]:
    """By part, then case as first seen, then way: a contender's row that was measured again stays with its case."""
    cases = list(dict.fromkeys(row["extra_info"]["case"] for row in rows))
    return sorted(
        rows, key=lambda row: (PARTS.index(row["extra_info"]["part"]), cases.index(row["extra_info"]["case"]))
    )


def save(folder: Path, new: Json) -> Path:
    """Merge a run into its day's and machine's file, or into a new one where machine or versions differ."""
    info = new["mpdit"]
    name = "cpu" if info["device"] == "cpu" else _short(info["machine"]["gpu"])
    if info["memory_limit_gb"] is not None:
        name += f"-limit{info['memory_limit_gb']:g}"
    for count in range(1, 100):
        path = folder / f"{info['date']}-{name}{'' if count == 1 else f'-{count}'}.json"
        old = json.loads(path.read_text()) if path.exists() else None
        if old is None or _same(old["mpdit"], info):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(merge(old, new), indent=1) + "\n")
            return path
    raise RuntimeError(f"{folder} holds 99 files of {info['date']}-{name}: remove some")


def _same(one: Json, other: Json) -> bool:
    return all(one["machine"].get(name) == other["machine"].get(name) for name in SAME)


def _short(gpu: str) -> str:
    """For a file's name: "h200" of "NVIDIA H200", else the driver's name in lower case with hyphens."""
    found = find_gpu(gpu)
    return found.key if found else "-".join(gpu.lower().split())
