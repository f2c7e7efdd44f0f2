"""The first minutes on a new GPU: proofs, ceilings, tuning and the XL step, in order of worth, into one folder.

    python benchmarks/first.py OUT [PART ...] [--seconds S]

Each part is a process with a limit of its own, and what it finds is in OUT as soon as it is found: the doctor's rows,
the proofs' report, tuned tables, the step's figures and trace, and page.md, which says after each part what is known
and what to run next. So a machine that is taken away takes nothing along. Parts that OUT already has are left out:
calling it again goes on. Needs torch, triton, einops, numpy, pytest and pytest-benchmark.

Exit codes: 0 all parts done, 1 one failed, was cut short or is still to be run, 2 bad usage or no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu import environment
from mpdit_kernels.dispatch import TUNED
from tools.command import write_atomically

ROOT = Path(__file__).resolve().parents[1]
LOG, HEAD = "log.txt", "== "
"""Names the file of what parts print, each below a line of HEAD and its name."""
NEVER = "no time was left"
GRACE = 8.0
"""Seconds that a part has to end by itself, after SIGINT at its limit, before it is killed."""


@dataclass(frozen=True)
class Part:
    """One thing to be found out.

    Attributes:
        name: of the part.
        limit: seconds.
        command: after the Python interpreter; "{out}" stands for the folder.
        why: what it is good for.
        figures: reads from the folder what the page says of it.
        fine: exit codes of a part that has found out what it was to.
    """

    name: str
    limit: float
    command: tuple[str, ...]
    why: str
    figures: Callable[[Path], Iterator[str]] = lambda out: iter(())
    fine: tuple[int, ...] = (0,)


def _doctor(out: Path) -> Iterator[str]:
    for row in _json(out / "doctor.json").get("rows", ()):
        if row["status"] in ("ok", "bad") and row["part"] != "versions":
            yield f"{row['status']}: {row['name']}: {row['found']}"


def _proofs(out: Path) -> Iterator[str]:
    log = (out / LOG).read_text() if (out / LOG).exists() else ""
    for line in log.rpartition(f"\n{HEAD}proofs\n")[2].partition(f"\n{HEAD}")[0].splitlines():
        if " passed" in line or " failed" in line or line.startswith("FAILED"):
            yield line


def _tuned(out: Path) -> Iterator[str]:
    for path in sorted(out.glob("sm_*.json")):
        for name, case in _json(path).get("cases", {}).items():
            passes = [f"{which} {case[which]['ratio']:.2f}x" for which in ("forward", "backward") if which in case]
            yield f"{name}: {case.get('red') or case.get('skipped') or ', '.join(passes)}"


def _attention(out: Path) -> Iterator[str]:
    for path in sorted(out.glob("attention_*.json")):
        for row in _json(path).get("rows", ()):
            times = sorted((seconds[0], name) for name, seconds in row["training"].items())
            cells = ", ".join(f"{name} {1e6 * seconds:.0f} us" for seconds, name in times)
            yield f"{row['tokens']} tokens, heads of {row['head_dim']}, batch {row['batch']}: {cells}"


def _step(out: Path) -> Iterator[str]:
    found = _json(out / "step.json")
    for name, figures in found.get("contenders", {}).items():
        yield f"{name}: " + ", ".join(f"{key} {value}" for key, value in figures.items())


def _json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found


_PYTEST = ("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow")
PARTS = (
    Part("doctor", 60, ("-m", "mpdit", "doctor", "--json"), "is every kernel right?", _doctor),
    Part("proofs", 100, (*_PYTEST, "tests/kernels/test_gpu.py"), "full shapes, streams, graphs, memory", _proofs),
    Part("attention", 50, ("-m", "tools.tune", "--attention", "--minutes", "0.7"), "which library wins?", _attention),
    Part(
        "tune",
        110,
        ("-m", "tools.tune", "--minutes", "1.7", "--only", "adaln", "adamw_ema", "short_attn", "fno"),
        "do the kernels beat the best of eager and torch.compile?",
        _tuned,
    ),
    Part(
        "step", 150, ("benchmarks/first_step.py", "{out}/step.json"), "the XL step: eager, one graph, compiled", _step
    ),
    Part(
        "tune-products",
        110,
        ("-m", "tools.tune", "--minutes", "1.7", "--only", "gelu_mlp", "upsample"),
        "and those around matrix products?",
        _tuned,
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks/first.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder for all that is found")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(p.name for p in PARTS)} (default: all)")
    parser.add_argument("--seconds", type=float, default=290.0, help="begin no part that would end later (default 290)")
    options = parser.parse_args(arguments)
    unknown = set(options.parts) - {part.name for part in PARTS}
    if unknown:
        parser.exit(2, f"error: PART {min(unknown)} is unknown: choose from {', '.join(p.name for p in PARTS)}\n")
    import torch

    if not torch.cuda.is_available():
        parser.exit(2, "error: no CUDA GPU here, and this is about one\n")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as `timeout` sends it: the part is ended, tables are kept
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = [part for part in PARTS if not options.parts or part.name in options.parts]
    return run(options.out, wanted, options.seconds)


def run(out: Path, parts: Sequence[Part], seconds: float) -> int:
    """Run the parts that OUT hasn't, as long as there is time, and keep its page true; return the exit code."""
    end = time.monotonic() + seconds
    state: dict[str, str] = _json(out / "parts.json")
    for path in out.glob("*sm_*.json"):  # of an earlier call, on a machine that is gone: what it tuned is used
        if not (TUNED / path.name).exists():
            shutil.copy(path, TUNED)
    write_page(out, state)
    # What has failed gets its second turn once everything has had its first.
    for part in sorted(parts, key=lambda part: state.get(part.name, NEVER) != NEVER):
        if state.get(part.name) == "done":
            continue
        if time.monotonic() + 0.6 * part.limit > end:
            state.setdefault(part.name, NEVER)
            continue
        limit = min(part.limit, end - time.monotonic())
        print(f"{part.name}: at most {limit:.0f} seconds", flush=True)
        state[part.name] = "cut off"  # unless it is told otherwise
        write_page(out, state)
        state[part.name] = _run(out, part, limit)
        write_page(out, state)
        print(f"{part.name}: {state[part.name]}", flush=True)
    write_page(out, state)
    print((out / "page.md").read_text())
    return 0 if all(state.get(part.name) == "done" for part in parts) else 1


def _run(out: Path, part: Part, limit: float) -> str:
    """Run one part, mirroring the tuned tables into OUT as they grow; return how it ended."""
    command = [sys.executable, *(word.replace("{out}", str(out)) for word in part.command)]
    with (out / LOG).open("a") as log, contextlib.ExitStack() as stack:
        stack.callback(keep_tables, out)
        log.write(f"\n{HEAD}{part.name}\n")
        log.flush()
        results = stack.enter_context((out / f"{part.name}.json").open("w")) if "--json" in part.command else log
        process = subprocess.Popen(
            command, stdout=results, stderr=log, env=environment(False), cwd=ROOT, start_new_session=True
        )
        begun = time.monotonic()
        try:
            while process.poll() is None and time.monotonic() - begun < limit:
                time.sleep(0.2)
                keep_tables(out)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)  # pytest writes its report
                try:
                    process.wait(GRACE)
                except subprocess.TimeoutExpired:
                    return f"killed after {limit:.0f} s"
                return f"ended at its limit of {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return "done" if process.returncode in part.fine else f"failed with code {process.returncode}: see {LOG}"


def keep_tables(out: Path) -> None:
    """Copy the tuned tables that have changed into OUT."""
    for path in TUNED.glob("*sm_*.json"):
        copy = out / path.name
        if not copy.exists() or copy.stat().st_mtime_ns < path.stat().st_mtime_ns:
            part = copy.with_suffix(".part")
            shutil.copy(path, part)
            part.replace(copy)


def write_page(out: Path, state: dict[str, str]) -> None:
    """Write page.md, what is known and what to run next, and parts.json, how each part ended."""
    write_atomically(out / "parts.json", json.dumps(state, indent=1) + "\n")
    lines = ["# What is known of this GPU", ""]
    for part in PARTS:
        lines += [f"## {part.name}: {part.why}", "", state.get(part.name, "not run"), ""]
        lines += [f"- {line}" for line in part.figures(out)]
        lines += [""]
    rest = [part.name for part in PARTS if state.get(part.name) != "done"]
    lines += ["## Next", ""]
    lines += [f"- python benchmarks/first.py {out} {' '.join(rest)}"] if rest else []
    lines += [
        f"- copy {out}/*sm_*.json to {TUNED.relative_to(ROOT)}, then python -m tools.tune --update, and commit both",
        "- make bench-gpu PART=step, then python -m mpdit.planning.calibrate --update",
    ]
    write_atomically(out / "page.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
