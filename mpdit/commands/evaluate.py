"""`mpdit evaluate`: measures samples, or a model of the digits."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from mpdit.commands.common import (
    Outcome,
    add_device,
    add_sampler,
    add_weights,
    adder,
    check_file,
    flag,
    pick_device,
    refuse,
    sampler,
    whole,
)
from mpdit.core.errors import CheckpointError, ConfigError
from mpdit.core.files import write_atomically
from mpdit.core.parser import to_path
from mpdit.diffusion.sampling import DIGITS_SAMPLER, options

SUMMARY = "measure samples by FID and its kin, or a trained model of the digits"
DESCRIPTION = (
    "Measure images against a reference: FID, sFID, Inception Score, precision and recall, as ADM's evaluator defines "
    "them. Or make such a reference of images (--write-reference). Or measure a model of the embedded digits: class "
    "agreement (guided samples under a classifier trained on the real digits) and Frechet distance (unguided samples "
    "against the real set, in pixels). The figures and the protocol they were measured by are written to "
    "evaluation.json too, of X.npz to X.evaluation.json beside it."
)

_HELP = {
    "source": "images: a folder that `mpdit sample` wrote, images as `mpdit extract` takes them (a folder, a tar, a "
    "zip), or an npz with arr_0. Or a model of the digits: a training run's folder (its EMA weights), a folder with "
    "model.safetensors and config.json, or the model.safetensors itself",
    "out": "where to write figures and protocol as JSON (default: evaluation.json in the folder given or beside "
    "model.safetensors, X.evaluation.json beside X.npz)",
    "reference": "what to measure images against: ADM's reference npz (mu, sigma, mu_s, sigma_s, arr_0), images "
    "as `mpdit extract` takes them, or an npz of them (default: none)",
    "write_reference": "make ADM's reference npz of the images instead of measuring them (default: none)",
    "image_size": "crop the images of a reference's folder to N x N pixels, as `mpdit extract` does (default: none is "
    "cropped, they must be of one size)",
    "bits": "bits that a reference's images of more than 8 use, as `mpdit extract --bits` has it (default: the file's "
    "own)",
    "max_skipped": "broken images of a reference to leave out before giving up (default: 100)",
    "inception": "weights of torch-fidelity's Inception (default: torch hub's cache, filled by a download where empty)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = adder(parser, _HELP)
    add("source", metavar="RUN_OR_WEIGHTS_OR_SAMPLES", type=to_path)
    add_weights(parser)
    add_device(parser)
    add("--out", type=to_path, metavar="FILE")
    of_images = adder(parser.add_argument_group("images"), _HELP)
    of_images("--reference", type=to_path, metavar="REF")
    of_images("--write-reference", type=to_path, metavar="REF.npz")
    of_images("--image-size", type=whole(1), metavar="N")
    of_images("--bits", type=int, choices=range(8, 33), metavar="N")
    of_images("--max-skipped", type=whole(0), metavar="N")
    of_images("--inception", type=to_path, metavar="FILE")
    add_sampler(parser, DIGITS_SAMPLER)


def run(args: argparse.Namespace) -> Outcome:
    from mpdit.training.checkpoint.weights import weights_of

    args.source = weights_of(args.source, args.weights)
    if _is_model(args.source):
        return _measure_model(args)
    if args.write_reference is not None:
        return _write_reference(args)
    return _measure_images(args)


def _measure_model(args: argparse.Namespace) -> Outcome:
    from mpdit.jobs.evaluate.digits import evaluate_digits
    from mpdit.model.mpdit import load_weights
    from mpdit.model.weights import average_remark

    settings = sampler(args)
    refuse(
        args,
        ("reference", "write_reference", "image_size", "bits", "max_skipped", "inception"),
        f"is for images, and {args.source} is a model: draw images from it first, `mpdit sample {args.source} --out "
        "DIR`, then evaluate DIR",
    )
    device = pick_device(args.device)
    model, metadata = load_weights(args.source)
    out = _out(args)
    result = evaluate_digits(model.to(device), metadata, settings)
    figures = dataclasses.asdict(result)
    _save(out, figures)
    lines = [str(result), f"classifier on held-out real digits: {result.classifier_accuracy:.3f}", f"written to {out}"]
    if remark := average_remark(metadata):
        lines.append(f"note: {remark}: --weights raw measures the run's last weights")
    return Outcome("\n".join(lines), figures)


def _measure_images(args: argparse.Namespace) -> Outcome:
    from mpdit.jobs.evaluate.adm import Reference, check_comparable, evaluate_images
    from mpdit.jobs.evaluate.image_sets import open_images
    from mpdit.jobs.evaluate.inception import Inception

    if args.reference is None:
        if not args.source.exists():
            raise ConfigError(f"{args.source} does not exist: give images, a run's folder or a folder of weights")
        raise ConfigError(
            f"{args.source} holds no weights: to measure images give --reference REF.npz as well, to measure a model "
            "a run's folder or a folder with model.safetensors and config.json"
        )
    _refuse_sampler(args)
    out, device = _out(args), pick_device(args.device)
    samples, reference = open_images(args.source), Reference(args.reference, args.image_size, **_reading(args))
    check_comparable(samples, reference)
    inception = Inception(args.inception, device)
    result = evaluate_images(samples, reference, inception, batch=args.batch)
    figures = dataclasses.asdict(result)
    _save(out, figures)
    return Outcome(f"{result}\n{len(samples)} samples against {args.reference}; written to {out}", figures)


def _reading(args: argparse.Namespace) -> dict[str, Any]:
    """Return how a reference's images are read, as far as it was given."""
    return {name: getattr(args, name) for name in ("bits", "max_skipped") if getattr(args, name) is not None}


def _write_reference(args: argparse.Namespace) -> Outcome:
    from mpdit.jobs.evaluate.adm import write_reference
    from mpdit.jobs.evaluate.image_sets import open_images
    from mpdit.jobs.evaluate.inception import Inception

    path = args.write_reference
    refuse(args, ("reference", "out"), "doesn't go with --write-reference, which measures nothing: leave it out")
    _refuse_sampler(args)
    check_file(path, "--write-reference")
    if path.suffix != ".npz" or path.exists():
        reason = "exists: nothing is overwritten, so give a new name" if path.exists() else "must end in .npz"
        raise ConfigError(f"--write-reference {path} {reason}")
    device = pick_device(args.device)
    images = open_images(args.source, args.image_size, **_reading(args))
    inception = Inception(args.inception, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = write_reference(images, path, inception, batch=args.batch)
    text = f"statistics of {figures['images']} images and {figures['kept_images']} of them: {path}"
    return Outcome("\n".join([text, *(f"warning: {warning}" for warning in figures["warnings"])]), figures)


def _save(out: Path, figures: dict[str, Any]) -> None:
    """Write the figures as a JSON file, replacing an older one as a whole; folders are made where missing."""
    from mpdit.jobs.npz import disk

    with disk(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, json.dumps(figures, indent=2) + "\n")


def _is_model(path: Path) -> bool:
    from mpdit.model.weights import weights_folder

    try:
        weights_folder(path)
    except CheckpointError:
        return path.suffix == ".safetensors"  # what is wrong with it is told when it is loaded
    return True


def _out(args: argparse.Namespace) -> Path:
    """Return where the figures go, checked before the work."""
    given: Path = args.source
    while not given.exists() and given != given.parent:  # a folder in an archive
        given = given.parent
    if given.is_dir():
        default = given / "evaluation.json"
    elif given.suffix == ".npz":
        default = given.with_suffix(".evaluation.json")  # several lie in one folder
    else:
        default = given.with_name("evaluation.json")
    out: Path = args.out or default
    check_file(out)
    return out


def _refuse_sampler(args: argparse.Namespace) -> None:
    """Raise ConfigError for settings of the sampler: images are drawn already. --batch is theirs too."""
    asked, usual = sampler(args), vars(DIGITS_SAMPLER) | {name: entry.default for name, entry in options().items()}
    for name, value in {**vars(asked), **asked.own}.items():
        if name not in ("batch", "own") and value != usual[name]:
            raise ConfigError(
                f"{flag(name)} is for models, and {args.source} holds images, drawn already: leave it out"
            )
