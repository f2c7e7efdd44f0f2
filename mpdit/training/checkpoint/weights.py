"""Takes weights out of a run's checkpoints: the last ones ("raw") or their average ("ema"), as commands read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mpdit.core.errors import CheckpointError, ConfigError, UserError
from mpdit.core.files import locked
from mpdit.model.config import ModelConfig
from mpdit.model.weights import check_values, describe, parse_description, read_description, save_weights
from mpdit.training.checkpoint.format import MARKER, Checkpoint, committed_folders, read_values, verify

_KINDS = {"raw": "weight", "ema": "ema"}


def is_checkpoint(path: Path) -> bool:
    """Return whether it is the folder of a committed checkpoint."""
    return (path / MARKER).is_file()


def metadata_of(saved: Checkpoint, data: Mapping[str, Any], which: str) -> dict[str, Any]:
    """Return what weights say of themselves: their data, and the training they come from."""
    settings = {name: saved.identity.get(name) for name in ("seed", "ema_decay", "class_dropout")}
    return {"data": data, "training": {"step": saved.step, "samples": saved.position, **settings, "weights": which}}


def read_checkpoint(path: Path, which: str) -> tuple[ModelConfig, dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint's weights, or those of a run's newest one, every file against its hash.

    Returns what `mpdit.model.weights.read_weights` does, fp32 on the CPU. Raises CheckpointError.
    """
    saved, described = _open(path)
    for name, entry in saved.files.items():
        verify(saved.folder / name, entry)
    config, metadata = parse_description(described | metadata_of(saved, described["data"], which), saved.folder)
    tensors = read_values(saved, _KINDS[which])
    check_values(tensors, saved.folder)
    return config, tensors, metadata


def weights_of(path: Path, which: str | None) -> Path:
    """Return the folder of weights that `--weights` asks for: `path` itself, or one made of a checkpoint.

    `path` is a run's folder, a checkpoint's, or of anything else, which is returned as it is. Of a checkpoint, and of a
    run's newest for "raw", the weights are written to RUN/weights/step-*-ema or -raw, once. Raises CheckpointError
    where there is no checkpoint, ConfigError where the run's folder can't be written to.
    """
    if which != "raw" and not is_checkpoint(path):
        return path
    which = which or "ema"
    saved, described = _open(path)
    folder = saved.folder.absolute().parents[1] / "weights" / f"{saved.folder.name}-{which}"
    try:
        folder.parent.mkdir(exist_ok=True)
        with locked(folder.parent):  # ranks that draw together
            if not _is_there(folder, metadata_of(saved, described["data"], which)):
                config, tensors, metadata = read_checkpoint(saved.folder, which)
                save_weights(folder, tensors, config, metadata)
    except OSError as error:
        raise ConfigError(
            f"{folder} can't be written ({error.strerror}): make the weights elsewhere, `mpdit convert {path} OUT --to "
            f"weights --weights {which}`, and give OUT"
        ) from error
    return folder


def _open(path: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """Open a checkpoint, or a run's newest; return it with what config.json of weights says of the model and data."""
    found = [path] if is_checkpoint(path) else committed_folders(path)
    if not found:
        raise CheckpointError(f"{path} holds no checkpoint, where raw weights are: give a run's folder or a checkpoint")
    saved, file = Checkpoint.open(found[-1]), found[-1].absolute().parents[1] / "config.json"
    try:
        run = json.loads(file.read_bytes())
        data = {name: value for name, value in run["data"].items() if name != "num_samples"}
        return saved, describe(ModelConfig.from_dict(run["model"]), {"data": data})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise CheckpointError(
            f"{file}, which says what the checkpoint's model is, can't be read ({error}): restore it"
        ) from error


def _is_there(folder: Path, metadata: Mapping[str, Any]) -> bool:
    try:
        return read_description(folder)[1] == json.loads(json.dumps(metadata))
    except CheckpointError:
        return False
