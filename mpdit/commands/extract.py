"""`mpdit extract`: encodes images into packed latents."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mpdit.commands.common import (
    Outcome,
    add_device,
    adder,
    channels_lines,
    check_writable,
    given_fields,
    pick_device,
    whole,
)
from mpdit.core.parser import path_text, to_path
from mpdit.core.text import counted

if TYPE_CHECKING:
    from mpdit.data.manifest import Manifest
    from mpdit.jobs.extract.extract import ExtractReport, Timing

SUMMARY = "encode a folder or archive of images into a packed data set"
DESCRIPTION = (
    "Encode images into a packed data set by Stable Diffusion's VAE or any other AutoencoderKL of diffusers: ADM's "
    "centre crop, mean and std of the posterior in fp16. IMAGES is a folder tree, a .tar or .zip, a folder of those, "
    "or FILE.zip/FOLDER. The classes are labels beside the images (webdataset's .cls and .json, EDM's dataset.json), "
    "else the top folders below what all share, else a tar or zip for each class; where that isn't clear, --classes "
    "says. Broken images are skipped and listed in "
    "OUT/extraction.json. Killed and started again it goes on where it was, and refuses if images were added, removed "
    "or changed in size (other contents of the same size go unnoticed, but for a zip's); on several nodes start it "
    "under torchrun or srun. The same options give the same bytes whatever the number of GPUs. EXIF's orientation is "
    "not applied, as ADM and DiT don't."
)
_SHOWN = 10
_OFF = 2.0
"""Bounds how many times off the VAE's usual std latents may be without a remark; pixels in 0..1 and other domains
than photographs' take less (Stable Diffusion's of ImageNet are 1.05 to 1.4 off)."""

_HELP = {
    "images": "a folder of images, a .tar, a .zip, a folder of them, or a folder in one: FILE.zip/train",
    "out": "folder to write; new, empty, or of the same job",
    "vae": "a folder that diffusers saved, or a hub id such as stabilityai/sd-vae-ft-ema (required)",
    "image_size": "side of the crop in pixels: 256, 512, or any multiple of the VAE's factor",
    "flip": "store the encoding of the mirrored image too",
    "classes": "what an image's class is: label (.cls, .json, dataset.json), folder (the top one, refused where it "
    "isn't clear), top or parent (the first or last folder of its path, in any case), archive (each tar or zip is a "
    "class), one (all images are of one); auto is the first of label, folder and archive there is",
    "dtype": "what the VAE computes in",
    "pixel_range": "what black and white are to the VAE: signed is -1..1, as it was trained and as DiT and MPDiT have "
    "it; unit is 0..1, as EDM2 and REPA have it",
    "bits": "bits that grey of 16 or 32 bits a value uses, 8 to 32 (default: 16, and pictures where 19 of 20 values "
    "need no more than 14 are left out: they may be of fewer bits, or dark)",
    "batch": "images the VAE encodes at a time, as memory allows (default: 64 at 256 pixels, 16 at 512)",
    "workers": "decoding threads for each GPU (default: this machine's cores shared out)",
    "part_images": "images of a shard; those of an unfinished one are encoded again after a kill",
    "max_skipped": "broken images to skip before giving up",
    "normalization": "constants that training normalises the latents by; auto: the paper's where they suit the data, "
    "else those measured",
    "kind": "short name of the data, such as imagenet256 (default: images and the size)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = adder(parser, _HELP)
    add("images", metavar="IMAGES", type=to_path)
    add("out", metavar="OUT", type=to_path)
    add("--vae", required=True, type=path_text, metavar="PATH_OR_HUB_ID")
    add("--image-size", type=whole(1), default=256, metavar="N")
    add("--flip", action="store_true")
    add("--classes", choices=("auto", "label", "folder", "top", "parent", "archive", "one"), default="auto")
    add_device(parser, gpus=True)
    add("--dtype", choices=("fp32", "bf16"), default="fp32")
    add("--pixel-range", choices=("signed", "unit"), default="signed")
    add("--bits", type=int, choices=range(8, 33), metavar="N")
    add("--batch", type=whole(1), metavar="N")
    add("--workers", type=whole(1), metavar="N")
    add("--part-images", type=whole(1), default=8192, metavar="N")
    add("--max-skipped", type=whole(0), default=100, metavar="N")
    add("--normalization", choices=("auto", "paper", "measured"), default="auto")
    add("--kind", metavar="NAME")


def run(args: argparse.Namespace) -> Outcome:
    from mpdit.jobs.extract.extract import ExtractOptions, extract
    from mpdit.model.vae import SIGNED, UNIT

    pick_device(args.device)
    check_writable(args.out, "OUT")
    pixel_range = {"signed": SIGNED, "unit": UNIT}[args.pixel_range]
    options = given_fields(args, ExtractOptions) | {"pixel_range": pixel_range, "processes": args.gpus}
    report = extract(args.images, args.out, args.vae, ExtractOptions(**options))
    if report is None:  # another rank's report is printed
        return Outcome(f"this rank's parts of {args.out} are done", {"path": str(args.out)})
    rates = _rates(report.timing) if report.timing else None
    notes = [*_scale_remark(report.manifest), *report.manifest.remarks()]
    figures = {
        "path": str(report.path),
        "images": report.images,
        "samples": report.manifest.num_samples,
        "classes": report.manifest.num_classes,
        "skipped": len(report.skipped),
        "skipped_images": report.skipped[:_SHOWN],
        "ignored": report.ignored,
        "ignored_kinds": report.ignored_kinds,
        "notes": [*report.notes, *notes],
        "empty_classes": report.empty_classes,
        "pixels": report.pixels,
        "statistics": dataclasses.asdict(report.manifest.statistics),
        "normalization": dataclasses.asdict(report.manifest.normalization),
        "rates": rates,
    }
    return Outcome("\n".join(_lines(report, rates, notes)), figures)


def _lines(report: ExtractReport, rates: dict[str, Any] | None, notes: list[str]) -> Iterator[str]:
    from mpdit.data.normalization import overall_std
    from mpdit.jobs.extract.decode import FACTS

    manifest = report.manifest
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    yield (
        f"{counted(manifest.num_samples, 'sample')} of {counted(manifest.num_classes, 'class', 'classes')}, "
        f"{'x'.join(map(str, manifest.record_shape))} fp16 each, {size:.1f} MB: {report.path}"
    )
    listing = report.path / "extraction.json"
    if report.skipped:
        yield f"skipped: {counted(len(report.skipped), 'broken image')}, listed in {listing}"
        yield from (f"  {name} {reason}" for name, reason in report.skipped[:_SHOWN])
        yield from ["  ..."] * (len(report.skipped) > _SHOWN)
    if report.ignored:
        told = "; ".join(f"{kind}: {count}" for kind, count in report.ignored_kinds.items())
        yield f"ignored: {counted(report.ignored, 'other file')} ({told}), the first listed in {listing}"
    for name, count in report.pixels.items():
        yield f"note: {counted(count, 'image')} {FACTS[name]}"
    if empty := report.empty_classes:
        some = ", ".join(empty[:_SHOWN]) + (", ..." if len(empty) > _SHOWN else "")
        yield f"warning: {counted(len(empty), 'class is', 'classes are')} without a sample ({some})"
    yield from channels_lines(manifest.statistics, manifest.normalization)
    if usual := manifest.decoder.get("usual_std"):
        yield f"std of all channels: {overall_std(manifest.statistics.std):.4g}; the VAE is set for {usual:.4g}"
    yield from (f"note: {remark}" for remark in notes)
    if rates is None or report.timing is None:
        yield "it was finished before: nothing was done"
        return
    remedy = {
        "decoding": "more --workers or cores would help",
        "encoding": "more or faster GPUs, or --dtype bf16, would help",
    }
    yield (
        f"each process: decoding {rates['decode_images_per_second']:.1f} img/s in {report.timing.workers} thread(s), "
        f"the VAE {rates['encode_images_per_second']:.1f} img/s, together {rates['images_per_second']:.1f} img/s; the "
        f"VAE waited for images {rates['waited_share']:.0%} of the time; {rates['bound']} bounds: "
        f"{remedy[rates['bound']]}"
    )


def _scale_remark(manifest: Manifest) -> Iterator[str]:
    """Yield a remark where the latents aren't of the std that the VAE's config.json was written for."""
    from mpdit.data.normalization import overall_std

    usual, std = manifest.decoder.get("usual_std"), overall_std(manifest.statistics.std)
    if usual and std and not 1 / _OFF < usual / std < _OFF:
        yield (
            f"the latents have std {std:.3g}, and the VAE's config.json was written for {usual:.3g}: unless that holds "
            "diffusers' default, check --pixel-range, and whether it belongs to these weights"
        )


def _rates(timing: Timing) -> dict[str, Any]:
    """Return what the decoding threads and the VAE of one process do at their most, and what both did together."""
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
