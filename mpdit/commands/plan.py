"""`mpdit plan`: predicts whether a run fits, how fast it is and how long it takes."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from mpdit.commands.common import Outcome, add_model, adder, given_fields, keep_old_name, model_config, number, whole
from mpdit.core.errors import ConfigError

if TYPE_CHECKING:
    from mpdit_kernels.hardware import Gpu

SUMMARY = "predict memory, speed and hours of a training run"
DESCRIPTION = (
    "Predict a training run on GPUs that needn't be at hand: memory by part, whether it fits, the largest micro-batch, "
    "step time from the roofline and measured efficiencies, communication by ZeRO stage, images a second, hours, and "
    "scaling to 4096 GPUs. What is assumed rather than measured is said."
)
_FIGURES = {
    "memory": ("memory", "GIB", "memory that a process can use, GiB", 2**30),
    "tflops": ("flops", "TFLOPS", "dense bf16 TFLOP/s", 1e12),
    "bandwidth": ("bandwidth", "GB/S", "memory bandwidth", 1e9),
    "link": ("link", "GB/S", "to its neighbours in a node, one direction", 1e9),
}
"""The figures of a GPU by their options: the field of Gpu, unit, meaning, and how many of the field's units it is."""

_HELP = {
    "gpu": "a100-40gb, a100-80gb, h100, h200, b200, rtx4090, or any other with its figures (required)",
    "gpus": "in all",
    "global_batch": "images of a step",
    "zero": "ZeRO stage; one GPU shards nothing, and takes 0 for 1 and 2",
    "epochs": "length of the run",
    "dataset_size": "images of an epoch (default: ImageNet's)",
    "grad_accum_steps": "micro steps (default: the fewest that fit)",
    "precision": "of training",
    "activation_checkpointing": "recompute activations in backward",
    "gpus_per_node": "that share NVLink",
    "network": "of one GPU to other nodes, one direction (default: 25, an HDR adapter each, for A100, else 50, NDR)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add = adder(parser, _HELP)
    add("--gpu", required=True, metavar="GPU")
    add("--gpus", type=whole(1), default=8)
    add("--global-batch", type=whole(1), default=1024)
    add("--zero", type=int, choices=range(4), default=2)
    add("--epochs", type=number, default=240)
    add("--dataset-size", dest="images", type=whole(1), metavar="N")
    add("--grad-accum-steps", type=whole(1), metavar="N")
    add("--precision", choices=("bf16", "fp32"), default="bf16")
    add("--activation-checkpointing", action="store_true")
    add("--gpus-per-node", type=whole(1), default=8)
    add("--network", type=_figure, metavar="GB/S")
    keep_old_name(parser, "--accumulation", "--grad-accum-steps")
    keep_old_name(parser, "--checkpointing", "--activation-checkpointing")
    group = parser.add_argument_group("figures of a GPU that is not listed, or to change of one that is")
    for name, (_, unit, meaning, _) in _FIGURES.items():
        group.add_argument(f"--gpu-{name}", type=_figure, metavar=unit, help=f"{meaning} (default: the listed GPU's)")


def run(args: argparse.Namespace) -> Outcome:
    from mpdit.planning.plan import Request, plan

    asked = given_fields(args, Request) | {
        "gpu": _gpu(args),
        "network": None if args.network is None else args.network * 1e9,
    }
    found = plan(model_config(args), Request(**asked))
    return Outcome(found.text(args.model), {"name": args.model, **found.to_dict()})


def _figure(text: str) -> float:
    """Parse an argument that is a number above 0 and below a million."""
    value = number(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and below a million")
    return value


def _gpu(args: argparse.Namespace) -> Gpu:
    from mpdit_kernels.hardware import GPUS, Gpu, find_gpu

    given = {name: getattr(args, f"gpu_{name}") for name in _FIGURES}
    figures = {field: given[name] * scale for name, (field, _, _, scale) in _FIGURES.items() if given[name] is not None}
    gpu = find_gpu(args.gpu)
    if gpu is not None:
        return dataclasses.replace(gpu, **figures)
    missing = [f"--gpu-{name}" for name, (field, *_) in _FIGURES.items() if field not in figures]
    if missing:
        raise ConfigError(
            f"--gpu {args.gpu} is not one of {', '.join(GPUS)}: choose one of them, or give its figures too "
            f"({', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing)"
        )
    memory, flops, bandwidth, link = (figures[field] for field, *_ in _FIGURES.values())
    return Gpu(args.gpu, args.gpu, memory, bandwidth, flops, flops / 16, (0, 0), link, "the command line")
