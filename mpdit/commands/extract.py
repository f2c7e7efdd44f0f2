"""`mpdit extract`: from images to packed latents."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpdit.commands.arguments import add_device, add_gpus, pick_device, whole
from mpdit.commands.outcome import Outcome
from mpdit.commands.outputs import check_new_folder
from mpdit.core.files import counted

if TYPE_CHECKING:
    from mpdit.jobs.extract.encode import Timing
    from mpdit.jobs.extract.extract import ExtractReport

SUMMARY = "encode a folder or archive of images into a packed data set"
DESCRIPTION = (
    "Encode images into a packed data set by Stable Diffusion's VAE or any other AutoencoderKL of diffusers: ADM's "
    "centre crop, mean and std of the posterior in fp16. IMAGES is a folder tree (the top folders are the classes), "
    "a .tar or a folder of them (webdataset's .cls or .json labels, else folders, else a tar for each class), a .zip "
    "or a folder of them, or either with EDM's dataset.json. Broken images are skipped and listed in "
    "OUT/extraction.json. Killed and started again it goes on where it was, and refuses if images were added, removed "
    "or changed in size (other contents of the same size go unnoticed, but for a zip's); on several nodes start it "
    "under torchrun or srun. The same options give the same bytes whatever the number of GPUs. EXIF's orientation is "
    "not applied, as ADM and DiT don't."
)
_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", metavar="IMAGES", type=Path, help="a folder of images, a .tar, a .zip")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; new, empty, or of the same job")
    parser.add_argument(
        "--vae",
        required=True,
        metavar="PATH_OR_HUB_ID",
        help="a folder that diffusers saved, or a hub id such as stabilityai/sd-vae-ft-ema (required)",
    )
    parser.add_argument(
        "--image-size",
        type=whole(1),
        default=256,
        metavar="N",
        help="side of the crop in pixels: 256, 512, or any multiple of the VAE's factor (default: 256)",
    )
    parser.add_argument("--flip", action="store_true", help="store the encoding of the mirrored image too")
    parser.add_argument(
        "--classes",
        choices=("auto", "label", "folder", "archive", "one"),
        default="auto",
        help="what an image's class is: label (.cls, .json, dataset.json), folder, archive (each tar or zip is a "
        "class), one (all images are of one); auto is the first of label, folder and archive there is (default: auto)",
    )
    add_gpus(parser)
    add_device(parser)
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="what the VAE computes in (default: fp32)"
    )
    parser.add_argument(
        "--pixel-range",
        choices=("signed", "unit"),
        default="signed",
        help="what black and white are to the VAE: signed is -1..1, as it was trained and as DiT and MPDiT have it; "
        "unit is 0..1, as EDM2 and REPA have it (default: signed)",
    )
    parser.add_argument(
        "--batch",
        type=whole(1),
        metavar="N",
        help="images the VAE encodes at a time, as memory allows (default: 64 at 256 pixels, 16 at 512)",
    )
    parser.add_argument(
        "--workers",
        type=whole(1),
        metavar="N",
        help="decoding threads for each GPU (default: this machine's cores shared out)",
    )
    parser.add_argument(
        "--part-images",
        type=whole(1),
        default=8192,
        metavar="N",
        help="images of a shard; those of an unfinished one are encoded again after a kill (default: 8192)",
    )
    parser.add_argument(
        "--max-skipped",
        type=whole(0),
        default=100,
        metavar="N",
        help="broken images to skip before giving up (default: 100)",
    )
    parser.add_argument(
        "--normalization",
        choices=("auto", "paper", "measured"),
        default="auto",
        help="constants that training normalises the latents by; auto: the paper's where they suit the data, else "
        "those measured (default: auto)",
    )
    parser.add_argument(
        "--kind", metavar="NAME", help="short name of the data, such as imagenet256 (default: images and the size)"
    )


def run(args: argparse.Namespace) -> Outcome:
    from mpdit.jobs.extract.extract import ExtractOptions, extract, holds_extraction
    from mpdit.model.vae import SIGNED, UNIT

    pick_device(args.device)
    if not holds_extraction(args.out):
        check_new_folder(args.out, "OUT")
    options = ExtractOptions(
        image_size=args.image_size,
        flip=args.flip,
        dtype=args.dtype,
        pixel_range=SIGNED if args.pixel_range == "signed" else UNIT,
        classes=args.classes,
        normalization=args.normalization,
        kind=args.kind,
        max_skipped=args.max_skipped,
        part_images=args.part_images,
        processes=args.gpus,
        device=args.device,
        batch=args.batch,
        workers=args.workers,
    )
    report = extract(args.images, args.out, args.vae, options)
    if report is None:  # another rank's report is printed
        return Outcome(f"this rank's parts of {args.out} are done", {"path": str(args.out)})
    return Outcome(_text(report), _figures(report))


def _text(report: ExtractReport) -> str:
    manifest = report.manifest
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    classes = "1 class" if manifest.num_classes == 1 else f"{manifest.num_classes} classes"
    lines = [
        f"{counted(manifest.num_samples, 'sample')} of {classes}, "
        f"{'x'.join(map(str, manifest.record_shape))} fp16 each, {size:.1f} MB: {report.path}"
    ]
    if report.skipped:
        skipped = counted(len(report.skipped), "broken image")
        lines.append(f"skipped: {skipped}, listed in {report.path / 'extraction.json'}")
        lines += [f"  {name} {reason}" for name, reason in report.skipped[:_SHOWN]]
        lines += ["  ..."] * (len(report.skipped) > _SHOWN)
    if report.ignored:
        ignored = counted(report.ignored, "other file")
        lines.append(f"ignored: {ignored}, the first listed in {report.path / 'extraction.json'}")
    if report.empty_classes:
        empty = "1 class is" if len(report.empty_classes) == 1 else f"{len(report.empty_classes)} classes are"
        lines.append(f"warning: {empty} without a sample ({_some(report.empty_classes)})")
    lines.append("channel   mean measured     in use   std measured     in use")
    measured, used = manifest.statistics, manifest.normalization
    for channel, row in enumerate(zip(measured.mean, used.mean, measured.std, used.std, strict=True)):
        lines.append(f"{channel:7d}" + "{:16.4f}{:11.4f}{:15.4f}{:11.4f}".format(*row))
    lines.append(_describe(report.timing) if report.timing else "it was finished before: nothing was done")
    return "\n".join(lines)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _describe(timing: Timing) -> str:
    rates = _rates(timing)
    remedy = {
        "decoding": "more --workers or cores would help",
        "encoding": "more or faster GPUs, or --dtype bf16, would help",
    }
    return (
        f"each process: decoding {rates['decode_images_per_second']:.1f} img/s in {timing.workers} thread(s), the VAE "
        f"{rates['encode_images_per_second']:.1f} img/s, together {rates['images_per_second']:.1f} img/s; the VAE "
        f"waited for images {rates['waited_share']:.0%} of the time; {rates['bound']} bounds: {remedy[rates['bound']]}"
    )


def _rates(timing: Timing) -> dict[str, Any]:
    """Of one process: what its decoding threads and its VAE do at their most, and what both did together."""
    tiny = 1e-9
    decode = timing.images * timing.workers / max(timing.decode, tiny)
    encode = timing.images / max(timing.encode, tiny)
    return {
        "decode_images_per_second": round(decode, 3),
        "encode_images_per_second": round(encode, 3),
        "images_per_second": round(timing.images / max(timing.total, tiny), 3),
        "waited_share": round(timing.waited / max(timing.total, tiny), 4),
        "bound": "decoding" if decode < encode else "encoding",
    }


def _figures(report: ExtractReport) -> dict[str, Any]:
    manifest = json.loads(report.manifest.to_json())
    return {
        "path": str(report.path),
        "images": report.images,
        "samples": report.manifest.num_samples,
        "classes": report.manifest.num_classes,
        "skipped": len(report.skipped),
        "skipped_images": report.skipped[:_SHOWN],
        "ignored": report.ignored,
        "empty_classes": report.empty_classes,
        "statistics": manifest["statistics"],
        "normalization": manifest["normalization"],
        "rates": _rates(report.timing) if report.timing else None,
    }
