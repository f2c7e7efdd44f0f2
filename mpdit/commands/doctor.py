"""`mpdit doctor`: says whether this machine is fit to train, and what to mend."""

from __future__ import annotations

import argparse
import sys

from mpdit.commands.common import Outcome, add_data, adder, open_data
from mpdit.core.parser import to_path

SUMMARY = "check this machine: versions, GPUs, kernels, network, disk"
DESCRIPTION = (
    "Look at what a run would find here: versions against the tested ones, driver and GPUs, each kernel's results and "
    "gradients against its reference and float64 on this very GPU, the rates of memory and matrix products, NCCL "
    "between the GPUs, and how fast data is read. Exit code 1 when a row is bad; each says what to do."
)
_HELP = {
    "model": "preset whose shapes the kernels are proved at",
    "data": "folder of latents whose reading is timed (default: none)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = adder(parser, _HELP)
    add("--model", default="MPDiT-XL/4-2", metavar="PRESET")
    add("--data", type=to_path, metavar="FOLDER")
    add_data(parser)


def run(args: argparse.Namespace) -> Outcome:
    from mpdit.core.text import aligned
    from mpdit.jobs.doctor import examine
    from mpdit.model.presets import preset

    preset(args.model)  # a name that nobody has is told at once
    rows = []
    for row in examine(args.model, None if args.data is None else open_data(args, args.data)):
        rows.append(row)
        if args.json:  # as it is found: what comes next may take the machine down
            print("  ".join(row), file=sys.stderr, flush=True)
    bad = [row for row in rows if row.status == "bad"]
    table = aligned([(row.status, row.part, row.name, row.found) for row in rows])
    mend = [f"{row.name}: {row.remedy}" for row in rows if row.remedy]
    end = f"{len(bad)} bad" if bad else "nothing is bad"
    text = "\n".join([table, "", *mend, end])
    return Outcome(text, {"bad": len(bad), "rows": [row._asdict() for row in rows]}, code=1 if bad else 0)
