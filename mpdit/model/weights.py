"""Weights as people exchange them: a folder with model.safetensors and config.json. Nothing is ever unpickled."""

from __future__ import annotations

import argparse
import json
import os
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpdit.core.errors import CheckpointError, ConfigError
from mpdit.core.file_kind import explain_kind
from mpdit.core.files import as_path, check_links, check_regular, is_utf8, new_file, read_bytes
from mpdit.core.tensor_file import digest_of, write_tensors
from mpdit.core.zips import find_damaged, is_zip
from mpdit.model.config import ModelConfig

FORMAT = "mpdit-weights-1"
WEIGHTS_NAME = "ema"
"""The folder of weights in a run's: those of the average."""
_NAMED = 3  # of tensors that don't fit, as many are named in a message
_LARGEST = 1e30  # of constants of latents; what is larger is damaged


def save_weights(
    folder: str | Path, state_dict: Mapping[str, Tensor], config: ModelConfig, metadata: Mapping[str, Any]
) -> None:
    """Write model.safetensors and config.json into `folder`, each complete or not at all, the weights first.

    Args:
        folder: made if missing; files of the same names are replaced.
        state_dict: parameters by name, as MPDiT.state_dict() gives them; any device, kept in their dtype.
        config: the model's configuration.
        metadata: JSON values kept beside it: "data" (how samples are decoded), "training" (where they come from).
    """
    folder = as_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in state_dict.items()}
    description = json.dumps(describe(config, metadata), indent=2) + "\n"
    # The first to be opened is the last to take its place.
    with new_file(folder / "config.json") as config_file, new_file(folder / "model.safetensors") as weights_file:
        config_file.write_text(description)
        try:
            write_tensors(weights_file, tensors, {"format": "pt", "sha256": digest_of(tensors)})
        except OSError as error:
            raise CheckpointError(f"{folder / 'model.safetensors'} can't be written: {error.strerror}") from error


def describe(config: ModelConfig, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what config.json holds; `parse_description` reads it."""
    return {"format": FORMAT, "model": config.to_dict(), **metadata}


def parse_description(description: Any, where: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Read a configuration and metadata from what `describe` made; CheckpointError, naming `where`, if it is none."""
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise CheckpointError(
            f'{where} is not a description of mpdit weights: expected "format": "{FORMAT}"; for other '
            "projects' models there is `mpdit convert`"
        )
    if not isinstance(description.get("model"), dict):
        raise CheckpointError(f'{where} lacks the model\'s configuration under "model"')
    config = ModelConfig.from_dict(description["model"])
    _check_metadata(where, description, config)
    metadata = {name: value for name, value in description.items() if name not in ("format", "model")}
    return config, metadata


def check_flow(metadata: Mapping[str, Any]) -> None:
    """Raise ConfigError if the weights whose metadata this is, as `load_weights` returns it, predict no velocity.

    What else they predict is "objective" in the metadata's "training"; without it, the velocity of the straight path.
    """
    training = metadata.get("training")
    if isinstance(training, Mapping) and (objective := training.get("objective")):
        raise ConfigError(
            f"these weights predict {objective}, not the velocity of a straight path: they can be fine-tuned with "
            "--init-from, not sampled or exported"
        )


def check_guidance(metadata: Mapping[str, Any], guidance: float) -> None:
    """Raise ConfigError if guidance is asked of weights that were never trained without a class.

    An error and no warning: their row for "no class" is as it was drawn, and what it pushes images to is arbitrary.
    """
    training = metadata.get("training")
    if guidance != 1 and isinstance(training, Mapping) and training.get("class_dropout") == 0:
        raise ConfigError(
            f"guidance is {guidance:g}, but these weights were trained with class_dropout 0 and so never without a "
            "class, which guidance compares with: give guidance 1, or train with class_dropout above 0"
        )


def average_remark(metadata: Mapping[str, Any]) -> str:
    """Say how much of an average of weights is still what training began with; "" for a tenth or less, or no average.

    Its share is decay ** steps, as the average starts as the weights do.
    """
    training = metadata.get("training") or {}
    decay, steps = training.get("ema_decay"), training.get("step")
    kept = decay ** max(1, steps) if isinstance(decay, float) and isinstance(steps, int) and 0 < decay < 1 else 0
    average = training.get("weights") == "ema"
    return f"the average is {kept:.0%} what training began with" if average and kept > 0.1 else ""


def check_values(tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """Raise CheckpointError, naming `where` and the first such tensor, unless all are plain, real and finite."""
    for name, value in tensors.items():
        plain = value.layout == torch.strided and not value.is_quantized and not value.is_meta
        # A view that repeats its values may claim to be of any size.
        if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(f"{where} holds {name} as a view or a tensor of another layout: save plain tensors")
        if not value.is_floating_point() or value.element_size() < 2:
            raise CheckpointError(f"{where} holds {name} of {value.dtype}: weights are fp16, bf16, fp32 or fp64")
        if not value.sum().isfinite() and not value.isfinite().all():  # a sum is quicker, but may overflow
            raise CheckpointError(f"{where} holds NaN or infinity in {name}: give weights of a sound run")


def check_loaded(where: str | Path, loaded: Mapping[str, Any], remedy: str) -> None:
    """Raise CheckpointError, naming `where` and the first tensors, where a file and a model don't hold the same.

    What a file doesn't fill keeps whatever the model was built with: figures and images would be of random weights.
    `loaded` is what diffusers' from_pretrained tells of loading: names as "missing_keys" and "unexpected_keys", and
    (name, shape in the file, shape in the model) as "mismatched_keys".
    """
    found = {"lacks": loaded["missing_keys"], "has unexpected": loaded["unexpected_keys"]}
    told = [f"{verb} {_some(names)}" for verb, names in found.items() if names]
    if told:
        raise CheckpointError(f"{where} does not fill the model: it {' and '.join(told)}: {remedy}")
    for name, there, here in sorted(loaded["mismatched_keys"]):
        raise CheckpointError(
            f"{where} does not fit the model: {name} has shape {tuple(there)}, not {tuple(here)}: {remedy}"
        )


def check_fit(where: str | Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], remedy: str) -> None:
    """Raise CheckpointError as `check_loaded` unless tensors have the names and shapes of a model's `expected`."""
    both = [(name, tensors[name].shape, value.shape) for name, value in expected.items() if name in tensors]
    loaded = {
        "missing_keys": expected.keys() - tensors.keys(),
        "unexpected_keys": tensors.keys() - expected.keys(),
        "mismatched_keys": [row for row in both if row[1] != row[2]],
    }
    check_loaded(where, loaded, remedy)


def read_diffusers(folder: Path, variant: str | None = None) -> tuple[dict[str, Tensor], bool]:
    """Return the tensors in the files of a folder that diffusers would load a model from, and whether they are shards.

    Of an index only the names of files are believed: what they hold is what is in them. Raises CheckpointError for
    files that are missing or damaged, or hold what is no tensor, or one name twice.
    """
    parts = f".{variant}" if variant else ""
    for kind in ("safetensors", "bin"):
        index = folder / f"diffusion_pytorch_model.{kind}.index{parts}.json"
        try:
            names = set(json.loads(read_bytes(index))["weight_map"].values()) if index.is_file() else None
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is no index of weight files ({error!r}): copy or save it again") from None
        if names is None and (folder / f"diffusion_pytorch_model{parts}.{kind}").is_file():
            names = {f"diffusion_pytorch_model{parts}.{kind}"}
        if names is None:
            continue
        tensors: dict[str, Tensor] = {}
        for path in sorted(folder / str(name) for name in names):
            held = load_tensors(path)
            if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
                raise CheckpointError(f"{path} holds something else than tensors by name: give a state dict")
            if twice := tensors.keys() & held.keys():
                raise CheckpointError(f"{path} holds {_some(twice)}, as another shard does: save the model again")
            tensors |= held
        return tensors, len(names) > 1
    raise CheckpointError(f"{folder} holds no diffusion_pytorch_model{parts}.safetensors: give a folder of weights")


def _some(names: Collection[str]) -> str:
    first = sorted(map(str, names))[:_NAMED]
    return ", ".join(first) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def load_tensors(path: str | Path) -> Any:
    """Load what a file of torch.save or a safetensors file holds, on the CPU, tensors read as they are used.

    Nothing but tensors, plain containers and argparse.Namespace (the "args" of the official codes) is unpickled.
    CheckpointError for a file that is none, is damaged or holds anything else. Torch's own words are not passed on:
    they advise to unpickle whatever it is.
    """
    path = as_path(path)
    try:
        check_regular(path)
        zipped = is_zip(path)
        if zipped and (kind := explain_kind(path)):
            raise CheckpointError(f"{path} {kind}")
        if zipped and (damaged := find_damaged(path)):  # torch compares no checksums
            raise CheckpointError(f"{path} is damaged: {damaged} does not have its CRC-32; copy or save it again")
        with (
            path.open("rb") as file,
            torch.serialization.safe_globals([argparse.Namespace]),
            warnings.catch_warnings(action="ignore"),  # whatever torch finds odd: it is read, or refused below
        ):
            if file.read(9)[8:] == b"{":  # whatever its name: a safetensors header, behind its length in 8 bytes
                return _load_safetensors(path)
            file.seek(0)
            named = path.suffix != ".safetensors" and is_utf8(path)  # torch (2.13) would believe the name
            source = os.fspath(path) if named else file
            return torch.load(source, map_location="cpu", weights_only=True, mmap=zipped and named)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from error
    except CheckpointError:
        raise
    except Exception as error:  # an unpickler that is fed foreign bytes raises almost anything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        kind = explain_kind(path)
        if refused and not kind:
            raise CheckpointError(
                f"{path} holds a {refused[1]}, not tensors, plain containers and argparse.Namespace alone: it was not "
                "unpickled, as that could run any code; have its maker save the state dict alone"
            ) from error
        raise CheckpointError(
            f"{path} {kind}" if kind else f"{path} is no checkpoint of tensors, or is truncated or damaged"
        ) from error


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load, load_file

    return load_file(path) if is_utf8(path) else load(path.read_bytes())


def read_description(path: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Read the configuration and metadata of weights, as `read_weights`, without the tensors."""
    file = weights_folder(as_path(path)) / "config.json"
    try:
        description = json.loads(read_bytes(file))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} can't be read as JSON: {error}") from error
    return parse_description(description, file)


def read_weights(path: str | Path) -> tuple[ModelConfig, dict[str, Tensor], dict[str, Any]]:
    """Read a weights folder, a run's folder (its EMA) or a .safetensors file with its config.json beside.

    Returns:
        The model's configuration, its tensors on the CPU, and config.json without the model's part. Whether the first
        two fit is for the model to say.

    Raises:
        CheckpointError: nothing there, or a file that is damaged, not finite or of another format.
    """
    from safetensors import SafetensorError, safe_open  # here: a model is built and timed where it is not installed

    config, metadata = read_description(path)
    weights = weights_folder(as_path(path)) / "model.safetensors"
    try:
        with safe_open(weights, "np") as file:  # opens any path, which "pt" does not
            stated = (file.metadata() or {}).get("sha256")
        tensors = _load_safetensors(weights)
    except (SafetensorError, OSError) as error:
        what = explain_kind(weights) or f"can't be read as safetensors: {error}; export the weights again"
        raise CheckpointError(f"{weights} {what}") from error
    if stated not in (None, digest_of(tensors)):  # files that others wrote state none
        raise CheckpointError(f"{weights} does not match the SHA-256 in its header: it was altered; export it again")
    check_values(tensors, weights)
    return config, tensors, metadata


def weights_folder(path: Path) -> Path:
    """Find the folder of model.safetensors and config.json; CheckpointError, naming what was looked for, if none."""
    convert = f"if it is a checkpoint, ours or another project's, `mpdit convert {path} OUT` first and give OUT"
    if path.suffix == ".safetensors" and path.is_file():
        if path.name != "model.safetensors":
            raise CheckpointError(f"{path} must be named model.safetensors, with its config.json beside it; {convert}")
        return path.parent
    for folder in (path, path / WEIGHTS_NAME):
        if (folder / "model.safetensors").is_file():
            return folder
    check_links(*(folder / "model.safetensors" for folder in (path, path / WEIGHTS_NAME)))
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist: give a run's folder, a weights folder or a model.safetensors file"
        )
    raise CheckpointError(
        f"{path} holds no weights: expected {path}/model.safetensors or {path}/{WEIGHTS_NAME}/model.safetensors; "
        f"{convert}"
    )


def _check_metadata(where: str | Path, description: Mapping[str, Any], config: ModelConfig) -> None:
    """Check the form of what samples are decoded by ("data") and of where weights come from ("training")."""
    if not isinstance(description.get("training") or {}, dict):
        raise CheckpointError(f'{where} has no valid "training": expected an object')
    data = description.get("data", {})
    valid = isinstance(data, dict) and isinstance(data.get("decoder") or {}, dict)
    if valid and (constants := data.get("normalization", {})) != {}:
        valid = isinstance(constants, dict) and constants.keys() == {"mean", "std"}
        for values in constants.values() if valid else ():
            valid = valid and isinstance(values, list) and len(values) == config.channels
            valid = valid and all(type(value) in (int, float) and abs(value) < _LARGEST for value in values)
        valid = valid and min(constants["std"]) > 0
    if not valid:
        raise CheckpointError(
            f'{where} has no valid "data": expected an object with "normalization" {{"mean", "std"}}, finite numbers '
            f"of {config.channels} channels each, std above 0"
        )
    present = data.get("present_classes", [0])
    if (
        not isinstance(present, list)
        or not present
        or not all(type(label) is int and 0 <= label < config.num_classes for label in present)
    ):
        raise CheckpointError(f'{where} has no valid "present_classes": expected some of 0 .. {config.num_classes - 1}')
