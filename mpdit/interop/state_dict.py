"""Turns state dicts of the official codes into our model and back: MPDiT's, and what has the shape of DiT's.

Only the head count is not in them; every tensor keeps its shape and layout, and `official_names` is the whole map of
names. Checkpoint files are official.py's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mpdit.core.errors import CheckpointError
from mpdit.interop.diffusers_dit import from_diffusers
from mpdit.interop.projects import CLASSES, Project, find_model, identify
from mpdit.model.config import Convention, ModelConfig, StageSpec
from mpdit.model.layers import sincos_position
from mpdit.model.mpdit import MPDiT
from mpdit.model.weights import check_values

CLASS_TABLE = "y_embedder.embedding_table.weight"
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
    tensors = as_official(found.tensors, identify(found).project, {})
    classes, _ = count_classes(tensors, num_classes, {}, None)
    return build(with_null_row(tensors, classes), infer_config(tensors, num_heads, convention, classes))


def build(tensors: Mapping[str, Tensor], config: ModelConfig) -> MPDiT:
    """Return the model of these official tensors; CheckpointError unless they are all of its own, and finite."""
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


def infer_config(
    tensors: Mapping[str, Tensor], num_heads: int, convention: Convention, num_classes: int
) -> ModelConfig:
    """Return the configuration that official names and shapes show; heads, convention and classes they don't."""
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
    _, table_width = _shape(tensors, CLASS_TABLE, 2)
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
        near = max(1e-3, torch.finfo(value.dtype).eps) if value.is_floating_point() else 0.0
        fits = grid in {config.input_size // stage.patch for stage in config.stages}
        table = sincos_position(config.width, grid) if fits else None
        if table is None or value.shape != (1, *table.shape) or not torch.allclose(value[0].float(), table, atol=near):
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


def as_official(tensors: Mapping[str, Tensor], project: Project, said: Mapping[str, Any]) -> dict[str, Tensor]:
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


def count_classes(
    tensors: Mapping[str, Tensor],
    given: int | None,
    said: Mapping[str, Any],
    fallback: ModelConfig | None,
    dropout: float | None = None,
    unclear: Sequence[str] = (),
) -> tuple[int, str | None]:
    """Return how many classes the table is of, and a note where that is a guess or no row is for "no class".

    DiT's and SiT's table has that row only if classes were dropped in training; no shape shows it. `dropout` is how
    often the file says they were, `unclear` names arguments that may say it.
    """
    rows = _shape(tensors, CLASS_TABLE, 2)[0]
    has_row = (
        True if "time_modulation.1.weight" in tensors else None if dropout is None else dropout > 0
    )  # MPDiT's: yes
    stated = next((n for n in (given, *map(said.get, CLASSES)) if type(n) is int), None)
    if given is None and stated == rows and has_row:
        raise CheckpointError(
            f"its table of classes has {rows} rows, as many as it says there are classes, and one of them is for 'no "
            "class', as classes were dropped: say how many classes there are by --num-classes, or num_classes"
        )
    if stated is None and has_row is not None:
        stated = rows - has_row
    if stated is None and fallback and fallback.num_classes in (rows, rows - 1):
        stated = fallback.num_classes
    if stated is None and rows > 1 and (rows % 10 == 0 or unclear):
        raise CheckpointError(
            f"its table of classes has {rows} rows, which may be {rows} classes and no row for 'no class', as without "
            f"dropped classes, or {rows - 1} and that row: say which by `mpdit convert --num-classes`, or num_classes"
        )
    classes = max(1, rows - 1) if stated is None else stated
    if classes < 1 or rows not in (classes, classes + 1):
        raise CheckpointError(f"its table of classes has {rows} rows, which are not those of {classes} classes")
    if rows == classes:
        return classes, (
            f"its table has {rows} rows for {classes} classes: it was trained without dropped classes; a row for 'no "
            "class' is added, the mean of the others, and guidance is refused"
        )
    guess = f"its {rows} rows of classes are taken for {classes} and one for 'no class'; else give --num-classes"
    return classes, guess if stated is None and classes % 10 else None


def with_null_row(tensors: Mapping[str, Tensor], classes: int) -> dict[str, Tensor]:
    """Return the tensors with a row for "no class", the mean of the classes', where the table has none."""
    table = tensors[CLASS_TABLE]
    if len(table) > classes or not table.is_floating_point():
        return dict(tensors)
    return {
        **tensors,
        CLASS_TABLE: torch.cat([table, table.mean(0, keepdim=True, dtype=torch.float32).to(table.dtype)]),
    }
