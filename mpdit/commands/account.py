"""`mpdit account`: counts what a model costs."""

from __future__ import annotations

import argparse

from mpdit.commands.common import Outcome, add_model, model_config, whole

SUMMARY = "count a model's parameters, FLOPs and activations"
DESCRIPTION = (
    "Count parameters, multiply-accumulates and what backward keeps of a model, by part and stage. The counts are "
    "exact, of the graph as the paper draws it; beside them stand what runs with our exact fusions and what the "
    "paper prints."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--batch",
        type=whole(1),
        default=1,
        help="images of a forward pass, which share what the exact fusions compute on weights alone (default: 1)",
    )
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of training (default: bf16)")
    parser.add_argument("--checkpointing", action="store_true", help="activations with checkpointing of each block")
    parser.add_argument("--reference", action="store_true", help="activations of the plain PyTorch references")


def run(args: argparse.Namespace) -> Outcome:
    from mpdit.planning import account

    found = account(
        model_config(args),
        batch=args.batch,
        dtype=args.precision,
        kernels=not args.reference,
        checkpointing=args.checkpointing,
    )
    return Outcome(f"{args.model}: {found}", {"name": args.model, **found.to_dict()})
