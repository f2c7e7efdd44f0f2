"""`mpdit sample`: draws pictures from a trained model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mpdit.commands.common import (
    Outcome,
    add_device,
    add_sampler,
    add_weights,
    adder,
    check_writable,
    given_fields,
    pick_device,
    refuse,
    sampler,
    whole,
)
from mpdit.core.parser import path_text, to_path
from mpdit.core.text import counted
from mpdit.diffusion.sampling import SamplerSettings

if TYPE_CHECKING:
    from mpdit.jobs.sample.sample_set import DrawReport

SUMMARY = "draw samples from a trained model"
DESCRIPTION = (
    "Draw samples into DIR: samples.npz (arr_0, uint8 images as ADM's evaluator reads them; classes; the protocol they "
    "were drawn by), or images/*.png with classes.npy, or both; grid.png (the first 100); protocol.json. A VAE decodes "
    "them (--vae); digits need none; without, other latents are shown as a linear preview. What is killed goes on "
    "where it was when the command is repeated, with another --batch too, and a larger --num continues a finished set. "
    "The bytes don't depend on the number of processes; another --batch or --decode-batch may change last bits. Works "
    "under a launcher too (srun, or RANK and WORLD_SIZE), on nodes that share DIR."
)

_HELP = {
    "source": "a training run's folder (its EMA weights), a checkpoint's, a folder with model.safetensors and "
    "config.json, or the model.safetensors itself",
    "out": "folder to write: new, empty, or holding the samples of this very protocol to go on with (required)",
    "num": "number of images",
    "classes": "classes to draw (default: all of the model's)",
    "labels": "random: uniformly, keyed by seed and image, as ADM, DiT, SiT and MPDiT draw the labels of their FID; "
    "balanced: the classes in turn, equally many of each, which lowers FID a little; auto: balanced with --classes "
    "and up to 16 classes, else random",
    "vae": "AutoencoderKL that decodes the latents, such as stabilityai/sd-vae-ft-ema (default: none)",
    "vae_dtype": "what it computes in (default: fp32)",
    "data_scale": "what the model's latents were multiplied by before they were packed: 1, 0.18215, ..., or "
    "FACTOR,SHIFT where SHIFT was subtracted before; auto: by nothing, and said where that looks wrong",
    "decode_batch": "images it decodes at a time (default: 16)",
    "format": "how images are written",
    "latents": "also write latents.npy, fp32 [N, C, S, S], as the encoder makes them (default: no)",
    "cuda_graph": "replay the model's kernels from CUDA graphs; auto: on GPUs, where they can be captured",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = adder(parser, _HELP)
    add("source", metavar="RUN_OR_WEIGHTS", type=to_path)
    add("--out", type=to_path, required=True, metavar="DIR")
    add("--num", type=whole(1), default=100)
    add("--classes", type=whole(0), nargs="+", metavar="CLASS")
    add("--labels", choices=("auto", "random", "balanced"), default="auto")
    add_weights(parser)
    add_device(parser, gpus=True)
    of_images = adder(parser.add_argument_group("images"), _HELP)
    of_images("--vae", type=path_text, metavar="PATH_OR_HUB_ID")
    of_images("--vae-dtype", choices=("fp32", "bf16"))
    of_images("--data-scale", default="auto", metavar="FACTOR")
    of_images("--decode-batch", type=whole(1), metavar="N")
    of_images("--format", choices=("npz", "png", "both"), default="npz")
    of_images("--latents", action="store_true")
    add_sampler(parser, SamplerSettings(guidance=1.5, precision="auto"))
    add("--cuda-graph", choices=("auto", "on", "off"), default="auto")


def run(args: argparse.Namespace) -> Outcome:
    from mpdit.jobs.sample.drawing import DrawOptions
    from mpdit.jobs.sample.sample_set import draw
    from mpdit.training.checkpoint.weights import weights_of

    check_writable(args.out)
    if args.vae is None:
        refuse(args, ("vae_dtype", "decode_batch"), "is of the VAE, and there is none: give --vae too")
    if args.gpus == 1:
        pick_device(args.device)
    options = given_fields(args, DrawOptions) | {
        "images": args.num,
        "sampler": sampler(args),
        "files": args.format,
        "processes": args.gpus,
        "cuda_graph": {"auto": None, "on": True, "off": False}[args.cuda_graph],
    }
    report = draw(weights_of(args.source, args.weights), args.out, DrawOptions(**options))
    if report is None:  # another rank's report is printed
        return Outcome(f"this rank's part of {args.out} is done", {"out": str(args.out)})
    figures = {
        "out": str(report.out),
        "images": report.images,
        "drawn": report.drawn,
        "seconds": round(report.seconds, 3),
        "images_per_second": round(report.drawn / report.seconds, 3) if report.drawn else None,
        "notes": list(report.remarks),
        "protocol": report.protocol,
    }
    notes = [f"note: {remark}" for remark in report.remarks if not report.drawn]  # else told before
    return Outcome("\n".join([_told(report), *notes]), figures)


def _told(report: DrawReport) -> str:
    """Return in a line what was drawn, how fast, and where it lies."""
    kind = report.protocol["files"]["format"]
    names = ["grid.png", *["samples.npz"] * (kind != "png"), *["images"] * (kind != "npz")]
    places = ", ".join(str(report.out / name) for name in names)
    if not report.drawn:
        return f"{counted(report.images, 'image was', 'images were')} there already: {places}"
    images = counted(report.images, "image")
    now = "" if report.drawn == report.images else f" ({report.drawn} of them now)"
    return f"{images}{now} in {report.seconds:.1f} s, {report.drawn / report.seconds:.2f} images/s: {places}"
