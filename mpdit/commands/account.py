"""`mpdit account`: counts what a model costs."""

from __future__ import annotations

import argparse

from mpdit.commands.common import Outcome, add_model, adder, keep_old_name, model_config, whole

SUMMARY = "count a model's parameters, FLOPs and activations"
DESCRIPTION = (
    "Count parameters, multiply-accumulates and what backward keeps of a model, by part and stage. The counts are "
    "exact, of the graph as the paper draws it; beside them stand what runs with our exact fusions and what the "
    "paper prints."
)
_HELP = {
    "batch": "images of a forward pass, which share what the exact fusions compute on weights alone",
    "precision": "of training",
    "activation_checkpointing": "activations with checkpointing of each block",
    "reference": "activations of the plain PyTorch references",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add = adder(parser, _HELP)
    add("--batch", type=whole(1), default=1)
    add("--precision", choices=("bf16", "fp32"), default="bf16")
    add("--activation-checkpointing", action="store_true")
    keep_old_name(parser, "--checkpointing", "--activation-checkpointing")
    add("--reference", action="store_true")


def run(args: argparse.Namespace) -> Outcome:
    from mpdit.planning import account

    found = account(
        model_config(args),
        batch=args.batch,
        dtype=args.precision,
        kernels=not args.reference,
        activation_checkpointing=args.activation_checkpointing,
    )
    return Outcome(f"{args.model}: {found}", {"name": args.model, **found.to_dict()})
