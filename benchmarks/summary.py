"""What a run found, as text: one table a case."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpdit.core.table import aligned
from mpdit.report.results import RATES

Row = dict[str, Any]

HEAD = ("way", "median", "20 % - 80 %", "images/s", "times ours", "MFU", "of matmul", "of copy", "memory", "reserved")


def tables(benchmarks: Sequence[Row], mpdit: Row) -> str:
    """Rows of a results file by case; "times ours" above 1 means that ours is faster. Empty columns are left out."""
    infos = [row["extra_info"] for row in benchmarks]
    blocks = [_ceilings(mpdit)]
    for case in dict.fromkeys(info["case"] for info in infos):
        rows = [_cells(info, mpdit) for info in infos if info["case"] == case]
        used = [index for index in range(len(HEAD)) if any(row[index] for row in rows)]
        blocks.append(f"{case}\n{aligned([[row[index] for index in used] for row in (HEAD, *rows)])}")
    if mpdit["skipped"]:
        lines = [f"{entry['case']}, {entry['way']}: {entry['reason']}" for entry in mpdit["skipped"]]
        blocks.append("\n".join(["not timed", *lines]))
    return "\n\n".join(blocks)


def _ceilings(mpdit: Row) -> str:
    found, machine, peaks = mpdit["ceilings"], mpdit["machine"], mpdit["peaks"]
    name = machine["gpu"] if mpdit["device"] == "cuda" else f"{machine['cpu']}, {machine['threads']} threads"
    words = [f"{name}, torch {machine['torch']}"]
    if found:
        words.append(f"copies {found['copy'] / 1e9:.0f} GB/s")
        words.append(
            f"multiplies bf16 at {found['matmul'] / 1e12:.3g} and fp32 at {found['matmul32'] / 1e12:.3g} TFLOP/s"
        )
    if peaks:
        words.append(f"datasheet {peaks['bf16'] / 1e12:.4g} TFLOP/s bf16, {peaks['bandwidth'] / 1e9:.0f} GB/s")
    return "; ".join(words)


def _cells(info: Row, mpdit: Row) -> list[str]:
    seconds, ratio, memory = info["seconds"], info["ratio"], info["memory"]
    images = info["images"]
    return [
        info["way"],
        _time(seconds["median"]),
        f"{_time(seconds['q20'])} - {_time(seconds['q80'])}",
        f"{images / seconds['median']:.4g}" if images else "",
        f"{ratio['median']:.2f} ({ratio['q20']:.2f} - {ratio['q80']:.2f})" if ratio else "",
        _share(info["flops"], seconds, (mpdit["peaks"] or {}).get(RATES.get(info["dtype"], ("", ""))[0])),
        _share(info["flops"], seconds, (mpdit["ceilings"] or {}).get(RATES.get(info["dtype"], ("", ""))[1])),
        _share(info["bytes"], seconds, (mpdit["ceilings"] or {}).get("copy")),
        f"{memory['allocated'] / 1e9:.2f} GB" if memory else "",
        f"{memory['reserved'] / 1e9:.2f} GB" if memory else "",
    ]


def _share(work: float | None, seconds: Row, rate: float | None) -> str:
    return f"{work / seconds['median'] / rate:.1%}" if work and rate else ""


def _time(seconds: float) -> str:
    unit, factor = next((pair for pair in (("s", 1), ("ms", 1e3)) if seconds * pair[1] >= 1), ("us", 1e6))
    return f"{seconds * factor:.4g} {unit}"
