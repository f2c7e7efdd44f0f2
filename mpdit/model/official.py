"""Official state dicts to ours and back: MPDiT with two, three or more stages, DiT and SiT.

Only the head count is not in them. Every tensor keeps its shape and layout; only names change. `official_names` is the
whole map, so it also serves the way back and the gradients. Files are mpdit.interop.official's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mpdit.core.errors import CheckpointError
from mpdit.model.config import Convention, ModelConfig, StageSpec
from mpdit.model.layers import sincos_position
from mpdit.model.mpdit import MPDiT
from mpdit.model.weights import check_values

_PREFIXES = ("module.", "_orig_mod.")
_POSITIONS = re.compile(r"pos_embed(_downsampled|_lvl\d+)?")
_BLOCK = {
    "attention.qkv": "attn.qkv",
    "attention.proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "modulation": "adaLN_modulation.1",
}


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
    tensors = _strip_prefixes(state_dict)
    check_values(tensors, "state dict")
    config = _infer_config(tensors, num_heads, convention)
    model = MPDiT(config)
    names = official_names(config)
    _check_positions(tensors, config)
    unknown = [name for name in tensors if name not in names.values() and not _POSITIONS.fullmatch(name)]
    if unknown:
        raise CheckpointError(f"state dict has tensors no official model has: {', '.join(sorted(unknown)[:5])}")
    with torch.no_grad():
        for ours, parameter in model.named_parameters():
            value = _get(tensors, names[ours])
            if value.shape != parameter.shape:
                raise CheckpointError(
                    f"{names[ours]} has shape {tuple(value.shape)}, expected {tuple(parameter.shape)} "
                    "from the other tensors' shapes: the state dict is damaged or of another model"
                )
            parameter.copy_(value)
    return model


def to_official(model: MPDiT) -> dict[str, Tensor]:
    """The way back: an official state dict of copies on the CPU, with the fixed position tables that those hold.

    `from_official` of it gives the same parameters bit for bit. The names are the official ones for any number of
    stages; which shapes the official codes have a class for is `mpdit.interop.official.official_model_name`.

    Raises:
        CheckpointError: the model has parts that no official code has names for.
    """
    config = model.config
    _check_expressible(config)
    names = official_names(config)
    state = {names[ours]: value.detach().cpu().clone().contiguous() for ours, value in model.named_parameters()}
    for name, stage in zip(_position_names(len(config.stages)), config.stages, strict=True):
        state[name] = sincos_position(config.width, config.input_size // stage.patch)[None]
    return state


def official_names(config: ModelConfig) -> dict[str, str]:
    """Our parameter names to the official ones; a part that the official codes lack keeps our name."""
    names = _rename_rules(config)
    return {ours: names.get(ours, ours) for ours, _ in MPDiT.on_meta(config).named_parameters()}


def _rename_rules(config: ModelConfig) -> dict[str, str]:
    """`official_names`, and some names that this configuration has no parameter for."""
    stages = config.stages
    pairs = {"classes.table": "y_embedder.embedding_table", "final": "final_layer.linear"}
    if config.time_embedding == "fno":
        pairs |= {"time.lift": "t_embedder.fc0", "time.project": "t_embedder.fc1"}
        for i in range(config.time_layers):
            pairs[f"time.layers.{i}.pointwise"] = f"t_embedder.w{i}"
    else:
        for i in range(config.time_layers):
            pairs[f"time.linears.{i}"] = f"t_embedder.mlp.{2 * i}"
    if config.modulation == "shared":
        pairs["modulation"] = "time_modulation.1"
    else:
        pairs["final.modulation"] = "final_layer.adaLN_modulation.1"
    for level, stage in enumerate(stages):
        pairs |= _entrance(level, len(stages))
        for block in range(stage.blocks):
            theirs = f"{_block_list(level, len(stages))}.{block}"
            for ours, suffix in _BLOCK.items():
                pairs[f"stages.{level}.blocks.{block}.{ours}"] = f"{theirs}.{suffix}"
    names = {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in pairs.items() for kind in ("weight", "bias")}
    for i in range(config.time_layers):
        for part in ("real", "imag"):
            names[f"time.layers.{i}.{part}"] = f"t_embedder.conv{i}.weights_{part}"
    for level in range(1, len(stages)):
        suffix, skip = _suffix(level, len(stages)), f"stages.{level}.enter.skip"
        embed = "x_embedder_skip.proj" if len(stages) == 2 else f"x_embedder{suffix}.proj"
        for kind in ("weight", "bias"):
            names[f"{skip}.embed_{kind}"] = f"{embed}.{kind}"
            names[f"{skip}.linear_{kind}"] = f"linear_skip{suffix}.{kind}"
    return names


def _suffix(level: int, stages: int) -> str:
    return "" if stages <= 2 else f"_lvl{level}"


def _position_names(stages: int) -> list[str]:
    """The position tables, coarse to fine; with two stages the plain name is the finer one's."""
    if stages == 2:
        return ["pos_embed_downsampled", "pos_embed"]
    return [f"pos_embed{_suffix(level, stages) if level else ''}" for level in range(stages)]


def _block_list(level: int, stages: int) -> str:
    if stages == 1:
        return "blocks"
    return f"upsample_blocks{_suffix(level, stages)}" if level else "downsample_blocks"


def _entrance(level: int, stages: int) -> dict[str, str]:
    if level == 0:
        return {"stages.0.enter.patch_embed": "x_embedder.proj"}
    theirs = f"upsampler{_suffix(level, stages)}"
    return {f"stages.{level}.enter.expand": f"{theirs}.proj", f"stages.{level}.enter.refine": f"{theirs}.refine"}


def _infer_config(tensors: Mapping[str, Tensor], num_heads: int, convention: Convention) -> ModelConfig:
    width, channels, patch, _ = _shape(tensors, "x_embedder.proj.weight", 4)
    levels = 1
    if "upsampler.proj.weight" in tensors:
        levels = 2
    while f"upsampler_lvl{levels}.proj.weight" in tensors:
        levels += 1
    patches = [patch]
    for level in range(1, levels):
        rows, _ = _shape(tensors, f"upsampler{_suffix(level, levels)}.proj.weight", 2)
        patches.append(patches[-1] // max(1, math.isqrt(rows // width)))
    grid = math.isqrt(_shape(tensors, _position_names(levels)[0], 3)[1])
    table_rows, table_width = _shape(tensors, "y_embedder.embedding_table.weight", 2)
    shared = "time_modulation.1.weight" in tensors
    fno = "t_embedder.fc0.weight" in tensors
    stages = tuple(StageSpec(p, _count(tensors, _block_list(level, levels))) for level, p in enumerate(patches))
    final_rows, _ = _shape(tensors, "final_layer.linear.weight", 2)
    deepest = next((f"{_block_list(i, levels)}.0.mlp.fc1.weight" for i, s in enumerate(stages) if s.blocks), None)
    if deepest is None:
        raise CheckpointError(
            "state dict has no transformer blocks: is this the 'model' or 'ema' entry of a checkpoint?"
        )
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
            time_layers=_count(tensors, "t_embedder.conv", "") if fno else _count(tensors, "t_embedder.mlp"),
            time_width=_shape(tensors, "t_embedder.fc0.weight", 2)[0] if fno else 32,
            skip=levels == 1 or any(name.startswith("linear_skip") for name in tensors),
            mlp_ratio=_shape(tensors, deepest, 2)[0] / width,
            learn_sigma=final_rows == 2 * patches[-1] ** 2 * channels,
            convention=convention,
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"state dict describes no valid model: {error}") from error


def _check_expressible(config: ModelConfig) -> None:
    """CheckpointError unless `from_official` would build this configuration from the official names."""
    problem = None
    if len(config.stages) > 1 and config.transition != "linear_linear":
        problem = f"transition {config.transition!r} (theirs is linear_linear)"
    elif (config.class_conditioning, config.modulation) not in (("tokens", "shared"), ("added", "per_block")):
        problem = f"class_conditioning {config.class_conditioning!r} with modulation {config.modulation!r}"
    elif not any(stage.blocks for stage in config.stages):
        problem = "no transformer blocks"
    if problem:
        raise CheckpointError(f"the official codes have no model with {problem}: keep it in mpdit's own format")


def _strip_prefixes(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    if not isinstance(state_dict, Mapping) or not state_dict:
        raise CheckpointError("state dict is empty or not a mapping of names to tensors")
    if isinstance(state_dict.get("model"), Mapping) or isinstance(state_dict.get("ema"), Mapping):
        raise CheckpointError("this is a whole checkpoint: pass its entry 'ema' (to sample) or 'model' (to train on)")
    tensors = {}
    for name, value in state_dict.items():
        short = str(name)
        while short.startswith(_PREFIXES):
            short = short.removeprefix("module.").removeprefix("_orig_mod.")
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name} is a {type(value).__name__}, expected a tensor")
        tensors[short] = value
    return tensors


def _check_positions(tensors: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Position tables are computed, not loaded: refuse a state dict whose tables are others."""
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


def _get(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"state dict lacks {name}: is this an official MPDiT, DiT or SiT state dict?")
    return tensors[name]


def _shape(tensors: Mapping[str, Tensor], name: str, ndim: int) -> tuple[int, ...]:
    shape = tuple(_get(tensors, name).shape)
    if len(shape) != ndim:
        raise CheckpointError(f"{name} has shape {shape}, expected {ndim} dimensions")
    return shape


def _count(tensors: Mapping[str, Tensor], prefix: str, separator: str = ".") -> int:
    """How many different numbers follow `prefix`."""
    found = (re.match(rf"{re.escape(prefix + separator)}(\d+)\.", name) for name in tensors)
    return len({match[1] for match in found if match})
