"""Checkpoint files of the official codes, read and written: MPDiT, facebookresearch/DiT, fast-DiT, SiT, REPA.

They are `torch.save` of {"model", "ema", "opt", ..., "args": argparse.Namespace}, or of a bare state dict. What we
write has one more entry, "mpdit", with what config.json holds, so that it comes back with its head count, normalisation
and history; the official codes read theirs by name and don't meet it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mpdit.core.errors import CheckpointError
from mpdit.core.files import new_file
from mpdit.data.normalization import PAPER
from mpdit.model.config import Convention, ModelConfig
from mpdit.model.mpdit import MPDiT
from mpdit.model.official import from_official, to_official
from mpdit.model.vae import DECODER_KIND, SIGNED
from mpdit.model.weights import describe, load_tensors, parse_description

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


def load_official(
    path: str | Path, num_heads: int | None = None, which: str = "ema", convention: Convention | None = None
) -> MPDiT:
    """The model of an official checkpoint file, in training mode, as any new module; see `read_official`."""
    return read_official(path, num_heads, which, convention)[0]


def read_official(
    path: str | Path, num_heads: int | None = None, which: str = "ema", convention: Convention | None = None
) -> tuple[MPDiT, dict[str, Any]]:
    """The model of an official checkpoint file and its metadata, as `mpdit.load_weights` returns them.

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
    checkpoint = _load(path)
    args, ours = _arguments(checkpoint), None
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
    path, metadata = Path(path), dict(metadata or {})
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
        raise CheckpointError(f"{path} can't be written ({_reason(error)}): is the disk full?") from error


def official_model_name(config: ModelConfig) -> str | None:
    """The name by which the official codes build this model, for example "MPDiT-XL/4x"; None if they have no such.

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
    """The fields of "args" that the official scripts build a model by, and its shape where they have no name for it."""
    return {
        "model": official_model_name(config),
        "image_size": config.input_size * VAE_FACTOR,
        "resolution": config.input_size * VAE_FACTOR,
        "vae_rate": VAE_FACTOR,
        "latent_size": config.input_size,
        "vae": "ema",
        "in_channels": config.channels,
        "num_classes": config.num_classes,
        "num_condition_tokens": config.prefix_tokens,
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


def _load(path: str | Path) -> dict[Any, Any]:
    checkpoint = load_tensors(path)
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} holds a {type(checkpoint).__name__}, expected a dict of names to tensors")
    return checkpoint


def _arguments(checkpoint: Mapping[Any, Any]) -> dict[str, Any]:
    args = checkpoint.get("args")
    if isinstance(args, argparse.Namespace):
        return vars(args)
    return dict(args) if isinstance(args, Mapping) else {}


def _kind(args: Mapping[str, Any], state: Mapping[Any, Any]) -> str:
    """Which project's weights: "MPDiT", "DiT" or "SiT", which have the same tensors and differ by name alone."""
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
    """The "data" of models as the official codes train them; nothing for other latents than Stable Diffusion's."""
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


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
