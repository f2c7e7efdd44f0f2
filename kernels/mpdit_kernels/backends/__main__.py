"""python -m mpdit_kernels.backends: which attention runs here, which is chosen, and why the others are not.

Probes every backend at some shapes. Exit codes: 0, 2 bad usage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from itertools import product
from typing import Any, NoReturn

import torch

from mpdit_kernels.backends import choose, probe
from mpdit_kernels.backends.libraries import Call
from mpdit_kernels.dispatch import mode

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in
          (torch.float32, torch.bfloat16, torch.float16, torch.float64)}  # fmt: skip
KINDS = ("forward", "training")


class Parser(argparse.ArgumentParser):
    """Reports bad usage as one line on stderr, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    gpu = torch.cuda.is_available()
    parser = Parser("python -m mpdit_kernels.backends", description="Attention: what runs here, and what is chosen")
    parser.add_argument(
        "--tokens", type=int, nargs="+", metavar="T", help="sequence lengths (80 272; on a GPU also 1040)"
    )
    parser.add_argument("--head-dim", type=int, nargs="+", metavar="D", default=[72], help="widths of a head (72)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, metavar="DTYPE",
                        help=f"of {', '.join(DTYPES)} (bfloat16; on a CPU also float32)")  # fmt: skip
    parser.add_argument(
        "--query-start", "--first-query", type=int, metavar="F", default=0, help="tokens that are keys and values only"
    )
    parser.add_argument("--device", default="cuda" if gpu else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--deterministic", action="store_true", help="as under torch.use_deterministic_algorithms(True)"
    )
    parser.add_argument("--json", action="store_true", help="the table as JSON")
    options = parser.parse_args(arguments)
    try:
        if options.device.partition(":")[0] not in ("cpu", "cuda"):
            raise ValueError("expected cpu, cuda or cuda:N")
        device = torch.empty(0, device=options.device).device
    except (ValueError, RuntimeError, AssertionError) as error:
        parser.error(f"--device is {options.device!r}: {str(error).splitlines()[0]}")
    try:
        choose.attention_mode(), mode()
    except ValueError as error:
        parser.error(str(error))
    gpu = device.type == "cuda"
    tokens = options.tokens or ([80, 272, 1040] if gpu else [80, 272])
    dtypes = options.dtype or (["bfloat16"] if gpu else ["float32", "bfloat16"])
    if min(*tokens, *options.head_dim) < 1 or not 0 <= options.query_start < min(tokens):
        parser.error("--tokens and --head-dim take whole numbers of at least 1, --query-start fewer than the tokens")
    repeat = options.deterministic
    calls = [
        Call(t, d, DTYPES[dtype], device, options.query_start, repeat, repeat, mode())
        for dtype, d, t in product(dtypes, options.head_dim, tokens)
    ]
    before = torch.are_deterministic_algorithms_enabled()
    if repeat:  # torch's switch, for the probes
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(repeat or before)
    try:
        found = list(map(facts, calls))
    finally:
        torch.use_deterministic_algorithms(before)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        name = [f"{device} is {torch.cuda.get_device_name(device)}, torch {torch.__version__}"] if gpu else []
        print("\n\n".join([*name, *map(text, calls, found)]))
    return 0


def facts(call: Call) -> dict[str, Any]:
    """Return everything about a class of calls: all backends, probed, in the order in which "auto" tries them."""
    backends = [
        {
            "name": name,
            "refusal": probe.refusal(name, call),
            "seconds": {kind: choose.seconds(call, kind).get(name) for kind in KINDS},
        }
        for name in choose.order(call, training=True)
    ]
    backends.sort(key=lambda backend: backend["refusal"] is not None)
    return {
        "tokens": call.tokens,
        "head_dim": call.head_dim,
        "dtype": str(call.dtype).removeprefix("torch."),
        "device": str(call.device),
        "architecture": call.architecture,
        "first_query": call.query_start,
        "deterministic": call.deterministic,
        "asked": choose.attention_mode(),
        "chosen": {kind: _chosen(call, kind) for kind in KINDS},
        "measured": [
            {name: row[name] for name in ("tokens", "head_dim", "batch", "heads")} for row in choose.rows(call)
        ],
        "backends": backends,
    }


def _chosen(call: Call, kind: str) -> str | None:
    try:
        return choose.choice(choose.attention_mode(), kind == "training", call)
    except ValueError:  # what is asked for is refused, as its line says
        return None


def text(call: Call, found: dict[str, Any]) -> str:
    """Return a block of lines: the choice, then a line for each backend."""
    chosen, near = found["chosen"], found["measured"]
    forward, training = (chosen[kind] or "nothing" for kind in KINDS)
    line = f"takes {training}" + (f", and {forward} where no gradient is asked for" if training != forward else "")
    lines = [str(call), line + (f", as {found['asked']} is asked for" if found["asked"] != "auto" else "")]
    if near:
        batches = " + ".join(f"{row['batch']} x {row['heads']} heads" for row in near)
        at = f"{near[0]['tokens']} tokens, head dim {near[0]['head_dim']}"
        lines += [f"microseconds measured at {at}, {batches}", f"{'':40}{KINDS[0]:>8}  {KINDS[1]:>8}"]
    else:
        lines.append("nothing measured near: in the default order")
    for backend in found["backends"]:
        name, refusal, seconds = backend["name"], backend["refusal"], backend["seconds"].values()
        kinds = [kind for kind in KINDS if chosen[kind] == name]
        state = "available" if not kinds else "chosen" if len(kinds) == len(KINDS) else f"chosen for {kinds[0]}"
        row = f"  {name:<16} {'refused' if refusal else state:<20}"
        if near:
            row += " " + "  ".join(f"{'':8}" if x is None else f"{1e6 * x:8.0f}" for x in seconds) + "  "
        lines += textwrap.wrap(refusal or "", 120, initial_indent=row, subsequent_indent=" " * len(row)) or [
            row.rstrip()
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
