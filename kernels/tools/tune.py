"""Prove, tune and time the kernels on this GPU within a given time, and write the tables that calls choose by.

    python -m tools.tune [--minutes M]               tuned/sm_XX.json: launch configurations, and which operations win
    python -m tools.tune --attention [--minutes M]   tuned/attention_sm_XX.json: times of all attention backends
    python -m tools.tune --table | --update          the table of costs, printed or written into kernels/README.md

For each case, the most valuable first: a gate (error against float64 at most twice PyTorch's), the fastest launch
configurations, then times against eager PyTorch and torch.compile. Calls take the reference where it won: as it is by
its eager times and, under torch.compile, by its compiled ones. No case takes more than 45 seconds. A table is written
after every step, so that a run cut short leaves what it had. Exit codes: 0 done or out of time, 1 a red gate, 2 bad
usage or no GPU.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mpdit_kernels.dispatch import TRITON_INSTALLED, TUNED, set_tuned_table

from tools import attention, costs, timing
from tools.cases import SHAPES, TINY, Case, all_cases
from tools.command import Parser, aligned, write_atomically

if TYPE_CHECKING:
    from tools.measure import Bench

CASE_SECONDS = 45
"""After which a case keeps what was found of it by then, and leaves the time to others."""
FIRST = ("short_attention", "gated_residual_adaln", "adamw_ema", "fno_time_embedding")
"""Operations whose gain over PyTorch is surest, and which a short run should have reached."""
SAME_MACHINE = ("gpu", "torch", "triton")
"""Figures of another one are not kept beside new ones."""

OPPONENTS = {"eager": "PyTorch", "compile": "torch.compile's code"}

Table = dict[str, Any]


class TimeUp(BaseException):
    """Raised by the alarm wherever Python is running; no handler of ordinary errors may take it."""


class Tuner:
    """Fills a table as dispatch.tuned_table reads it; the operations see it as it grows.

    Args:
        cases: all that share tunables.
        bench: where and how to time.
        target: architecture that the table is for.
        out: file that is written after each step, or None.
        table: what earlier runs found.
    """

    def __init__(self, cases: Sequence[Case], bench: Bench, target: str, out: Path | None, table: Table) -> None:
        self.cases, self.bench, self.target, self.out, self.table = cases, bench, target, out, table
        self.end = self.case_end = float("inf")
        self.red: list[str] = []
        self._tuned: set[tuple[str, str]] = set()

    def run(self, minutes: float, small: bool = False) -> None:
        """Take all cases in order of value, for so many minutes."""
        self.end = time.monotonic() + 60 * minutes
        before = signal.signal(signal.SIGALRM, _time_up)
        try:
            self._set_alarm(60 * minutes)
            self.table["machine"] = timing.machine(self.bench.device)
            self.table["ceilings"] = timing.ceilings(self.bench.clock, self.bench.device, small)
            self._publish()
            for case in in_order_of_value(self.cases):
                try:
                    self._set_alarm(CASE_SECONDS)
                    self.take(case)
                except TimeUp:
                    if time.monotonic() >= self.end:
                        raise
                    print(f"{case.name}: left after {CASE_SECONDS} seconds", flush=True)
        except TimeUp:
            print(f"stopped after {minutes:g} minutes", flush=True)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _set_alarm(self, seconds: float) -> None:
        """Have TimeUp raised after so many seconds, or at the end of all if that is sooner."""
        self.case_end = min(self.end, time.monotonic() + seconds)
        signal.setitimer(signal.ITIMER_REAL, max(1e-3, self.case_end - time.monotonic()))

    def take(self, case: Case) -> None:
        """Gate, tune and time one case."""
        from tools import measure

        start = time.monotonic()
        try:
            problem = measure.gate(case, self.bench)
            if problem is None:
                for tunable, key in measure.picks_of(case, self.bench.dtype):
                    self._tune(tunable, key)
                self.table["cases"][case.name] = measure.time_case(case, self.bench, self.table["ceilings"])
        except Exception as error:
            if time.monotonic() >= self.case_end:  # what a library made of the alarm
                raise TimeUp from error
            # A kernel that doesn't run is as bad as a wrong one, and the others get their turn; too little memory says
            # nothing of the kernel, as the gate's float64 takes much.
            skipped = timing.out_of_memory(error)
            problem = None if skipped else f"{type(error).__name__}: {error}".splitlines()[0]
            if skipped:
                self.table["cases"][case.name] = {"skipped": "out of memory"}
        if problem is not None:
            self.red.append(case.name)
            self.table["cases"][case.name] = {"red": problem}
        self._publish()
        taken = f"{time.monotonic() - start:.1f} s"
        print(f"{case.name}: {_summary(self.table['cases'][case.name])} ({taken})", flush=True)

    def _tune(self, tunable: Any, key: dict[str, Any]) -> None:
        from mpdit_kernels import launch

        from tools import measure

        text = launch.key_text(key)
        if (tunable.name, text) in self._tuned:
            return
        sharing = [case for case in self.cases if (tunable, key) in measure.picks_of(case, self.bench.dtype)]
        self.table["configs"].setdefault(tunable.name, {})[text] = measure.fastest(tunable, key, sharing, self.bench)
        self._tuned.add((tunable.name, text))
        self._publish()

    def _publish(self) -> None:
        self.table |= verdicts(self.table, self.cases, "eager")
        self.table["compiled"] = verdicts(self.table | self.table["compiled"], self.cases, "compile")
        set_tuned_table(self.target, self.table)
        if self.out is not None:
            write_atomically(self.out, json.dumps(self.table, indent=1) + "\n")


def _time_up(*_: object) -> None:
    raise TimeUp


def in_order_of_value(cases: Sequence[Case]) -> list[Case]:
    """Sort XL before the rest; of each, FIRST as listed, then of the others each one's longest case before a second."""

    def seconds(case: Case) -> float:
        return sum(costs.floor(cost, costs.GPUS[-1]) for cost in (case.forward, case.backward) if cost)

    by_length = sorted(cases, key=seconds, reverse=True)
    seen: dict[tuple[bool, str], int] = {}
    ranks = {}
    for case in by_length:
        group = (_is_xl(case), case.operation)
        ranks[case.name] = seen[group] = seen.get(group, -1) + 1

    def place(case: Case) -> tuple[bool, int, int]:
        first = FIRST.index(case.operation) if case.operation in FIRST else len(FIRST)
        return (not _is_xl(case), first, ranks[case.name])

    return sorted(by_length, key=place)


def verdicts(table: Table, cases: Sequence[Case], opponent: str) -> Table:
    """Return {"wins": {operation: does it win}, "losses": {operation: why not}} against "eager" or "compile".

    Kept from `table` where no XL case of an operation was measured beside this opponent.
    """
    wins, losses = dict(table["wins"]), dict(table["losses"])
    for operation in dict.fromkeys(case.operation for case in cases):
        measured = {case: table["cases"].get(case.name, {}) for case in cases if case.operation == operation}
        red = [f"{case.name}: {figures['red']}" for case, figures in measured.items() if "red" in figures]
        timed = [
            figures
            for case, figures in measured.items()
            if _is_xl(case) and opponent in figures.get("forward", {}).get("seconds", ())
        ]
        if red:
            wins[operation], losses[operation] = False, f"its kernels failed the gate at {red[0]}"
        elif timed:
            ratio = sum(_seconds(figures, opponent) for figures in timed) / sum(_seconds(x, "triton") for x in timed)
            wins[operation] = ratio >= 1
            losses.pop(operation, None)
            if ratio < 1:
                losses[operation] = f"it was measured {ratio:.2f} times as fast as {OPPONENTS[opponent]}"
    return {"wins": wins, "losses": losses}


def _summary(figures: dict[str, Any]) -> str:
    """Return one line of a case's figures."""
    if "red" in figures:
        return f"RED, {figures['red']}"
    passes = [(name, figures[name]) for name in ("forward", "backward") if name in figures]
    return "skipped, out of memory" if not passes else "; ".join(
        f"{name} {1e6 * found['seconds']['triton'][0]:.1f} us, {found['share']:.0%} of ceiling, {found['ratio']:.2f}x"
        for name, found in passes
    )  # fmt: skip


def _is_xl(case: Case) -> bool:
    return case.label.startswith("XL")


def _seconds(figures: dict[str, Any], variant: str) -> float:
    return sum(figures[name]["seconds"][variant][0] for name in ("forward", "backward") if name in figures)


def earlier(path: Path | None, machine: dict[str, Any]) -> Table:
    """Return the table in a file if it was measured on this machine, otherwise an empty one."""
    verdict: Table = {"wins": {}, "losses": {}}
    empty = {"configs": {}, **verdict, "compiled": verdict, "machine": machine, "ceilings": {}, "cases": {}}
    table = json.loads(path.read_text()) if path and path.exists() else {}
    same = all(table.get("machine", {}).get(name) == machine.get(name) for name in SAME_MACHINE)
    return empty | table if same else empty


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m tools.tune", description="Prove, tune and time the kernels on this GPU")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--attention", action="store_true", help="time all attention backends instead, also on a CPU")
    what.add_argument("--table", action="store_true", help="print the table of costs and measured times")
    what.add_argument("--update", action="store_true", help="write that table into kernels/README.md")
    what.add_argument("--dry-run", action="store_true", help="tune tiny shapes on the CPU, saving nothing")
    parser.add_argument("--minutes", type=float, default=6.0, help="when to stop (default 6)")
    parser.add_argument("--out", type=Path, help="file to write instead of the package's tuned/...json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="of --attention: cpu, cuda or cuda:N")  # fmt: skip
    parser.add_only()
    options = parser.parse_args(arguments)
    if not 0 < options.minutes < float("inf"):
        parser.error(f"--minutes is {options.minutes}: expected more than 0")
    if options.attention:
        try:
            return attention.measure(torch.empty(0, device=options.device).device, options.minutes, options.out)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            parser.error(f"--device {options.device} or {options.out or 'the table'}: {str(error).splitlines()[0]}")
    if options.table or options.update:
        cases = all_cases(folders=options.only)
        print(costs.table(cases, costs.measured_tables())) if options.table else costs.update(costs.README, cases)
        return 0
    if not TRITON_INSTALLED:
        parser.error("triton is not installed")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA GPU here, and tuning needs one (--dry-run tries the logic on the CPU)")
    from mpdit_kernels import launch

    if options.dry_run != launch.INTERPRETING:
        parser.error(f"{'--dry-run needs' if options.dry_run else 'tuning is not possible with'} TRITON_INTERPRET=1")
    target = "cpu" if options.dry_run else launch.architecture()
    out = options.out or (None if options.dry_run else TUNED / f"{target}.json")
    bench, cases = _bench(options.dry_run), all_cases(TINY if options.dry_run else SHAPES, options.only)
    tuner = Tuner(cases, bench, target, out, earlier(out, timing.machine(bench.device)))
    tuner.run(options.minutes, small=options.dry_run)
    print(_report(tuner.table, cases, out))
    return 1 if tuner.red else 0


def _bench(dry: bool) -> Bench:
    from tools.measure import Bench

    if dry:
        return Bench(timing.WallClock(), "cpu", torch.float32, partial(torch.compile, backend="eager"), 2, 2)
    # The mode "max-autotune-no-cudagraphs" but for Triton's products, which take minutes to try and seldom win.
    options = {"max_autotune": True, "coordinate_descent_tuning": True, "max_autotune_gemm_backends": "ATEN"}
    compiler = partial(torch.compile, dynamic=False, options=options)
    return Bench(timing.GpuClock(), "cuda", torch.bfloat16, compiler)


def _report(table: Table, cases: Sequence[Case], out: Path | None) -> str:
    rows: list[tuple[str, ...]] = [("operation", "wins", "wins compiled", "why not")]
    for operation in dict.fromkeys(case.operation for case in cases):
        both = (table, table["compiled"])
        wins = [{None: "?", True: "yes", False: "no"}[one["wins"].get(operation)] for one in both]
        why = dict.fromkeys(one["losses"][operation] for one in both if operation in one["losses"])
        rows.append((operation, *wins, "; ".join(why)))
    lines, missing = [aligned(rows)], [case.name for case in cases if case.name not in table["cases"]]
    if missing:
        lines.append(f"not reached: {'; '.join(missing)}")
    if out:
        lines.append(f"written to {out}; now: python -m tools.tune --update")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
