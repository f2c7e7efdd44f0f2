"""Runs the suite in parts on one GPU, each part a process of less than nine minutes, into one dated results file.

    python benchmarks/gpu.py [PART ...] [--official PATH] [--dit PATH] [--fast-dit PATH] [--memory-limit GB] [...]

Without a PART all of them, in this order; "step" and "sampling" stand for all parts of each. Options that are not this
script's go to pytest, see `pytest benchmarks/ --help`. Needs torch, triton, einops, numpy, pytest and pytest-benchmark.
What a part had measured when its time was up is kept, and so are the compilers' caches, in benchmarks/.cache, so that a
second run of a part comes further (what was left out for lack of time is told by `mpdit report`). A part that is run
again replaces its rows in the file; another machine, other versions or another memory limit make another file.

Exit codes: 0 done, 1 a test failed or a part was cut short, 2 bad usage or no GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
LIMIT = 520.0
"""Seconds of a part's process; no case is begun in the last third."""
CHECKOUTS = ("--official", "--dit", "--fast-dit")

_XL = ("--models", "MPDiT-XL/4-2", "--largest")
_OUR_CODE, _PEERS = ("-k", "not official and not fast"), ("-k", "official or fast or ours")
PARTS: dict[str, tuple[str, ...]] = {
    "kernels": ("--seconds", "3"),
    "block": ("--seconds", "6"),
    "forward": ("--seconds", "15"),
    "step-b": ("--seconds", "20", "--models", "MPDiT-B/4-2", "--largest", *_OUR_CODE),
    "step-xl": ("--seconds", "40", *_XL, *_OUR_CODE),
    "step-peers": ("--seconds", "60", *_XL, *_PEERS),
    "sampling-1": ("--seconds", "40", "--batches", "1"),
    "sampling-32": ("--seconds", "40", "--batches", "32"),
    "optimizer": ("--seconds", "10"),
    "loader": ("--seconds", "15"),
}
"""pytest's options on a GPU by part; up to a hyphen its name is that of the bench file, which stands for all of it."""


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    names = list(takewhile(lambda text: not text.startswith("-"), given))
    parser = argparse.ArgumentParser(
        prog="python benchmarks/gpu.py",
        usage=f"%(prog)s [PART ...] [options]\nPART: {', '.join(PARTS)}, step, sampling (default: all)",
        description=(__doc__ or "").partition("\n")[0],
        epilog="All other options go to pytest: see pytest benchmarks/ --help.",
        allow_abbrev=False,
    )
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="S", help=f"seconds of a part ({LIMIT:g})")
    parser.add_argument("--cpu", action="store_true", help="small sizes on the CPU, though there may be a GPU")
    options, to_pytest = parser.parse_known_args(given[len(names) :])
    parts: list[str] = []
    for name in names or PARTS:
        found = [part for part in PARTS if part == name or part.startswith(f"{name}-")]
        if not found:
            parser.exit(2, f"error: PART {name} is unknown: choose from {', '.join(PARTS)}, step, sampling\n")
        parts += [part.partition("-")[0] for part in found] if options.cpu else found  # a CPU's sizes are small
    if not options.cpu and not torch.cuda.is_available():
        parser.exit(2, "error: no CUDA GPU here: run this on one, or give --cpu for small sizes on the CPU\n")
    red = []
    for part in dict.fromkeys(parts):
        code = run(part, options.limit, options.cpu, to_pytest)
        if code == 4:  # pytest has said what is wrong with its options
            return 2
        if code not in (0, 5):  # 5: no test was collected
            red.append(part)
    if red:
        print(f"error: {', '.join(red)}: a test failed, or time was up", file=sys.stderr)
    return 1 if red else 0


def run(part: str, limit: float, cpu: bool, to_pytest: Sequence[str]) -> int | None:
    """Run one part, which merges its figures into the file as it goes; return pytest's exit code, None if cut short."""
    if part == "step-peers" and not any(text.partition("=")[0] in CHECKOUTS for text in to_pytest):
        print(f"{part}: left out, as no checkout was given (--official, --dit or --fast-dit PATH)", flush=True)
        return 0
    file = HERE / f"bench_{part.partition('-')[0]}.py"
    command = [sys.executable, "-m", "pytest", str(file), "--benchmark-only", "-q", "--benchmark-quiet"]
    command += ["--rootdir", str(HERE.parent), "--results", str(HERE / "results"), "--minutes", str(limit / 90)]
    command += [*(() if cpu else PARTS[part]), *to_pytest]
    print(f"{part}: at most {limit:g} seconds", flush=True)
    start = time.monotonic()
    process = subprocess.Popen(command, env=environment(cpu), start_new_session=True)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        print(f"ended after {limit:g} seconds", flush=True)
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)  # with the compilers and loaders that it had started
            process.wait()
        print(f"{part}: {time.monotonic() - start:.0f} seconds", flush=True)


def environment(cpu: bool) -> dict[str, str]:
    """Return the caller's, with our packages and caches that outlive a part; without GPUs if the CPU was asked for."""
    cache = HERE / ".cache"
    paths = [str(HERE.parent), str(HERE.parent / "kernels"), os.environ.get("PYTHONPATH")]
    mine = {"TRITON_CACHE_DIR": str(cache / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
    mine["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return os.environ | mine | ({"CUDA_VISIBLE_DEVICES": ""} if cpu else {})


if __name__ == "__main__":
    sys.exit(main())
