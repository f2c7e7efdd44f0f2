"""python -m mpdit_kernels.backends: which attention runs here, which is chosen, and why the others are not.

--table (the default) probes every backend at some shapes; --measure times those available and writes the table that
choices are made from. Exit codes: 0, 2 bad usage.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import torch

from mpdit_kernels.backends import report
from mpdit_kernels.backends.call import Call
from mpdit_kernels.backends.choose import attention_mode
from mpdit_kernels.command import Parser
from mpdit_kernels.dispatch import mode

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in
          (torch.float32, torch.bfloat16, torch.float16, torch.float64)}  # fmt: skip

TABLE = ("tokens", "head_dim", "dtype", "first_query", "deterministic", "json")
MEASURE = ("minutes", "out")
"""Options of --table alone, and of --measure alone."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m mpdit_kernels.backends", description="Attention: what runs here, and what is chosen")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--table", action="store_true", help="probe all backends and show them (the default)")
    what.add_argument("--measure", action="store_true", help="time the available ones and write the table of choices")
    parser.add_argument(
        "--tokens", type=int, nargs="+", metavar="T", help="sequence lengths (80 272; on a GPU also 1040)"
    )
    parser.add_argument("--head-dim", type=int, nargs="+", metavar="D", help="widths of a head (72)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, metavar="DTYPE",
                        help=f"of {', '.join(DTYPES)} (bfloat16; on a CPU also float32)")  # fmt: skip
    parser.add_argument("--first-query", type=int, metavar="F", help="tokens that are keys and values only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--deterministic", action="store_true", help="as under torch.use_deterministic_algorithms(True)"
    )
    parser.add_argument("--json", action="store_true", help="the table as JSON")
    parser.add_argument("--minutes", type=float, help="for --measure: when to stop (5)")
    parser.add_argument("--out", type=Path, help="for --measure: file instead of tuned/attention_ARCHITECTURE.json")
    options = parser.parse_args(arguments)
    try:
        device = _device(options.device)
        attention_mode(), mode()
    except ValueError as error:
        parser.error(str(error))
    for name in TABLE if options.measure else MEASURE:
        if getattr(options, name) not in (None, False):
            parser.error(f"--{name.replace('_', '-')} goes {'without' if name in TABLE else 'with'} --measure")
    if options.measure:
        minutes = 5.0 if options.minutes is None else options.minutes
        if not 0 < minutes < float("inf"):
            parser.error(f"--minutes is {minutes}: expected more than 0")
        from mpdit_kernels.backends.measure import measure

        try:
            return measure(device, minutes, options.out)
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"{options.out or 'the table'} can't be read or written as a table: {error}")
    first_query = options.first_query or 0
    gpu = device.type == "cuda"
    tokens = options.tokens or ([80, 272, 1040] if gpu else [80, 272])
    head_dims = options.head_dim or [72]
    dtypes = options.dtype or (["bfloat16"] if gpu else ["float32", "bfloat16"])
    if min(*tokens, *head_dims) < 1 or not 0 <= first_query < min(tokens):
        parser.error("--tokens and --head-dim take whole numbers of at least 1, --first-query fewer than the tokens")
    calls = [
        Call(t, d, DTYPES[dtype], device, first_query, options.deterministic, options.deterministic, mode())
        for dtype, d, t in product(dtypes, head_dims, tokens)
    ]
    with _deterministic(options.deterministic):
        print(json.dumps(list(map(report.facts, calls)), indent=1) if options.json else report.texts(calls))
    return 0


@contextmanager
def _deterministic(on: bool) -> Iterator[None]:
    """torch's switch, for the probes."""
    before = torch.are_deterministic_algorithms_enabled()
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _device(name: str) -> torch.device:
    """As a tensor's device says it.

    Raises:
        ValueError: no such device here.
    """
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name!r}: expected cpu, cuda or cuda:N")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device is {name!r}: {str(error).splitlines()[0]}") from error


if __name__ == "__main__":
    sys.exit(main())
