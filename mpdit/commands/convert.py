"""`mpdit convert`: converts models and latents from and to other projects' formats."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpdit.commands.common import (
    Outcome,
    add_data,
    add_weights,
    adder,
    channels_lines,
    check_file,
    check_new_folder,
    open_data,
    refuse,
    whole,
)
from mpdit.core.errors import ConfigError
from mpdit.core.files import new_folder
from mpdit.core.parser import path_text, to_path

if TYPE_CHECKING:
    from mpdit.model.mpdit import MPDiT

SUMMARY = "convert checkpoints and latents from and to other projects' formats"
DESCRIPTION = (
    "Convert another project's model (a checkpoint of MPDiT, DiT, SiT, REPA or REPA-E, a safetensors file, a diffusers "
    "folder) to a weights folder; a training run or weights folder to an official checkpoint or a diffusers pipeline; "
    "or latents extracted by MPDiT, fast-DiT, EDM2, REPA or LightningDiT to a packed data set. What SOURCE is, is "
    "found by looking at it, and said. OUT is there whole or not at all."
)

_THEIRS = "another project's model as SOURCE"
_RUN = "a run or a checkpoint as SOURCE"
_OPTIONS = {
    "--to latents": ("normalization", "shard_records"),
    "--to latents and --to diffusers": ("data_scale",),
    "--to diffusers": ("vae",),
    _THEIRS: ("num_heads", "which", "convention"),
    f"{_THEIRS} and --to latents": ("num_classes",),
    _RUN: ("weights",),
}
"""The options by the kinds of conversion that read them."""

_CHECKPOINTS = (".pt", ".pth", ".ckpt", ".pkl")

_HELP = {
    "source": "another project's checkpoint or diffusers folder, a training run's or weights folder, or latents",
    "out": "folder to write, new or empty; with --to official also a new file that ends in .pt or .pth",
    "to": "weights: model.safetensors and config.json; official: a checkpoint that the official codes load; diffusers: "
    "a pipeline folder; latents: a packed data set (default: weights for a checkpoint, latents for data; a model of "
    "ours needs it)",
    "num_heads": "attention heads (default: those that the checkpoint names)",
    "which": "which of its weights to take (default: ema)",
    "convention": "of weights that predict a velocity: sit if trained with t = 1 as data, mpdit if with t = 0 "
    "(default: as the project trains that the checkpoint shows; DiT's weights are taken to predict noise)",
    "shard_records": "records in a shard (default: as many as make 1 GiB)",
    "vae": "the AutoencoderKL to put into the pipeline (default: none, the pipeline then makes latents)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = adder(parser, _HELP)
    add("source", metavar="SOURCE", type=to_path)
    add("out", metavar="OUT", type=to_path)
    add_weights(parser)
    add("--to", choices=("weights", "official", "diffusers", "latents"))
    of_official = adder(parser.add_argument_group(_THEIRS), _HELP)
    of_official("--num-heads", type=whole(1), metavar="N")
    of_official("--which", choices=("ema", "model"))
    of_official("--convention", choices=("mpdit", "sit"))
    latents = parser.add_argument_group("--to latents")
    add_data(latents)
    adder(latents, _HELP)("--shard-records", type=whole(1), metavar="N")
    adder(parser.add_argument_group("--to diffusers"), _HELP)("--vae", type=path_text, metavar="PATH_OR_HUB_ID")


def run(args: argparse.Namespace) -> Outcome:
    from mpdit.interop.source import is_foreign
    from mpdit.training.checkpoint.weights import is_checkpoint

    if not args.source.exists():
        raise ConfigError(f"{args.source} does not exist: give a checkpoint, a run, a weights folder or latents")
    latents = args.to == "latents" or args.source.suffix.lower() == ".zip"  # EDM2's may be
    theirs = not latents and is_foreign(args.source)
    target = args.to or _deduce(args.source, theirs or args.weights == "raw" or is_checkpoint(args.source))
    read = {f"--to {target}", _THEIRS if theirs else _RUN if target != "latents" else ""}
    for kinds, names in _OPTIONS.items():
        if not any(kind and kind in kinds for kind in read):
            refuse(args, names, f"has no effect on {args.source} --to {target}: it is for {kinds}, leave it out")
    return _pack(args) if target == "latents" else _convert_model(args, theirs, target)


def _deduce(source: Path, to_weights: bool) -> str:
    if to_weights:
        return "weights"
    if source.name == "model.safetensors" or any((source / sub / "model.safetensors").is_file() for sub in ("", "ema")):
        raise ConfigError(f"{source} holds a model's weights: say what to make of them, --to official or diffusers")
    from mpdit.data.open import READERS

    if not any(reader.find(source) for reader in READERS):
        held = [file for depth in ("*", "*/*") for file in source.glob(depth) if file.suffix in _CHECKPOINTS]
        if held:
            raise ConfigError(f"{source} holds checkpoints: give one of them, such as {max(held)}")
    return "latents"


def _convert_model(args: argparse.Namespace, theirs: bool, target: str) -> Outcome:
    from mpdit.data.normalization import parse_scale
    from mpdit.diffusion.images import unscaled
    from mpdit.interop.diffusers_folder import save_diffusers
    from mpdit.interop.official import official_model_name, read_official, save_official
    from mpdit.model.mpdit import MPDiT, load_weights
    from mpdit.model.weights import average_remark, save_weights
    from mpdit.training.checkpoint.weights import is_checkpoint, read_checkpoint

    to_file = target == "official" and args.out.suffix.lower() in (".pt", ".pth")
    if to_file and args.out.exists():
        raise ConfigError(f"OUT {args.out} exists: give a new file, nothing is overwritten")
    (check_file if to_file else check_new_folder)(args.out, "OUT")
    if theirs:
        said = (args.num_heads, args.which or "ema", args.convention, args.num_classes)
        model, metadata = read_official(args.source, *said)
    elif args.weights == "raw" or is_checkpoint(args.source):
        config, tensors, metadata = read_checkpoint(args.source, args.weights or "ema")
        model = MPDiT.from_tensors(config, tensors, args.source)
    else:
        model, metadata = load_weights(args.source)
    made: Path = args.out
    remark = average_remark(metadata)
    remarks = [f"{remark}: --weights raw takes the run's last weights"] if remark else []
    if target == "weights":
        with new_folder(args.out) as partial:
            save_weights(partial, model.state_dict(), model.config, metadata)
    elif target == "official":
        made = args.out if to_file else args.out / "official.pt"
        save_official(made, model, metadata=metadata)
    else:
        if scale := parse_scale(args.data_scale or "auto"):
            metadata = {**metadata, "data": unscaled(metadata.get("data") or {}, scale, model.config.channels)}
        remarks += save_diffusers(args.out, model, metadata, args.vae)
    figures = {
        "source": str(args.source),
        "to": target,
        "out": str(made),
        "official_name": official_model_name(model.config),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "model": model.config.to_dict(),
        "data": metadata.get("data"),
        "training": metadata.get("training"),
        "notes": remarks,
    }
    return Outcome("\n".join([*_lines(model, figures), *(f"note: {remark}" for remark in remarks)]), figures)


def _lines(model: MPDiT, figures: dict[str, Any]) -> Iterator[str]:
    """Yield what was made, and notes on what the files can't say."""
    from mpdit.data.normalization import channels_text

    config, data, training = model.config, figures["data"] or {}, figures["training"] or {}
    stages = ", ".join(f"{stage.blocks} of patch {stage.patch}" for stage in config.stages)
    yield f"{figures['to']}: {figures['out']}"
    yield (
        f"{figures['official_name'] or 'a model of no official name'}: blocks {stages}; width {config.width}, "
        f"{config.heads} heads, {config.num_classes} classes, {figures['parameters'] / 1e6:.2f} M parameters, "
        f"convention {config.convention}"
    )
    if constants := data.get("normalization"):
        yield f"latents: mean {channels_text(constants['mean'])}; std {channels_text(constants['std'])}"
    yield from (f"note: {note}" for note in training.get("notes", ()))
    if not data:
        yield 'note: no constants are known to decode its latents by: add "data" to config.json'
    if figures["to"] == "official" and not figures["official_name"]:
        yield "note: the official codes' scripts have no name for this shape; their classes take it by args"


def _pack(args: argparse.Namespace) -> Outcome:
    from mpdit.core.progress import bar
    from mpdit.data.convert import convert_latents

    if Path(os.path.realpath(args.out)).is_relative_to(os.path.realpath(args.source)):
        raise ConfigError(f"OUT {args.out} is inside {args.source}, which is being read: give a folder elsewhere")
    dataset = open_data(args, args.source)
    with contextlib.closing(dataset), bar("packing", len(dataset), "rec") as shown:
        packed = convert_latents(dataset, args.out, shard_records=args.shard_records, progress=shown.update)
    manifest, remarks = packed.manifest, dataset.manifest.remarks()
    packed.close()
    figures = {
        "source": str(args.source),
        "to": "latents",
        "out": str(args.out),
        "samples": manifest.num_samples,
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "shape": list(manifest.record_shape),
        "num_classes": manifest.num_classes,
        "posterior_noise": manifest.posterior_noise,
        "data": manifest.metadata(),
        "statistics": dataclasses.asdict(manifest.statistics),
        "origin": dict(manifest.source),
        "notes": remarks,
    }
    lines = [
        f"latents: {args.out}",
        f"samples: {manifest.num_samples} of {manifest.num_classes} classes in {len(manifest.shards)} shard(s)",
        f"source: {manifest.describe_source()}",
        *channels_lines(manifest.statistics, manifest.normalization),
        *(f"note: {remark}" for remark in remarks),
    ]
    return Outcome("\n".join(lines), figures)
