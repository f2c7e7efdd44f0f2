"""The suite in parts on one GPU, each part a process of less than nine minutes, into one dated results file.

    python benchmarks/gpu.py [PART ...] [--official PATH] [--dit PATH] [--fast-dit PATH] [--memory-limit GB]

Without a PART all of them, in this order; "step" and "sampling" stand for all parts of each. Needs torch, triton,
einops, numpy, pytest and pytest-benchmark. What a part had measured when its time was up is kept, and so are the
compilers' caches, in benchmarks/.cache, so that a second run of a part comes further (what was left out for lack of
time is told by `mpdit report`). A part that is run again replaces its rows in the file; another machine, other versions
or another memory limit make another file. --cpu does the same on the CPU.

Exit codes: 0 done, 1 a test failed or a part was cut short, 2 bad usage or no GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

HERE = Path(__file__).resolve().parent
LIMIT = 520.0
"""Seconds of a part's process; no case is begun in the last third."""


@dataclass(frozen=True)
class Part:
    """What pytest is asked for.

    Attributes:
        file: bench file.
        seconds: time for the turns of a case.
        options: further ones on a GPU, the sizes of this part.
        needs_checkout: has nothing to time without another project's code.
    """

    file: str
    seconds: float
    options: tuple[str, ...] = ()
    needs_checkout: bool = False


_XL = ("--models", "MPDiT-XL/4-2", "--largest")
_OUR_CODE, _PEERS = ("-k", "not official and not fast"), ("-k", "official or fast or ours")
PARTS: dict[str, Part] = {
    "kernels": Part("bench_kernels.py", 3),
    "block": Part("bench_block.py", 6),
    "forward": Part("bench_forward.py", 15),
    "step-b": Part("bench_step.py", 20, ("--models", "MPDiT-B/4-2", "--largest", *_OUR_CODE)),
    "step-xl": Part("bench_step.py", 40, (*_XL, *_OUR_CODE)),
    "step-peers": Part("bench_step.py", 60, (*_XL, *_PEERS), needs_checkout=True),
    "sampling-1": Part("bench_sampling.py", 40, ("--batches", "1")),
    "sampling-32": Part("bench_sampling.py", 40, ("--batches", "32")),
    "optimizer": Part("bench_optimizer.py", 10),
    "loader": Part("bench_loader.py", 15),
}
GROUPS = ("step", "sampling")
"""What the parts of one bench file are called together."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _Parser(prog="python benchmarks/gpu.py", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of: {', '.join((*PARTS, *GROUPS))} (default all)")
    parser.add_argument("--official", metavar="PATH", help="checkout of github.com/quandao10/MPDiT")
    parser.add_argument("--dit", metavar="PATH", help="checkout of github.com/facebookresearch/DiT")
    parser.add_argument("--fast-dit", metavar="PATH", help="checkout of github.com/chuanyangjin/fast-DiT")
    parser.add_argument("--memory-limit", type=float, metavar="GB", help="let each process allocate no more on the GPU")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="presets, instead of each part's own choice")
    parser.add_argument("--batches", nargs="+", metavar="N", help="images of a call, instead of each part's own choice")
    parser.add_argument(
        "--limit", type=float, default=LIMIT, metavar="S", help=f"seconds of a part (default {LIMIT:g})"
    )
    parser.add_argument("--cpu", action="store_true", help="small sizes on the CPU, though there may be a GPU")
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="DIR", help="where the file goes")
    options = parser.parse_args(arguments)
    parts = chosen(parser, options.parts, options.cpu)
    for option in ("official", "dit", "fast_dit"):
        path = getattr(options, option)
        if path is not None and not Path(path).is_dir():
            parser.error(f"--{option.replace('_', '-')} {path} is no folder: give the checkout's")
    if not options.cpu and not torch.cuda.is_available():
        parser.error("no CUDA GPU here: run this on one, or give --cpu for small sizes on the CPU")
    red = [name for name, part in parts.items() if not run(name, part, options)]
    if red:
        print(f"error: {', '.join(red)}: a test failed, or time was up", file=sys.stderr)
    return 1 if red else 0


def chosen(parser: argparse.ArgumentParser, names: Sequence[str], cpu: bool) -> dict[str, Part]:
    """Return the parts to run by what they are called; on a CPU, whose sizes are small, one a bench file."""
    wanted: dict[str, Part] = {}
    for name in names or PARTS:
        found = [part for part in PARTS if part == name or part.startswith(f"{name}-")]
        if not found:
            parser.error(f"PART {name} is unknown: choose from {', '.join((*PARTS, *GROUPS))}")
        for part in found:
            wanted.setdefault(part.partition("-")[0] if cpu else part, PARTS[part])
    return wanted


def run(name: str, part: Part, options: argparse.Namespace) -> bool:
    """Run one part, which merges its figures into the file as it goes; return whether all of it went well."""
    if part.needs_checkout and not (options.official or options.dit or options.fast_dit):
        print(f"{name}: left out, as no checkout was given (--official, --dit or --fast-dit PATH)", flush=True)
        return True
    command = [sys.executable, "-m", "pytest", str(HERE / part.file), "--benchmark-only", "-q", "--benchmark-quiet",
               "--rootdir", str(HERE.parent), "--results", str(options.results),
               "--minutes", str(options.limit / 90)]  # fmt: skip
    if not options.cpu:
        command += ["--seconds", str(part.seconds), *part.options]
    for option in ("official", "dit", "fast_dit", "memory_limit", "models", "batches"):
        if value := getattr(options, option):
            command += [f"--{option.replace('_', '-')}", *(value if isinstance(value, list) else [str(value)])]
    print(f"{name}: at most {options.limit:g} seconds", flush=True)
    start = time.monotonic()
    # pytest's exit codes: 0 all passed, 5 no test was collected.
    code = in_time(command, options.limit, environment(options.cpu))
    print(f"{name}: {time.monotonic() - start:.0f} seconds", flush=True)
    return code in (0, 5)


def in_time(command: Sequence[str], seconds: float, environ: dict[str, str]) -> int | None:
    """Return the exit code; None when the process had to be ended, with those it had started."""
    process = subprocess.Popen(command, env=environ, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        print(f"ended after {seconds:g} seconds", flush=True)
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()


def environment(cpu: bool) -> dict[str, str]:
    """Return the caller's, with our packages and caches that outlive a part; without GPUs if the CPU was asked for."""
    cache, paths = HERE / ".cache", [str(HERE.parent), str(HERE.parent / "kernels")]
    paths += [path for path in [os.environ.get("PYTHONPATH")] if path]
    mine = {"TRITON_CACHE_DIR": str(cache / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
    return os.environ | mine | {"PYTHONPATH": os.pathsep.join(paths)} | ({"CUDA_VISIBLE_DEVICES": ""} if cpu else {})


if __name__ == "__main__":
    sys.exit(main())
