"""Turns models of the official codes into ours and back: MPDiT, and what has the shape of DiT (projects.py).

`from_official` and `to_official` take state dicts. Only the head count is not in them; every tensor keeps its shape and
layout, and `official_names` is the whole map of names. `read_official` takes checkpoints and folders of any project,
`save_official` writes what the official codes load: `torch.save` of {"model", "ema", "opt", ..., "args":
argparse.Namespace}. What we write has one more entry, "mpdit", with what config.json holds, so that it comes back with
its head count, normalisation and history; the official codes read theirs by name and don't meet it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpdit.core.errors import CheckpointError, first_line
from mpdit.core.files import as_path, new_file
from mpdit.data.normalization import PAPER
from mpdit.data.readers.npy import SD_SCALE
from mpdit.interop.diffusers_dit import from_diffusers
from mpdit.interop.diffusers_folder import from_pipeline
from mpdit.interop.projects import Project, find_model, identify, model_name
from mpdit.interop.source import OUR_TRANSFORMER, load_source
from mpdit.model.config import Convention, ModelConfig, StageSpec
from mpdit.model.layers import sincos_position
from mpdit.model.mpdit import MPDiT
from mpdit.model.vae import DECODER_KIND, SIGNED
from mpdit.model.weights import check_flow, check_values, describe, parse_description

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
_NAME = re.compile(r"(?:MPDiT|MPDiTv2|LightningDiT|DiT|SiT)-(S|B|L|XL)(?:/(\w+))?")
_TABLE = "y_embedder.embedding_table.weight"
_CLASSES = ("num_classes", "num_embeds_ada_norm")
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


def from_official(
    state_dict: Mapping[str, Tensor],
    num_heads: int,
    convention: Convention = "mpdit",
    num_classes: int | None = None,
) -> MPDiT:
    """Build our model from an official state dict; the model is in training mode, as any new module.

    Args:
        state_dict: of a project of `mpdit.interop.projects.PROJECTS`. Keys may carry the prefixes of
            DistributedDataParallel, torch.compile and Lightning.
        num_heads: attention heads, the one figure that no shape shows.
        convention: "sit" for weights trained with t = 1 as data; the model then evaluates -v(x, 1 - t), so that it
            can be sampled and trained as ours. DiT's own weights predict noise at integer times 0..999: what loads here
            is their structure, to be fine-tuned.
        num_classes: where the table may have no row for "no class", as DiT's and SiT's hasn't when no class was
            dropped; it is then given the mean of the classes' rows.

    Raises:
        CheckpointError: a tensor is missing, unknown, not finite or of a shape that fits no model.
    """
    if not isinstance(state_dict, Mapping) or not state_dict:
        raise CheckpointError("state dict is empty or not a mapping of names to tensors")
    if isinstance(state_dict.get("model"), Mapping) or isinstance(state_dict.get("ema"), Mapping):
        raise CheckpointError("this is a whole checkpoint: pass its entry 'ema' (to sample) or 'model' (to train on)")
    for name, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name} is a {type(value).__name__}, expected a tensor")
    found = find_model(state_dict, "model", "state dict")
    tensors = _as_official(found.tensors, identify(found).project, {})
    classes, _ = _count_classes(tensors, num_classes, {}, None)
    return _build(_with_null_row(tensors, classes), _infer_config(tensors, num_heads, convention, classes))


def _build(tensors: Mapping[str, Tensor], config: ModelConfig) -> MPDiT:
    """Return the model of these official tensors; CheckpointError unless they are all its own, and no more."""
    check_values(tensors, "state dict")
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


def _infer_config(
    tensors: Mapping[str, Tensor], num_heads: int, convention: Convention, num_classes: int
) -> ModelConfig:
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
    _, table_width = _shape(tensors, _TABLE, 2)
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
            num_classes=num_classes,
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
    path: str | Path,
    num_heads: int | None = None,
    which: str = "ema",
    convention: Convention | None = None,
    num_classes: int | None = None,
) -> MPDiT:
    """Load the model of `read_official`, in training mode, as any new module; its `metadata` says what it is.

    What was concluded of it, and from what, is warned of (UserWarning), a line each.
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
    otherwise: ModelConfig | None = None,
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
        otherwise: what the file leaves open is as in this configuration: heads, classes, and the convention of a file
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
    if isinstance(checkpoint, dict) and (checkpoint.get("config") or {}).get("_class_name") == OUR_TRANSFORMER:
        return from_pipeline(checkpoint, path)
    found = find_model(checkpoint, which, path)
    identity = identify(found)
    said = found.arguments
    try:
        tensors = _as_official(found.tensors, identity.project, said)
        if "mpdit" in checkpoint:
            config, metadata = parse_description(checkpoint["mpdit"], 'the entry "mpdit"')
            fields = {"heads": num_heads, "convention": convention}
            return _build(tensors, config.replace(**{k: v for k, v in fields.items() if v is not None})), metadata
        heads = num_heads or _heads(said, tensors, otherwise)
        chosen = convention or (otherwise.convention if otherwise and not identity.known_by else None)
        classes, about_classes = _count_classes(tensors, num_classes, said, otherwise)
        config = _infer_config(tensors, heads, chosen or identity.project.convention, classes)
        _check_named(model_name(said), config)
        model = _build(_with_null_row(tensors, classes), config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    objective = None if chosen and not identity.stated else identity.objective
    dropout = 0.0 if len(tensors[_TABLE]) == classes else _class_dropout(said)
    left_out = sorted({name.partition(".")[0] for name in found.tensors if re.match(identity.project.extra, name)})
    notes = [
        identity.describe(chosen, objective),
        *([about_classes] if about_classes else []),
        *([f"left out, as sampling doesn't need them: {', '.join(left_out)}"] if left_out else []),
        *found.notes,
    ]
    if official_model_name(config) is None and config.width in {width for width, _ in _SIZES.values()}:
        notes.append(f"no official model of width {config.width} has its blocks: if one was meant, it is not whole")
    training: dict[str, Any] = {"official": identity.project.name, "weights": found.weights, "step": found.step}
    training |= {"objective": objective, "class_dropout": dropout, "notes": notes}
    training = {name: value for name, value in training.items() if value is not None}
    return model, _data(config, identity.project, said, found.tensors) | {"training": training}


def _as_official(tensors: Mapping[str, Tensor], project: Project, said: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the model's own tensors by the names that its project has now."""
    if any(name.startswith("transformer_blocks.") for name in tensors):
        return from_diffusers(tensors, said)
    # REPA's first version called the blocks behind the projectors decoder_blocks and counted them anew.
    before = _count(tensors, "blocks.") if any(name.startswith("decoder_blocks.") for name in tensors) else 0
    if before and said.get("encoder_depth", before) != before:
        raise CheckpointError(f"its encoder_depth is {said['encoder_depth']}, but it has {before} blocks: not whole")
    return {
        re.sub(r"^decoder_blocks\.(\d+)", lambda match: f"blocks.{before + int(match[1])}", name): value
        for name, value in tensors.items()
        if not re.match(project.extra, name)
    }


def _count_classes(
    tensors: Mapping[str, Tensor], given: int | None, said: Mapping[str, Any], otherwise: ModelConfig | None
) -> tuple[int, str | None]:
    """Return how many classes the table is of, and a note where that is a guess or no row is for "no class".

    DiT's, SiT's and REPA's table has that row only if classes were dropped in training; no shape shows it.
    """
    rows = _shape(tensors, _TABLE, 2)[0]
    stated = next((n for n in (given, *map(said.get, _CLASSES)) if type(n) is int), None)
    if stated is None and otherwise and otherwise.num_classes in (rows, rows - 1):
        stated = otherwise.num_classes
    if stated is None and "time_modulation.1.weight" in tensors:
        stated = rows - 1  # MPDiT's table always has it
    if stated is None and rows > 1 and rows % 10 == 0:
        raise CheckpointError(
            f"its table of classes has {rows} rows, which may be {rows} classes and no row for 'no class', as without "
            f"dropped classes, or {rows - 1} and that row: give --num-classes (num_classes)"
        )
    classes = max(1, rows - 1) if stated is None else stated
    if rows not in (classes, classes + 1):
        raise CheckpointError(f"its table of classes has {rows} rows, which are not those of {classes} classes")
    if rows == classes:
        return classes, (
            f"its table has {rows} rows for {classes} classes: it was trained without dropped classes; a row for 'no "
            "class' is added, the mean of the others, and guidance is refused"
        )
    guess = f"its {rows} rows of classes are taken for {classes} and one for 'no class'; else give --num-classes"
    return classes, guess if stated is None and classes % 10 else None


def _with_null_row(tensors: Mapping[str, Tensor], classes: int) -> dict[str, Tensor]:
    """Return the tensors with a row for "no class", the mean of the classes', where the table has none."""
    table = tensors[_TABLE]
    if len(table) > classes or not table.is_floating_point():
        return dict(tensors)
    return {**tensors, _TABLE: torch.cat([table, table.mean(0, keepdim=True, dtype=torch.float32).to(table.dtype)])}


def _check_named(name: str, config: ModelConfig) -> None:
    """Refuse a file with fewer or more blocks than the model that it names, if of its width and stages."""
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


def _class_dropout(said: Mapping[str, Any]) -> float | None:
    for name in ("class_dropout_prob", "class_dropout", "cfg_prob"):
        value = said.get(name)
        # REPA's model drops a tenth whatever its --cfg-prob says: 0 there does not mean that no class was dropped.
        if isinstance(value, int | float) and not isinstance(value, bool) and (value or name != "cfg_prob"):
            return float(value)
    return None


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


def _heads(said: Mapping[str, Any], tensors: Mapping[str, Tensor], otherwise: ModelConfig | None) -> int:
    for name in ("num_heads", "num_attention_heads"):
        if type(heads := said.get(name)) is int and heads > 0:
            return heads
    width = len(tensors["x_embedder.proj.bias"]) if "x_embedder.proj.bias" in tensors else None
    named = _NAME.fullmatch(model_name(said))
    if named and _SIZES[named[1]][0] == width:
        return _SIZES[named[1]][1]
    if otherwise:
        return otherwise.heads
    known = next((f" {h}, as published models of width {w} have" for w, h in _SIZES.values() if w == width), "")
    raise CheckpointError(f"it does not say how many attention heads its model has: give --num-heads{known}")


def _data(
    config: ModelConfig, project: Project, said: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return the "data" of models as their project trains them; none where its latents' constants aren't known."""
    mean, std = [0.0] * config.channels, [1 / SD_SCALE] * config.channels
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
    if len(mean) != config.channels or (project.latents == "scaled" and config.channels != len(PAPER.mean)):
        return {}
    size = config.input_size * VAE_FACTOR
    vae = said.get("vae") if said.get("vae") in ("ema", "mse") else project.vae
    decoder = {"kind": DECODER_KIND, "factor": VAE_FACTOR, "range": list(SIGNED)}
    if vae and project.vae:
        decoder["vae"] = f"stabilityai/sd-vae-ft-{vae}"
    return {
        "data": {
            "kind": f"imagenet{size}" if config.num_classes == 1000 else "latents",
            "normalization": {"mean": mean, "std": std},
            "decoder": decoder,
        }
    }
