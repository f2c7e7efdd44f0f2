"""`mpdit sample`: pictures from a trained model."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from mpdit.commands.arguments import add_sampler, add_weights, load_model, sampler, whole
from mpdit.commands.outcome import Outcome
from mpdit.commands.outputs import check_new_folder
from mpdit.errors import ConfigError
from mpdit.evaluation.sampler import Sampler

SUMMARY = "draw samples from a trained model"
DESCRIPTION = (
    "Draw samples and write DIR/grid.png (a picture of the first 100) and DIR/samples.npz (images uint8, latents as "
    "the encoder makes them, classes, and the protocol they were drawn by). Digits are decoded; other latents are "
    "shown as a linear preview at latent resolution."
)
_IN_GRID = 100
_FEW_CLASSES = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_weights(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write, new or empty (required)"
    )
    parser.add_argument("--num", type=whole(1), default=100, help="number of images (default: 100)")
    parser.add_argument(
        "--classes",
        type=whole(0),
        nargs="+",
        metavar="CLASS",
        help="classes to draw in turn "
        f"(default: all in turn up to {_FEW_CLASSES} classes, else random, keyed by seed and image)",
    )
    add_sampler(parser, Sampler(guidance=1.5))


def run(args: argparse.Namespace) -> Outcome:
    import numpy as np
    import torch

    from mpdit.evaluation.generate import generate
    from mpdit.images import decode, denormalize, save_sample_grid

    check_new_folder(args.out)
    settings = sampler(args)
    model, metadata = load_model(args)
    data = metadata.get("data", {})
    decode(torch.zeros(1, model.config.channels, 2, 2), data)  # data that can't be decoded fails before the work
    classes = _choose(args.num, args.classes, model.config.num_classes, args.seed)
    started = time.perf_counter()
    latents = generate(model, classes, settings, label="samples")
    seconds = time.perf_counter() - started

    protocol = {"weights": str(args.weights), "training": metadata.get("training"), **settings.protocol()}
    args.out.mkdir(parents=True, exist_ok=True)
    np.savez(
        args.out / "samples.npz",
        images=decode(latents, data),
        latents=denormalize(latents, data).numpy(),
        classes=np.array(classes),
        protocol=json.dumps(protocol),
    )
    save_sample_grid(args.out / "grid.png", latents[:_IN_GRID], data, classes=classes[:_IN_GRID])
    figures = {
        "out": str(args.out),
        "images": len(classes),
        "seconds": round(seconds, 3),
        "images_per_second": round(len(classes) / seconds, 3),
        "protocol": protocol,
    }
    text = f"{len(classes)} images in {seconds:.1f} s: {args.out / 'grid.png'}, {args.out / 'samples.npz'}"
    return Outcome(text, figures)


def _choose(num: int, asked: list[int] | None, num_classes: int, seed: int) -> list[int]:
    """A class for each image, the same for image i whatever the number of images."""
    if asked:
        for label in asked:
            if label >= num_classes:
                raise ConfigError(f"--classes {label} is not one of the model's: choose from 0 .. {num_classes - 1}")
        return [asked[i % len(asked)] for i in range(num)]
    if num_classes <= _FEW_CLASSES:
        return [i % num_classes for i in range(num)]
    import torch

    from mpdit.rng import Stream, bits

    words = bits(seed, Stream.SAMPLE_CLASS, torch.arange(num), 1)[:, 0]
    return (words * num_classes >> 32).tolist()  # unbiased to num_classes / 2**32
