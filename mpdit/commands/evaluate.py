"""`mpdit evaluate`: the figures of a trained model."""

from __future__ import annotations

import argparse
from pathlib import Path

from mpdit.commands.arguments import add_sampler, add_weights, load_model, sampler
from mpdit.commands.outcome import Outcome
from mpdit.commands.outputs import check_file
from mpdit.evaluation.sampler import DIGITS_SAMPLER

SUMMARY = "measure a trained model of the digits"
DESCRIPTION = (
    "Measure a model of the embedded digits: class agreement (guided samples under a classifier trained on the real "
    "digits) and Frechet distance (unguided samples against the real set, in pixels). The figures and the "
    "protocol they were measured by are written to evaluation.json too."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_weights(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where to write figures and protocol as JSON "
        "(default: evaluation.json in the folder given, or beside the file)",
    )
    add_sampler(parser, DIGITS_SAMPLER)


def run(args: argparse.Namespace) -> Outcome:
    from mpdit.evaluation.digits import check_digits, evaluate_digits

    settings = sampler(args)
    model, metadata = load_model(args)
    check_digits(metadata)
    folder = args.weights if args.weights.is_dir() else args.weights.parent
    out = args.out or folder / "evaluation.json"
    check_file(out)
    result = evaluate_digits(model, metadata, settings, progress=True)
    result.save(out)
    text = f"{result}\nclassifier on held-out real digits: {result.classifier_accuracy:.3f}\nwritten to {out}"
    return Outcome(text, result.to_dict())
