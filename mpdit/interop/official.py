"""Reads models of other projects' files and folders, and writes checkpoints that the official codes load.

projects.py says what such a file is, state_dict.py turns its tensors into ours. `save_official` writes `torch.save` of
{"model", "ema", "opt", ..., "args": argparse.Namespace} with one more entry, "mpdit", with what config.json holds, so
that it comes back with its head count, normalisation and history; the official codes read theirs by name.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpdit.core.errors import CheckpointError, first_line
from mpdit.core.files import as_path, new_file
from mpdit.core.text import counted
from mpdit.data.normalization import KNOWN_SCALES, PAPER
from mpdit.data.readers.npy import SD_SCALE
from mpdit.interop.arguments import CONSTANTS
from mpdit.interop.diffusers_folder import from_pipeline
from mpdit.interop.projects import (
    CLASSES,
    HEADS,
    SCALING,
    Project,
    check_arguments,
    find_model,
    identify,
    model_name,
)
from mpdit.interop.source import is_our_pipeline, load_source
from mpdit.interop.state_dict import (
    CLASS_TABLE,
    as_official,
    build,
    count_classes,
    infer_config,
    to_official,
    with_null_row,
)
from mpdit.model.config import Convention, ModelConfig
from mpdit.model.mpdit import MPDiT
from mpdit.model.vae import DECODER_KIND, SIGNED
from mpdit.model.weights import check_flow, describe, parse_description

VAE_FACTOR = 8

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
_SAY = "give --convention sit if t = 1 is data, mpdit if it is noise"
_ASSUMED = (
    "nothing in it says whose it is: its t and v are taken to be this run's; if it is DiT's, which predicts noise, its "
    "structure is a start, no more"
)
_NEVER_ZERO = re.compile(r".*blocks.*\.\d+\.(attn\.qkv|mlp\.fc1)\.weight")
"""Matches weights that no model begins as zeros; downloads that were cut short may leave them so."""
_PUBLISHED = re.compile(r"(?:.*sd-vae-ft-)?(ema|mse)(?:-original|\.\w+|/)?")
"""Matches the VAEs of Stable Diffusion that the projects train with."""
_NAMES_VAE = re.compile(
    r"(vae|auto_?encoder|first_stage)(_type|_kind|[._](path|name|model|id|model_name|repo\w*|pretrained\w*))?"
)
_NAME = re.compile(r"(?:MPDiT|MPDiTv2|LightningDiT|DiT|SiT)-(S|B|L|XL)(?:/(\w+))?")


def load_official(
    path: str | Path,
    num_heads: int | None = None,
    which: str = "ema",
    convention: Convention | None = None,
    num_classes: int | None = None,
) -> MPDiT:
    """Load the model of `read_official`, in training mode, as any new module; its `metadata` says what it is.

    What was concluded of it, and from what, is warned of (UserWarning), a line each. Who trains it to something else
    empties its `metadata`, by which `mpdit.sample` refuses what is no velocity. Arguments and errors are those of
    `read_official`.
    """
    model, metadata = read_official(path, num_heads, which, convention, num_classes)
    model.metadata = metadata
    for note in metadata.get("training", {}).get("notes", ()):
        warnings.warn(f"{path}: {note}", stacklevel=2)
    return model


def read_official(
    path: str | Path,
    num_heads: int | None = None,
    which: str = "ema",
    convention: Convention | None = None,
    num_classes: int | None = None,
    *,
    fallback: ModelConfig | None = None,
) -> tuple[MPDiT, dict[str, Any]]:
    """Load a model from elsewhere and its metadata, as `mpdit.load_weights` returns them.

    Nothing but tensors, plain containers and argparse.Namespace (the official "args") is unpickled; of a file of
    several models and an optimiser's state only the tensors used are read. Whose it is, `mpdit.interop.projects` says.

    Args:
        path: a checkpoint of torch.save, a safetensors file, or a folder of diffusers or of the hub.
        num_heads: attention heads; unless given, as the file's arguments say, by themselves or by the model's name.
        which: which of a checkpoint's weights to take, "ema" or "model"; a bare state dict has one.
        convention: see `from_official`; unless given, its project's. To give one is to say that the weights predict a
            velocity, where the file says nothing of what they predict.
        num_classes: see `from_official`; unless given, as the file's arguments say.
        fallback: what the file leaves open is as in this configuration: heads, classes, and the convention of a file
            that doesn't show whose it is.

    Returns:
        The model in training mode on the CPU, and metadata: "data" as the project trains, or as the file was written
        with by `save_official` or `save_diffusers`; "training", whose "notes" are lines that say what was concluded
        from what, "objective" what the weights predict if no velocity of a straight path (`check_flow`), and
        "class_dropout" how often they were trained without a class, where that is known (`check_guidance`).

    Raises:
        CheckpointError: the file can't be read so, lacks the entry, says nothing of the heads, leaves open how many
            classes there are, is of another kind, not whole, or not finite.
    """
    path = as_path(path)
    checkpoint = load_source(path)
    if is_our_pipeline(checkpoint):
        return from_pipeline(checkpoint, path)
    found = find_model(checkpoint, which, path)
    identity = identify(found)
    said = found.arguments
    try:
        if identity.against and not convention:
            raise CheckpointError(f"{identity.against}: {_SAY}")
        for names, option, given in ((HEADS, "num-heads", num_heads), (CLASSES, "num-classes", num_classes)):
            if (name := next((name for name in names if name in found.disputed), None)) and not given:
                raise CheckpointError(f"its {name} is {found.disputed[name]}: give --{option}")
        unread = check_arguments(found, identity.project, velocity=not (identity.objective or convention))
        tensors = as_official(found.tensors, identity.project, said)
        if "mpdit" in checkpoint:
            config, metadata = parse_description(checkpoint["mpdit"], 'the entry "mpdit"')
            fields = {"heads": num_heads, "convention": convention}
            return build(tensors, config.replace(**{k: v for k, v in fields.items() if v is not None})), metadata
        heads = num_heads or _heads(said, tensors, fallback)
        assumed = fallback is not None and not (identity.known_by or convention)
        chosen = fallback.convention if fallback and assumed else convention
        dropout, unclear = _class_dropout(said)
        classes, about_classes = count_classes(tensors, num_classes, said, fallback, dropout, unclear)
        config = infer_config(tensors, heads, chosen or identity.project.convention, classes)
        _check_named(said, config)
        model = build(with_null_row(tensors, classes), config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    objective = None if chosen and not identity.stated else identity.objective
    dropout = 0.0 if len(tensors[CLASS_TABLE]) == classes else dropout
    data = _data(config, identity.project, said, found.tensors)
    left_out = sorted({name.partition(".")[0] for name in found.tensors if re.match(identity.project.extra, name)})
    notes = [
        _ASSUMED if assumed else identity.describe(convention, objective),
        *([f"its latents are those of {vae}"] if (vae := data.get("decoder", {}).get("vae")) else []),
        *_doubts_of_vae(said, identity.project, data),
        *([about_classes] if about_classes else []),
        *([f"{_told(said, unclear)} may say how often classes were dropped, and is not read"] if unclear else []),
        *([f"left out, as sampling doesn't need them: {', '.join(left_out)}"] if left_out else []),
        *unread,
        *found.notes,
        *_doubts(config, num_heads, _stated_heads(said), tensors),
    ]
    # A bare file's convention, where given, shows whose figures it may repeat.
    origin = identity.project.name if identity.known_by or not convention else {"sit": "SiT"}.get(convention)
    training: dict[str, Any] = {"official": origin, "weights": found.weights, "step": found.step}
    training |= {"objective": objective, "class_dropout": dropout, "notes": notes}
    training = {name: value for name, value in training.items() if value is not None}
    return model, ({"data": data} if data else {}) | {"training": training}


def _told(said: Mapping[str, Any], names: Sequence[str]) -> str:
    return "its " + ", ".join(f"{name} {said[name]!r:.40}" for name in names)


def _doubts(config: ModelConfig, given: int | None, stated: int | None, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield what may be amiss with a model that could be read."""
    if official_model_name(config) is None and config.width in {width for width, _ in _SIZES.values()}:
        yield f"no official model of width {config.width} has its blocks: if one was meant, it is not whole"
    if given and stated and given != stated:
        yield f"warning: {given} heads are taken as given, against its {stated}"
    empty = [name for name in sorted(tensors) if _NEVER_ZERO.fullmatch(name) and not tensors[name].any()]
    if empty:
        matrices = counted(len(empty), "matrix", "matrices")
        yield f"warning: {matrices}, such as {empty[0]}: all zero, so is the file whole?"


def _check_named(said: Mapping[str, Any], config: ModelConfig) -> None:
    """Refuse a file of fewer or more blocks than it says, or than the model it names, if of its width and stages."""
    name, count = model_name(said), config.stages[0].blocks
    for depth in ("depth", "num_layers"):
        if len(config.stages) == 1 and type(said.get(depth)) is int and said[depth] != count:
            raise CheckpointError(f"its {depth} is {said[depth]}, and it holds {count} blocks: the file is not whole")
    match = _NAME.fullmatch(name)
    if not match or _SIZES[match[1]][0] != config.width:
        return
    depths = _MPDIT_DEPTHS.get(name)
    if depths is None and not name.startswith("MPDiT") and str(match[2]).isdigit():
        depths = ((int(match[2]), _DIT_DEPTHS[match[1]]),)
    held = tuple((stage.patch, stage.blocks) for stage in config.stages)
    if depths and [p for p, _ in depths] == [p for p, _ in held] and depths != held:
        blocks = [", ".join(str(count) for _, count in stages) for stages in (depths, held)]
        raise CheckpointError(f"it names a {name}, of {blocks[0]} blocks, and holds {blocks[1]}: the file is not whole")


_OF_CLASSES = re.compile(r".*(class|label|cond|caption|text|cfg|guidance|null|(^|_)y(_|$))")
"""Names of arguments about classes; with "drop" they say how often the class was dropped."""
_SHARE = re.compile(r"(.*_)?(p|prob\w*|rate|ratio|fraction|puncond)(_.*)?")
_NO_CLASS = re.compile(r".*(uncond|null|class(ifier)?_?free|(^|_)cfg?(_|$))")
"""Names of arguments about training without a class; with a share, the same."""
_OTHER_DROP = re.compile(r".*(attn|attention|mlp|ffn|proj|path|resid|last)")


def _class_dropout(said: Mapping[str, Any]) -> tuple[float | None, list[str]]:
    """Return how often classes were dropped, where the arguments say it, and all the same; and what may say it."""
    shares: dict[str, float] = {}
    unclear = []
    for name, value in said.items():
        drops, is_share = "drop" in name and not _OTHER_DROP.match(name), bool(_SHARE.fullmatch(name))
        number = type(value) in (int, float)
        if (drops and _OF_CLASSES.match(name)) or (is_share and _NO_CLASS.match(name)):
            # REPA's model drops a tenth whatever its --cfg-prob says: 0 there does not mean that no class was dropped.
            if value is False or (number and 0 <= value < 1 and (value or name != "cfg_prob")):
                shares[name] = float(value)
            elif number:
                unclear.append(name)
        elif (number and not value and ((drops and is_share) or re.match(".*(uncond|class(ifier)?_free)", name))) or (
            name == "use_cfg" and not value
        ):
            unclear.append(name)
    found = set(shares.values())
    if len(found) != 1 or ("use_cfg" in unclear and found != {0.0}):
        return None, [*shares, *unclear]
    return found.pop(), []


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
        ConfigError: by the metadata the weights predict no velocity.
    """
    path, metadata = as_path(path), dict(metadata or {})
    check_flow(metadata)
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


def _stated_heads(said: Mapping[str, Any]) -> int | None:
    found = (said.get(name) for name in HEADS)
    return next((heads for heads in found if type(heads) is int and heads > 0), None)


def _heads(said: Mapping[str, Any], tensors: Mapping[str, Tensor], fallback: ModelConfig | None) -> int:
    if stated := _stated_heads(said):
        return stated
    width = len(tensors["x_embedder.proj.bias"]) if "x_embedder.proj.bias" in tensors else None
    size = said.get("head_dim", said.get("attention_head_dim"))
    if width and type(size) is int and size > 0 and width % size == 0:
        return width // size
    named = _NAME.fullmatch(model_name(said))
    if named and _SIZES[named[1]][0] == width:
        return _SIZES[named[1]][1]
    if fallback:
        return fallback.heads
    known = next((f" {h}, as published models of width {w} have" for w, h in _SIZES.values() if w == width), "")
    raise CheckpointError(f"it does not say how many attention heads its model has: give --num-heads{known}")


def _data(
    config: ModelConfig, project: Project, said: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return the "data" of models as their project trains them; none where its latents' constants aren't known."""
    if _stated_constants(said):
        return {}
    scale, shift = _stated_scaling(said)
    mean, std = [shift or 0.0] * config.channels, [1 / (scale or SD_SCALE)] * config.channels
    running = [tensors.get(f"bn.running_{name}") for name in ("mean", "var")]
    multiplier = said.get("latent_multiplier", SD_SCALE)
    if project.latents == "paper":
        mean, std = list(PAPER.mean), list(PAPER.std)
    elif project.latents == "batch norm" and all(value is not None for value in running):
        mean, std = running[0].tolist(), running[1].sqrt().tolist()  # type: ignore[union-attr]
    elif project.latents == "own" and said.get("latent_norm") is False and isinstance(multiplier, int | float):
        std = [1 / multiplier] * config.channels
    elif project.latents != "scaled":
        return {}
    vae = _vae(said)
    another = vae and project.vae and not _PUBLISHED.fullmatch(vae)
    if len(mean) != config.channels or (
        project.latents == "scaled" and config.channels != len(PAPER.mean) and not scale
    ):
        return {}
    if another and not (scale and project.latents == "scaled"):  # a project's constants are its own VAE's
        return {}
    named = re.search(r"f(\d+)d\d+", f"{vae} {said.get('model_name')}")  # as REPA-E and LightningDiT do
    factor = int(named[1]) if named else VAE_FACTOR
    size = config.input_size * factor
    decoder = {"kind": DECODER_KIND, "factor": factor, "range": list(SIGNED)}
    if project.vae and (vae or scale in (None, SD_SCALE)):
        published = _PUBLISHED.fullmatch(vae or project.vae)
        decoder["vae"] = f"stabilityai/sd-vae-ft-{published[1]}" if published else vae
    return {
        "kind": f"imagenet{size}" if config.num_classes == 1000 else "latents",
        "normalization": {"mean": mean, "std": std},
        "decoder": decoder,
    }


def _vae(said: Mapping[str, Any]) -> str | None:
    """Return the VAE that the arguments name, if any."""
    return next((value for name, value in said.items() if isinstance(value, str) and _NAMES_VAE.fullmatch(name)), None)


def _stated_scaling(said: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Return what latents are multiplied by, and what is subtracted before, where the arguments say it."""
    found: dict[bool, float] = {}
    for name, value in said.items():
        # Whole numbers above 1, as diffusers' vae_scale_factor, are of the image's size.
        if SCALING.fullmatch(name) and type(value) in (int, float) and (value == 1 or value % 1):
            found.setdefault("shift" in name, float(value))
    return found.get(False), found.get(True)


def _stated_constants(said: Mapping[str, Any]) -> list[str]:
    """Return the arguments that give latents' constants otherwise than as one scale and shift."""
    numbers = {name for name, value in said.items() if SCALING.fullmatch(name) and isinstance(value, (int, float))}
    return [name for name in said if CONSTANTS.fullmatch(name) and said[name] is not None and name not in numbers]


def _doubts_of_vae(said: Mapping[str, Any], project: Project, data: Mapping[str, Any]) -> Iterator[str]:
    named = _vae(said)
    if constants := _stated_constants(said):
        yield (
            f"it was trained on latents by constants of its own ({', '.join(constants)}), which are not read: what its "
            "samples are decoded by has to be given"
        )
        return
    scale, shift = _stated_scaling(said)
    if data and scale and project.latents == "scaled":
        yield f"its latents are times {scale}{f' less {shift}' if shift else ''}, as its arguments say"
    if named and not data and project.vae and not _PUBLISHED.fullmatch(named):
        yield (
            f"its vae is {named!r}, not {project.name}'s sd-vae-ft-{project.vae}, and it doesn't say what latents were "
            f"multiplied by: give `mpdit sample` --data-scale ({KNOWN_SCALES})"
        )
