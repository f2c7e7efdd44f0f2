"""Finds and loads the file of a model from elsewhere: a checkpoint, a diffusers folder, a folder of the hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mpdit.core.errors import CheckpointError
from mpdit.model.weights import load_tensors

_OURS = "MPDiTTransformer2DModel"
_READ_CLASSES = (_OURS, "DiTTransformer2DModel", "Transformer2DModel")
_FILES = (
    *("diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.bin"),
    *("model.safetensors", "model*-of-*.safetensors", "pytorch_model.bin"),
)
_SHARD = re.compile(r".*-\d+-of-(?!0*1\.)0*(\d+)\..*")


def is_foreign(path: Path) -> bool:
    """Tell another project's model, or our diffusers pipeline, from our weights, our run, and what is no model."""
    if path.is_file():
        return path.name != "model.safetensors" or not _is_ours(path.parent)
    return (path / "model_index.json").is_file() or bool(_files(path) and not _is_ours(path))


def is_our_pipeline(checkpoint: Any) -> bool:
    """Tell what `load_source` returned of a pipeline that `save_diffusers` wrote."""
    config = checkpoint.get("config") if isinstance(checkpoint, dict) else None
    return isinstance(config, dict) and config.get("_class_name") == _OURS


def weights_file(path: Path) -> Path:
    """Return the file with the tensors of what `is_foreign`; CheckpointError, with what is there, if it has none."""
    if path.is_file():
        return path
    found = _files(path)
    kind = _config(path, "model_index.json").get("_class_name")
    if not found and kind:
        name = kind[-1] if isinstance(kind, list) else kind
        raise CheckpointError(f"{path} is diffusers' {name}, with no transformer: DiTPipeline and mpdit's are read")
    if not found:
        what = "holds no model" if path.exists() else "can't be read: No such file or folder"
        raise CheckpointError(f"{path} {what}: give a checkpoint, or a folder of diffusers or of the hub")
    return min(found, key=lambda file: (len(file.name), file.name))  # before its fp16 variant


def load_source(path: Path) -> Any:
    """Load a checkpoint, or tensors with the config.json beside them as their "config".

    Raises CheckpointError for a part of a model, another of diffusers' models, and as `load_tensors`.
    """
    file = weights_file(path)
    if shard := _SHARD.fullmatch(file.name):
        raise CheckpointError(
            f"{file} is one of {shard[1]} files of a model, which are not read apart: load them in their own project "
            "and save one file (save_pretrained with a larger max_shard_size)"
        )
    beside = any(file.match(pattern) for pattern in _FILES) or file.suffix == ".safetensors"
    config = _config(file.parent, "config.json") if beside else {}
    kind = config.get("_class_name")
    if kind is not None and kind not in _READ_CLASSES:
        raise CheckpointError(f"{path} is diffusers' {kind}: of those DiTTransformer2DModel and mpdit's are read")
    loaded = load_tensors(file)
    return {"config": config} | loaded if config and isinstance(loaded, dict) else loaded


def _files(folder: Path) -> list[Path]:
    return [file for place in (folder, folder / "transformer") for pattern in _FILES for file in place.glob(pattern)]


def _is_ours(folder: Path) -> bool:
    """Return whether a folder's config.json is ours, or so damaged that who reads ours is to say so."""
    config = _config(folder, "config.json")
    return (folder / "config.json").is_file() and (not config or "format" in config)


def _config(folder: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads((folder / name).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
