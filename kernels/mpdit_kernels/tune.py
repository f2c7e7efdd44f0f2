"""python -m mpdit_kernels.tune: prove, tune and time the kernels on this GPU, within a given time.

For each case, the most valuable first: a gate (error against float64 at most twice PyTorch's), the fastest launch
configurations, then times against the best of eager PyTorch and torch.compile. Results go to tuned/sm_XX.json after
every step, so that a run which is cut short leaves what it had. A run that does not stop in time, being within a
compiler or a kernel that runs on, is ended. Exit codes: 0 done or out of time, 1 a red gate, 2 bad usage or no GPU.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mpdit_kernels.cases import SHAPES, Case, Shape, all_cases
from mpdit_kernels.command import Parser, aligned, write_atomically
from mpdit_kernels.costs import GPUS
from mpdit_kernels.dispatch import TRITON_INSTALLED

if TYPE_CHECKING:
    from mpdit_kernels.search import Bench

TINY = (Shape("XL", width=64, heads=2, parameters=5000, batch=2, prefix=2, grids=(2, 4)),)
"""For a dry run."""
SAME_MACHINE = ("gpu", "torch", "triton")
"""Figures of another one are not kept beside new ones."""

GRACE = 10.0
"""Seconds after which a run that the alarm could not stop is ended."""

Table = dict[str, Any]


class _TimeUp(BaseException):
    """Raised by the alarm wherever Python is running; no handler of ordinary errors may take it."""


class Tuner:
    """Fills a table as launch.tuned_table reads it; the operations see it as it grows.

    Args:
        cases: all that share tunables.
        bench: where and how to time.
        target: architecture that the table is for.
        out: file that is written after each step, or None.
        table: what earlier runs found.
    """

    def __init__(self, cases: Sequence[Case], bench: Bench, target: str, out: Path | None, table: Table) -> None:
        self.cases, self.bench, self.target, self.out, self.table = cases, bench, target, out, table
        self.red: list[str] = []
        self.late = False
        self._tuned: set[tuple[str, str]] = set()

    def run(self, small: bool = False) -> None:
        """Everything, in order of value."""
        from mpdit_kernels import timing

        self.table["machine"] = timing.machine(self.bench.device)
        self.table["ceilings"] = timing.ceilings(self.bench.clock, self.bench.device, small)
        self._publish()
        for case in in_order_of_value(self.cases):
            self.take(case)

    def take(self, case: Case) -> None:
        """Gate, tune and time one case."""
        from mpdit_kernels import search

        start = time.monotonic()
        try:
            problem = search.gate(case, self.bench)
            if problem is None:
                # The last first: a choice between methods is asked for before the configurations that it leads to.
                for tunable, key in reversed(search.picks_of(case, self.bench.dtype)):
                    self._tune(tunable, key)
                self.table["cases"][case.name] = search.time_case(case, self.bench, self.table["ceilings"])
        except Exception as error:
            if self.late:  # what a library made of the alarm
                raise _TimeUp from error
            # A kernel that doesn't run is as bad as a wrong one, and the others get their turn; too little memory says
            # nothing of the kernel, as the gate's float64 takes much.
            skipped = search.out_of_memory(error)
            problem = None if skipped else f"{type(error).__name__}: {error}".splitlines()[0]
            if skipped:
                self.table["cases"][case.name] = {"skipped": "out of memory"}
        if problem is not None:
            self.red.append(case.name)
            self.table["cases"][case.name] = {"red": problem}
        self._publish()
        taken = f"{time.monotonic() - start:.1f} s"
        print(f"{case.name}: {f'RED, {problem}' if problem else summary(self.table, case)} ({taken})", flush=True)

    def _tune(self, tunable: Any, key: dict[str, Any]) -> None:
        from mpdit_kernels import launch, search

        text = launch.key_text(key)
        if (tunable.name, text) in self._tuned:
            return
        sharing = [
            case
            for case in self.cases
            if not case.composed
            and (tunable.name, text)
            in {(other.name, launch.key_text(k)) for other, k in search.picks_of(case, self.bench.dtype)}
        ]
        self.table["configs"].setdefault(tunable.name, {})[text] = search.fastest(tunable, key, sharing, self.bench)
        self._tuned.add((tunable.name, text))
        self._publish()

    def _publish(self) -> None:
        from mpdit_kernels import launch

        self.table["wins"], self.table["losses"] = verdicts(self.table, self.cases)
        launch.set_tuned_table(self.target, self.table)
        if self.out is not None:
            write_atomically(self.out, json.dumps(self.table, indent=1) + "\n")


def in_order_of_value(cases: Sequence[Case]) -> list[Case]:
    """XL before the rest, then each operation's longest case before any operation's second."""

    def seconds(case: Case) -> float:
        return sum(GPUS[-1].floor(cost) for cost in (case.forward, case.backward) if cost)

    by_length = sorted(cases, key=seconds, reverse=True)
    seen: dict[tuple[bool, str], int] = {}
    ranks = {}
    for case in by_length:
        group = (_is_xl(case), case.operation)
        ranks[case.name] = seen[group] = seen.get(group, -1) + 1
    return sorted(by_length, key=lambda case: (not _is_xl(case), ranks[case.name]))


def verdicts(table: Table, cases: Sequence[Case]) -> tuple[dict[str, bool], dict[str, str]]:
    """(operation: does it win, operation: why not), kept from earlier where no XL case of it has been measured."""
    wins, losses = dict(table.get("wins", {})), dict(table.get("losses", {}))
    for operation in dict.fromkeys(case.operation for case in cases if not case.composed):
        mine = [case for case in cases if case.operation == operation]
        measured = {case.name: table["cases"][case.name] for case in mine if case.name in table["cases"]}
        red = [f"{name}: {figures['red']}" for name, figures in measured.items() if "red" in figures]
        timed = [figures for case in mine if _is_xl(case) and "forward" in (figures := measured.get(case.name, {}))]
        if red:
            wins[operation], losses[operation] = False, f"its kernels failed the gate at {red[0]}"
        elif timed:
            ratio = sum(map(_best_opponent, timed)) / sum(_seconds(figures, "triton") for figures in timed)
            wins[operation] = ratio >= 1
            losses.pop(operation, None)
            if ratio < 1:
                losses[operation] = f"it was measured {ratio:.2f} times as fast as the best of {_opponents(timed)}"
    return wins, losses


def summary(table: Table, case: Case) -> str:
    """One line of a case's figures."""
    parts = []
    for name in ("forward", "backward"):
        figures = table["cases"][case.name].get(name)
        if figures:
            parts.append(
                f"{name} {1e6 * figures['seconds']['triton'][0]:.1f} us, {figures['share']:.0%} of ceiling, "
                f"{figures['ratio']:.2f}x"
            )
    return "; ".join(parts) or "skipped, out of memory"


def _is_xl(case: Case) -> bool:
    return case.label.startswith("XL")


def _seconds(figures: dict[str, Any], way: str) -> float:
    return sum(figures[name]["seconds"][way][0] for name in ("forward", "backward") if name in figures)


def _best_opponent(figures: dict[str, Any]) -> float:
    return min(_seconds(figures, way) for way in figures["forward"]["seconds"] if way != "triton")


def _opponents(timed: Sequence[dict[str, Any]]) -> str:
    names = dict.fromkeys(way for figures in timed for way in figures["forward"]["seconds"] if way != "triton")
    *first, last = ("torch.compile" if name == "compile" else name for name in names)
    return f"{', '.join(first)} and {last}" if first else last


def earlier(path: Path | None, machine: dict[str, Any]) -> Table:
    """The table in a file if it was measured on this machine, otherwise an empty one."""
    empty: Table = {"configs": {}, "wins": {}, "losses": {}, "machine": machine, "ceilings": {}, "cases": {}}
    table = json.loads(path.read_text()) if path and path.exists() else {}
    same = all(table.get("machine", {}).get(name) == machine.get(name) for name in SAME_MACHINE)
    return empty | deepcopy(table) if same else empty


def main(arguments: Sequence[str] | None = None) -> int:
    start = time.monotonic()
    parser = Parser("python -m mpdit_kernels.tune", description="Prove, tune and time the kernels on this GPU")
    parser.add_argument("--minutes", type=float, default=6.0, help="when to stop (default 6)")
    parser.add_argument("--dry-run", action="store_true", help="the same on tiny shapes, on the CPU, saving nothing")
    parser.add_argument("--out", type=Path, help="file to write instead of tuned/sm_XX.json in the package")
    parser.add_only()
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes is {options.minutes}: expected more than 0")
    if not TRITON_INSTALLED:
        parser.error("triton is not installed")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA GPU here, and tuning needs one (--dry-run tries the logic on the CPU)")
    from mpdit_kernels import launch, timing

    if options.dry_run != launch.INTERPRETING:
        parser.error(f"{'--dry-run needs' if options.dry_run else 'tuning is not possible with'} TRITON_INTERPRET=1")

    target = "cpu" if options.dry_run else launch.architecture()
    out = options.out or (None if options.dry_run else launch.TUNED / f"{target}.json")
    device = "cpu" if options.dry_run else "cuda"
    cases = all_cases(TINY if options.dry_run else SHAPES, options.only, composed=True)
    tuner = Tuner(cases, _bench(options.dry_run), target, out, earlier(out, timing.machine(device)))
    _run_in_time(tuner, options.minutes, start, small=options.dry_run)
    print(_report(tuner.table, cases, out))
    return 1 if tuner.red else 0


def _run_in_time(tuner: Tuner, minutes: float, start: float, small: bool) -> None:
    """Run the tuner until so many minutes after `start`, and end the process if it is still at it GRACE later."""

    def up(*_: object) -> None:
        tuner.late = True
        raise _TimeUp

    def end() -> None:
        print(f"ended {GRACE:g} seconds after its {minutes:g} minutes, as a step did not stop", flush=True)
        for process in multiprocessing.active_children():
            process.kill()
        os._exit(1 if tuner.red else 0)

    left = max(0.001, start + 60 * minutes - time.monotonic())
    watchdog = threading.Timer(left + GRACE, end)
    watchdog.daemon = True
    before = signal.signal(signal.SIGALRM, up)
    watchdog.start()
    signal.setitimer(signal.ITIMER_REAL, left)
    try:
        tuner.run(small)
    except _TimeUp:
        print(f"stopped after {minutes:g} minutes", flush=True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        watchdog.cancel()


def _bench(dry: bool) -> Bench:
    from mpdit_kernels import timing
    from mpdit_kernels.search import Bench

    if dry:
        return Bench(timing.CpuClock(), "cpu", torch.float32, partial(torch.compile, backend="eager"), 2, 2)
    compiler = partial(torch.compile, dynamic=False, mode="max-autotune-no-cudagraphs")
    return Bench(timing.GpuClock(), "cuda", torch.bfloat16, compiler)


def _report(table: Table, cases: Sequence[Case], out: Path | None) -> str:
    rows = [("operation", "wins", "why not")]
    for operation in dict.fromkeys(case.operation for case in cases if not case.composed):
        wins = table["wins"].get(operation)
        rows.append((operation, "?" if wins is None else "yes" if wins else "no", table["losses"].get(operation, "")))
    missing = [case.name for case in cases if case.name not in table["cases"]]
    lines = [aligned(rows)]
    if missing:
        lines.append(f"not reached: {'; '.join(missing)}")
    if out:
        lines.append(f"written to {out}; now: python -m mpdit_kernels.costs --update")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
