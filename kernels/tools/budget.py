"""python -m tools.budget: compile every kernel ahead of time and hold it to what was committed.

Needs no GPU. Each case's launches, in bf16, are compiled for A100 (sm_80) and H100 or H200 (sm_90); registers, spills,
shared memory, widths of loads and matrix instructions are compared with budget.json. Exit codes: 0 within budget,
1 over it, 2 bad usage.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mpdit_kernels.dispatch import SHARED_LIMITS, TRITON_INSTALLED, interpreting

from tools.cases import OPERATIONS, Case, all_cases
from tools.command import Parser, aligned, write_atomically

BUDGET = Path(__file__).parent / "budget.json"
MATRIX = ("", "mma", "wgmma")
"""Kinds of matrix instructions, from worst to best."""
UPDATE = "python -m tools.budget --update"

Budget = dict[str, dict[str, Any]]
"""From CompiledKernel.key to what was measured, with the version of Triton."""


@dataclass
class CompiledKernel:
    """One kernel of one case, compiled for one architecture; `problems` is what judging found.

    `usage` is an ahead.Usage, or the error that compiling ended with.
    """

    case: str
    kernel: str
    arch: str
    config: str
    usage: Any
    problems: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Return its name in the budget."""
        return " | ".join((self.case, self.kernel, self.arch))

    def entry(self, triton_version: str) -> dict[str, Any]:
        """Return what the budget holds of it."""
        used = self.usage
        moves = [*used.loads.items(), *used.stores.items()]
        wide = sum(width * count for width, count in moves if width >= 16)
        return {
            "registers": used.registers,
            "spills": used.spills,
            "shared": used.shared,
            "load": max(used.loads, default=0),
            "wide": round(100 * wide / max(1, sum(width * count for width, count in moves))),
            "matrix": used.products,
            "triton": triton_version,
        }


def measure(cases: Sequence[Case], archs: Sequence[str]) -> list[CompiledKernel]:
    """Record and compile every launch of the cases; equal launches within a case are one row."""
    from tools import ahead
    from tools.measure import launches

    rows, jobs = [], []
    for case in cases:
        for arch in archs:
            seen: dict[str, list[str]] = {}
            for recorded in launches(case, arch, torch.bfloat16):
                # "adaln.forward" for the kernel _forward of mpdit_kernels.adaln.triton_impl
                function = recorded.kernel.fn
                name = ".".join([*function.__module__.split(".")[-2:-1], function.__name__.lstrip("_")])
                variants, form = seen.setdefault(name, []), ahead.form(recorded, arch)
                if form in variants:
                    continue
                variants.append(form)
                sizes = [f"{key}={value}" for key, value in recorded.constants.items() if type(value) is int]
                number = f" {len(variants)}" if len(variants) > 1 else ""
                rows.append(CompiledKernel(case.name, name + number, arch, " ".join(sizes), None))
                jobs.append((recorded, arch))
    for row, used in zip(rows, ahead.usages(jobs), strict=True):
        row.usage = used
    return rows


def judge(rows: Sequence[CompiledKernel], budget: Budget, in_scope: Callable[[str], bool], version: str) -> list[str]:
    """Write each row's problems into it; returns the budget's keys in scope that no kernel answers to."""
    for row in rows:
        row.problems = list(_problems(row, budget.get(row.key), version))
    return sorted(set(filter(in_scope, budget)) - {row.key for row in rows})


def _problems(row: CompiledKernel, allowed: dict[str, Any] | None, version: str) -> Iterator[str]:
    if isinstance(row.usage, str):
        yield f"does not compile: {row.usage}"
        return
    used, limit = row.entry(version), SHARED_LIMITS[row.arch]
    now = f"(now {row.config})" if row.config else ""
    if used["spills"]:
        yield f"spills {used['spills']} bytes a thread: take a smaller tile or more warps {now}"
    if used["shared"] > limit:
        yield (
            f"takes {used['shared']} bytes of shared memory where {row.arch} has {limit}: "
            f"take fewer stages or a smaller tile {now}"
        )
    if allowed is None:
        yield f"is not in the budget: {UPDATE}"
        return
    if allowed["load"] >= 16 > used["load"]:
        yield (
            f"loads {used['load']} bytes at a time where the budget has {allowed['load']}: the compiler must see "
            "strides divisible by 16 and neighbouring columns (tl.multiple_of, a constant width)"
        )
    kind, wanted = _best(used["matrix"]), _best(allowed["matrix"])
    if MATRIX.index(kind) < MATRIX.index(wanted):
        yield (
            f"has {f'only {kind}' if kind else 'no matrix'} instructions where the budget has {wanted}: tl.dot needs "
            f"tiles of at least 16, wgmma 64 rows and four warps {now}"
        )
    if allowed["triton"] != version:  # under another Triton registers may differ
        return
    for name, unit, remedy in (
        ("registers", "a thread", "a smaller tile or more warps take fewer"),
        ("shared", "bytes", "fewer stages or a smaller tile take less"),
    ):
        if used[name] > allowed[name]:
            yield f"{name} {used[name]} {unit}, budget {allowed[name]}: {remedy} {now}; if meant: {UPDATE}"
    if used["wide"] < allowed["wide"]:
        yield (
            f"moves {used['wide']} % of its bytes 16 at a time, budget {allowed['wide']} %: look for a stride that is "
            f"no multiple of 16 or a mask along columns; if meant: {UPDATE}"
        )


def _best(products: dict[str, int]) -> str:
    return max(products, key=MATRIX.index, default="")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m tools.budget", description="Hold compiled kernels to budget.json")
    parser.add_argument("--arch", nargs="+", default=[*SHARED_LIMITS], choices=[*SHARED_LIMITS], metavar="ARCH",
                        help=f"architectures, of: {', '.join(SHARED_LIMITS)}")  # fmt: skip
    parser.add_argument("--update", action="store_true", help="write what is measured into budget.json")
    parser.add_argument("--budget", type=Path, default=BUDGET, help="another file than the committed one")
    parser.add_only()
    options = parser.parse_args(arguments)
    if not TRITON_INSTALLED:
        parser.error("triton is not installed")
    if interpreting():
        parser.error("TRITON_INTERPRET=1 is set, and a process that interprets kernels can't compile them: unset it")
    import triton

    try:
        budget: Budget = json.loads(options.budget.read_text()) if options.budget.exists() else {}
    except (OSError, ValueError) as error:
        parser.error(f"{options.budget}: {error}")
    cases = all_cases(folders=options.only)
    rows = measure(cases, options.arch)
    operations = {case.operation for case in cases}

    def in_scope(key: str) -> bool:
        case, _, arch = key.split(" | ")
        return arch in options.arch and (set(options.only) == set(OPERATIONS) or case.split(",", 1)[0] in operations)

    if options.update:
        kept = {key: entry for key, entry in budget.items() if not in_scope(key)}
        budget = kept | {row.key: row.entry(triton.__version__) for row in rows if not isinstance(row.usage, str)}
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(budget[key])}" for key in sorted(budget))
        write_atomically(options.budget, f"{{\n{lines}\n}}\n")
    stale = judge(rows, budget, in_scope, triton.__version__)
    print(_report(rows, stale, budget, triton.__version__))
    return 1 if stale or any(row.problems for row in rows) else 0


def _report(rows: Sequence[CompiledKernel], stale: Sequence[str], budget: Budget, version: str) -> str:
    table = [("kernel", "case", "arch", "registers", "spills", "shared KB", "widest load", "matrix", "verdict")]
    for row in rows:
        cells = ("?",) * 5
        if not isinstance(row.usage, str):
            used = row.entry(version)
            best = _best(used["matrix"])
            cells = (str(used["registers"]), str(used["spills"]), f"{used['shared'] / 1024:.1f}", str(used["load"]),
                     f"{used['matrix'][best]} {best}" if best else "-")  # fmt: skip
        table.append((row.kernel, row.case, row.arch, *cells, "over" if row.problems else "ok"))
    lines = [aligned(table), ""]
    lines += [f"{row.key}: {problem}" for row in rows for problem in row.problems]
    lines += [f"{key}: is in the budget, but no kernel answers to it: {UPDATE}" for key in stale]
    others = sorted({budget[row.key]["triton"] for row in rows if row.key in budget} - {version})
    if others:
        lines.append(
            f"The budget was made with Triton {', '.join(others)} and this is {version}, where registers may differ: "
            "of those entries only spills, limits of shared memory, 16-byte loads and matrix instructions were judged."
        )
    over = sum(bool(row.problems) for row in rows)
    lines.append(f"{len(rows)} kernels compiled, {over} over budget, {len(stale)} stale entries")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
