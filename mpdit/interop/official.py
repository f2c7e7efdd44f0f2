"""Turns models of the official codes into ours and back: MPDiT, facebookresearch/DiT, fast-DiT, SiT, REPA.

`from_official` and `to_official` take state dicts. Only the head count is not in them; every tensor keeps its shape and
layout, and `official_names` is the whole map of names. `read_official` and `save_official` take checkpoint files:
`torch.save` of {"model", "ema", "opt", ..., "args": argparse.Namespace}, or of a bare state dict. What we write has one
more entry, "mpdit", with what config.json holds, so that it comes back with its head count, normalisation and history;
the official codes read theirs by name and don't meet it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpdit.core.errors import CheckpointError, first_line
from mpdit.core.files import as_path, new_file
from mpdit.data.normalization import PAPER
from mpdit.model.config import Convention, ModelConfig, StageSpec
from mpdit.model.layers import sincos_position
from mpdit.model.mpdit import MPDiT
from mpdit.model.vae import DECODER_KIND, SIGNED
from mpdit.model.weights import check_values, describe, load_tensors, parse_description

VAE_FACTOR = 8
SCALE = 0.18215
"""DiT's, fast-DiT's and SiT's models see latents of Stable Diffusion's VAE times this."""

_SIZES = {"S": (384, 6), "B": (768, 12), "L": (1024, 16), "XL": (1152, 16)}
"""Width and heads by the size in a model's name, the same in all official codes."""
_DIT_DEPTHS = {"S": 12, "B": 12, "L": 24, "XL": 28}
_MPDIT_DEPTHS = {
    "MPDiT-B/4x": ((4, 6), (2, 6)),
    "MPDiT-L/4x": ((4, 18), (2, 6)),
    "MPDiT-XL/4x": ((4, 22), (2, 6)),
    "MPDiTv2-B": ((8, 6), (4, 4), (2, 2)),
    "MPDiTv2-L": ((8, 14), (4, 6), (2, 4)),
    "MPDiTv2-XL": ((8, 14), (4, 8), (2, 6)),
}
_NAME = re.compile(r"(MPDiT|MPDiTv2|DiT|SiT)-(S|B|L|XL)(/\w+)?")
_POSITIONS = re.compile(r"pos_embed(_downsampled|_lvl\d+)?")

_RENAMED = (
    (r"^classes\.table", "y_embedder.embedding_table"),
    (r"^time\.lift", "t_embedder.fc0"),
    (r"^time\.project", "t_embedder.fc1"),
    (r"^time\.layers\.(\d+)\.pointwise", r"t_embedder.w\1"),
    (r"^time\.layers\.(\d+)\.(real|imag)", r"t_embedder.conv\1.weights_\2"),
    (r"^time\.linears\.(\d+)", lambda match: f"t_embedder.mlp.{2 * int(match[1])}"),  # SiLUs stand between
    (r"^modulation", "time_modulation.1"),
    (r"^stages\.0\.enter\.patch_embed", "x_embedder.proj"),
    (r"(blocks\.\d+)\.attention", r"\1.attn"),
    (r"(blocks\.\d+)\.modulation", r"\1.adaLN_modulation.1"),
    (r"^final\.modulation", "final_layer.adaLN_modulation.1"),
    (r"^final\.", "final_layer.linear."),
)
"""Patterns of our parameter names and the official ones; those that depend on the stage are in `_stage_names`."""


def from_official(state_dict: Mapping[str, Tensor], num_heads: int, convention: Convention = "mpdit") -> MPDiT:
    """Build our model from an official state dict; the model is in training mode, as any new module.

    Args:
        state_dict: of the official MPDiT, of facebookresearch/DiT or of SiT. Keys may carry the prefixes of
            DistributedDataParallel and torch.compile.
        num_heads: attention heads, the one figure that no shape shows.
        convention: "sit" for weights trained with t = 1 as data; the model then evaluates -v(x, 1 - t), so that it
            can be sampled and trained as ours. DiT's own weights predict noise at integer times 0..999: what loads here
            is their structure, to be fine-tuned.

    Raises:
        CheckpointError: a tensor is missing, unknown, not finite or of a shape that fits no model.
    """
    if not isinstance(state_dict, Mapping) or not state_dict:
        raise CheckpointError("state dict is empty or not a mapping of names to tensors")
    if isinstance(state_dict.get("model"), Mapping) or isinstance(state_dict.get("ema"), Mapping):
        raise CheckpointError("this is a whole checkpoint: pass its entry 'ema' (to sample) or 'model' (to train on)")
    tensors = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)): value for name, value in state_dict.items()}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name} is a {type(value).__name__}, expected a tensor")
    check_values(tensors, "state dict")
    config = _infer_config(tensors, num_heads, convention)
    model, names = MPDiT(config), official_names(config)
    _check_positions(tensors, config)
    known = {*names.values()}
    if unknown := sorted(name for name in tensors if name not in known and not _POSITIONS.fullmatch(name)):
        raise CheckpointError(f"state dict has tensors no official model has: {', '.join(unknown[:5])}")
    with torch.no_grad():
        for ours, parameter in model.named_parameters():
            shape = _shape(tensors, names[ours])
            if shape != tuple(parameter.shape):
                raise CheckpointError(
                    f"{names[ours]} has shape {shape}, expected {tuple(parameter.shape)} "
                    "from the other tensors' shapes: the state dict is damaged or of another model"
                )
            parameter.copy_(tensors[names[ours]])
    return model


def to_official(model: MPDiT) -> dict[str, Tensor]:
    """Make an official state dict of copies on the CPU, with the fixed position tables that those hold.

    `from_official` of it gives the same parameters bit for bit. The names are the official ones for any number of
    stages; which shapes the official codes have a class for is `official_model_name`.

    Raises:
        CheckpointError: the model has parts that no official code has names for.
    """
    config, problem = model.config, None
    if len(config.stages) > 1 and config.transition != "linear_linear":
        problem = f"transition {config.transition!r} (theirs is linear_linear)"
    elif config.time_embedding not in ("fno", "sinusoidal"):
        problem = f"time_embedding {config.time_embedding!r} (theirs are fno and sinusoidal)"
    elif (config.class_conditioning, config.modulation) not in (("tokens", "shared"), ("added", "per_block")):
        problem = f"class_conditioning {config.class_conditioning!r} with modulation {config.modulation!r}"
    elif not any(stage.blocks for stage in config.stages):
        problem = "no transformer blocks"
    if problem:
        raise CheckpointError(f"the official codes have no model with {problem}: keep it in mpdit's own format")
    names = official_names(config)
    state = {names[ours]: value.detach().cpu().clone().contiguous() for ours, value in model.named_parameters()}
    for level, stage in enumerate(config.stages):
        position = sincos_position(config.width, config.input_size // stage.patch)[None]
        state[_stage_names(level, len(config.stages))["position"]] = position
    return state


def official_names(config: ModelConfig) -> dict[str, str]:
    """Map our parameter names to the official ones; a part that the official codes lack keeps our name."""
    stages = [_stage_names(level, len(config.stages)) for level in range(len(config.stages))]
    parts = re.compile(rf"stages\.(\d+)\.({'|'.join(re.escape(part) for part in stages[0])})(.*)")
    names = {}
    for ours, _ in MPDiT.on_meta(config).named_parameters():
        theirs = ours
        for pattern, replacement in _RENAMED:
            theirs = re.sub(pattern, replacement, theirs)
        match = parts.fullmatch(theirs)
        names[ours] = stages[int(match[1])][match[2]] + match[3] if match else theirs
    return names


def _stage_names(level: int, levels: int) -> dict[str, str]:
    """Return the official names of a stage's parts by the beginning of ours, and of its position table."""
    suffix = f"_lvl{level}" if level and levels > 2 else ""
    blocks = "blocks" if levels == 1 else f"upsample_blocks{suffix}" if level else "downsample_blocks"
    return {
        "blocks": blocks,
        "enter.expand": f"upsampler{suffix}.proj",
        "enter.refine": f"upsampler{suffix}.refine",
        "enter.skip.embed_": f"x_embedder{'_skip' if levels == 2 else suffix}.proj.",
        "enter.skip.linear_": f"linear_skip{suffix}.",
        "position": "pos_embed_downsampled" if (level, levels) == (0, 2) else f"pos_embed{suffix}",
    }


def _infer_config(tensors: Mapping[str, Tensor], num_heads: int, convention: Convention) -> ModelConfig:
    width, channels, patch, _ = _shape(tensors, "x_embedder.proj.weight", 4)
    levels = 2 if "upsampler.proj.weight" in tensors else 1
    while f"upsampler_lvl{levels}.proj.weight" in tensors:
        levels += 1
    names = [_stage_names(level, levels) for level in range(levels)]
    patches = [patch]
    for level in range(1, levels):
        rows, _ = _shape(tensors, f"{names[level]['enter.expand']}.weight", 2)
        patches.append(patches[-1] // max(1, math.isqrt(rows // width)))
    stages = tuple(StageSpec(p, _count(tensors, f"{name['blocks']}.")) for p, name in zip(patches, names, strict=True))
    grid = math.isqrt(_shape(tensors, names[0]["position"], 3)[1])
    table_rows, table_width = _shape(tensors, "y_embedder.embedding_table.weight", 2)
    shared = "time_modulation.1.weight" in tensors
    fno = "t_embedder.fc0.weight" in tensors
    time_width = _shape(tensors, "t_embedder.fc0.weight", 2)[0] if fno else 32
    final_rows, _ = _shape(tensors, "final_layer.linear.weight", 2)
    blocks = next((name["blocks"] for name, stage in zip(names, stages, strict=True) if stage.blocks), None)
    if blocks is None:
        raise CheckpointError(
            "state dict has no transformer blocks: is this the 'model' or 'ema' entry of a checkpoint?"
        )
    hidden, _ = _shape(tensors, f"{blocks}.0.mlp.fc1.weight", 2)
    try:
        return ModelConfig(
            stages=stages,
            width=width,
            heads=num_heads,
            input_size=grid * patch,
            channels=channels,
            num_classes=table_rows - 1,
            class_tokens=max(1, table_width // width),
            class_conditioning="tokens" if shared else "added",
            modulation="shared" if shared else "per_block",
            time_embedding="fno" if fno else "sinusoidal",
            time_layers=_count(tensors, "t_embedder.conv" if fno else "t_embedder.mlp."),
            time_width=time_width,
            skip=levels == 1 or any(name.startswith("linear_skip") for name in tensors),
            mlp_ratio=hidden / width,
            learn_sigma=final_rows == 2 * patches[-1] ** 2 * channels,
            convention=convention,
        )
    except ValueError as error:
        raise CheckpointError(f"state dict describes no valid model: {error}") from error


def _check_positions(tensors: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Refuse position tables that aren't the computed ones: those are computed here too, not loaded."""
    for name, value in tensors.items():
        if not _POSITIONS.fullmatch(name):
            continue
        grid = math.isqrt(value.shape[1]) if value.ndim == 3 else 0
        fits = grid in {config.input_size // stage.patch for stage in config.stages}
        table = sincos_position(config.width, grid) if fits else None
        if table is None or value.shape != (1, *table.shape) or not torch.allclose(value[0].float(), table, atol=1e-3):
            raise CheckpointError(
                f"{name} {tuple(value.shape)} is not the fixed sin-cos table of a stage's grid: "
                "learned or interpolated positions can't be loaded"
            )


def _shape(tensors: Mapping[str, Tensor], name: str, ndim: int | None = None) -> tuple[int, ...]:
    if name not in tensors:
        raise CheckpointError(f"state dict lacks {name}: is this an official MPDiT, DiT or SiT state dict?")
    shape = tuple(tensors[name].shape)
    if ndim is not None and len(shape) != ndim:
        raise CheckpointError(f"{name} has shape {shape}, expected {ndim} dimensions")
    return shape


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Count the different numbers that follow `prefix`."""
    found = (re.match(rf"{re.escape(prefix)}(\d+)\.", name) for name in tensors)
    return len({match[1] for match in found if match})


def load_official(
    path: str | Path, num_heads: int | None = None, which: str = "ema", convention: Convention | None = None
) -> MPDiT:
    """Load the model of an official checkpoint file, in training mode, as any new module; see `read_official`."""
    return read_official(path, num_heads, which, convention)[0]


def read_official(
    path: str | Path, num_heads: int | None = None, which: str = "ema", convention: Convention | None = None
) -> tuple[MPDiT, dict[str, Any]]:
    """Load the model of an official checkpoint file and its metadata, as `mpdit.load_weights` returns them.

    Nothing but tensors, plain containers and argparse.Namespace (the official "args") is unpickled; of a file of
    several models and an optimiser's state only the tensors used are read.

    Args:
        path: a state dict, or a dict that holds one as "ema" or "model".
        num_heads: attention heads; unless given, as the file's "args" say, by themselves or by the model's name.
        which: the entry of a whole checkpoint to take; a bare state dict has none.
        convention: see `from_official`; unless given, "sit" if the file's "args" name a SiT, else "mpdit". To give one
            is to say that the weights predict a velocity; a DiT's are else taken to predict noise.

    Returns:
        The model in training mode on the CPU, and metadata: "data" as the official codes train (the paper's constants
        for MPDiT, the factor 0.18215 for DiT and SiT), or as the file was written with by `save_official`; "training",
        whose "objective" is "noise" for what `mpdit.model.weights.check_flow` is to refuse.

    Raises:
        CheckpointError: the file can't be read so, lacks the entry, says nothing of the heads, fits no model or is not
            finite.
    """
    checkpoint = load_tensors(path)
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} holds a {type(checkpoint).__name__}, expected a dict of names to tensors")
    args, ours = checkpoint.get("args"), None
    args = vars(args) if isinstance(args, argparse.Namespace) else dict(args) if isinstance(args, Mapping) else {}
    if "mpdit" in checkpoint:
        ours = parse_description(checkpoint["mpdit"], f'the entry "mpdit" of {path}')
        num_heads, convention = num_heads or ours[0].heads, convention or ours[0].convention
    state, training = checkpoint, {}
    if {"model", "ema"} & checkpoint.keys():
        if which not in checkpoint:
            raise CheckpointError(f"{path} has no entry {which!r}: it holds {', '.join(map(str, checkpoint))}")
        state, training = checkpoint[which], {"weights": which}
    if not isinstance(state, Mapping):
        raise CheckpointError(f"the entry {which!r} of {path} is a {type(state).__name__}, expected a state dict")
    if isinstance(checkpoint.get("train_steps"), int):
        training["step"] = checkpoint["train_steps"]
    kind = _kind(args, state)
    training["official"] = kind
    if kind == "DiT" and convention is None:
        training["objective"] = "noise"
    heads = num_heads or _heads(path, args, state)
    try:
        model = from_official(state, heads, convention or ("sit" if kind == "SiT" else "mpdit"))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if ours:
        return model, ours[1]
    return model, _data(model.config, args) | {"training": training}


def save_official(
    path: str | Path,
    model: MPDiT,
    ema: MPDiT | None = None,
    *,
    metadata: Mapping[str, Any] | None = None,
    args: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint that the official codes load: {"model", "ema", "opt", "epoch", "train_steps", "args"}.

    "opt" is that of an AdamW which has taken no step, so that the official train.py can go on from here.

    Args:
        path: the file, whole or not there; one of the same name is replaced.
        model: the weights of "model", and of "ema" too (stored once) unless `ema` is given.
        ema: the averaged weights, of the same configuration.
        metadata: as `mpdit.load_weights` returns it, for the way back.
        args: fields of the Namespace, beside or instead of those that follow from the model.

    Raises:
        CheckpointError: the model has parts the official codes lack, `ema` is of another configuration, or the disk
            is full.
    """
    path, metadata = as_path(path), dict(metadata or {})
    if ema is not None and ema.config != model.config:
        raise CheckpointError("model and ema are of different configurations: give the averages of the same model")
    state = to_official(model)
    namespace = argparse.Namespace(**(official_args(model.config) | dict(args or {})))
    steps = (metadata.get("training") or {}).get("step", 0)
    checkpoint = {
        "model": state,
        "ema": state if ema is None else to_official(ema),
        "opt": torch.optim.AdamW([torch.nn.Parameter(value) for value in state.values()], namespace.lr).state_dict(),
        "epoch": 0,
        "train_steps": steps if isinstance(steps, int) else 0,
        "args": namespace,
        "mpdit": json.loads(json.dumps(describe(model.config, metadata))),
    }
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with new_file(path) as partial, partial.open("wb") as stream:
            torch.save(checkpoint, stream)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()
        raise CheckpointError(f"{path} can't be written ({first_line(error)}): is the disk full?") from error


def official_model_name(config: ModelConfig) -> str | None:
    """Return the name by which the official codes build this model, such as "MPDiT-XL/4x"; None if they have none.

    A "SiT" or "DiT" is built with learn_sigma=False where the configuration says so, which their scripts don't offer.
    """
    size = next((name for name, figures in _SIZES.items() if figures == (config.width, config.heads)), None)
    if size is None or config.mlp_ratio != 4.0:
        return None
    stages = tuple((stage.patch, stage.blocks) for stage in config.stages)
    if len(stages) == 1:
        ((patch, blocks),) = stages
        plain = (config.modulation, config.time_embedding, config.time_layers) == ("per_block", "sinusoidal", 2)
        if not plain or blocks != _DIT_DEPTHS[size] or patch not in (2, 4, 8):
            return None
        return f"{'SiT' if config.convention == 'sit' else 'DiT'}-{size}/{patch}"
    fno = (config.time_embedding, config.time_layers, config.time_width) == ("fno", 3, 32)
    sinusoidal = (config.time_embedding, config.time_layers) == ("sinusoidal", 2)
    if config.learn_sigma or config.modulation != "shared" or not (fno or sinusoidal):
        return None
    found = (name for name, depths in _MPDIT_DEPTHS.items() if depths == stages and f"-{size}" in name)
    return next(found, None)


def official_args(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of "args" that the official scripts build a model by, and its shape if it has no name."""
    return {
        "model": official_model_name(config),
        "image_size": config.input_size * VAE_FACTOR,
        "resolution": config.input_size * VAE_FACTOR,
        "vae_rate": VAE_FACTOR,
        "latent_size": config.input_size,
        "vae": "ema",
        "in_channels": config.channels,
        "num_classes": config.num_classes,
        "num_condition_tokens": config.num_class_tokens,
        "time_emb": "fno" if config.time_embedding == "fno" else "mlp",
        "skip_connection": config.skip,
        "learn_sigma": config.learn_sigma,
        "hidden_size": config.width,
        "num_heads": config.heads,
        "mlp_ratio": config.mlp_ratio,
        "patch_sizes": [stage.patch for stage in config.stages],
        "depth_list": [stage.blocks for stage in config.stages],
        "lr": 1e-4,
    }


def _kind(args: Mapping[str, Any], state: Mapping[Any, Any]) -> str:
    """Return whose weights they are: "MPDiT", "DiT" or "SiT"; the latter have the same tensors, but for the name."""
    name = _NAME.fullmatch(str(args.get("model")))
    if name:
        return name[1].removesuffix("v2")
    return "MPDiT" if any("time_modulation" in str(key) for key in state) else "DiT"


def _heads(path: str | Path, args: Mapping[str, Any], state: Mapping[Any, Any]) -> int:
    heads = args.get("num_heads")
    if isinstance(heads, int) and not isinstance(heads, bool) and heads > 0:
        return heads
    width = next((len(value) for key, value in state.items() if str(key).endswith("x_embedder.proj.bias")), None)
    name = _NAME.fullmatch(str(args.get("model")))
    if name and _SIZES[name[2]][0] == width:
        return _SIZES[name[2]][1]
    known = next((f" {h}, as published models of width {w} have" for w, h in _SIZES.values() if w == width), "")
    raise CheckpointError(f"{path} does not say how many attention heads its model has: give --num-heads{known}")


def _data(config: ModelConfig, args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the "data" of models as the official codes train them; none but for Stable Diffusion's latents."""
    if config.channels != len(PAPER.mean):
        return {}
    mean, std = list(PAPER.mean), list(PAPER.std)
    if config.modulation == "per_block":
        mean, std = [0.0] * config.channels, [1 / SCALE] * config.channels
    size = config.input_size * VAE_FACTOR
    vae = "mse" if args.get("vae") == "mse" else "ema"
    return {
        "data": {
            "kind": f"imagenet{size}" if config.num_classes == 1000 else "latents",
            "normalization": {"mean": mean, "std": std},
            "decoder": {
                "kind": DECODER_KIND,
                "vae": f"stabilityai/sd-vae-ft-{vae}",
                "factor": VAE_FACTOR,
                "range": list(SIGNED),
            },
        }
    }
