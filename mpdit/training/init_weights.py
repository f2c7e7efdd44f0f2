"""Reads the weights that a fresh run starts from instead of its seed's, for fine-tuning."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpdit.core.errors import CheckpointError
from mpdit.data.manifest import DatasetInfo, Normalization
from mpdit.model.config import ModelConfig
from mpdit.model.kinds import TIME_EMBEDDINGS
from mpdit.model.mpdit import MPDiT, load_weights
from mpdit.model.weights import average_remark, weights_folder

GIVEN_LATER = "???"
"""The value of `init_from` in a configuration file that leaves it to the command line; a dry run does without."""

_MAY_DIFFER = ("input_size", "num_classes")
"""Positions are computed from the first, and only the class table depends on the second."""


@dataclass(frozen=True)
class InitialWeights:
    """Holds weights of a model like the run's, on the CPU."""

    source: str
    state: dict[str, Tensor]
    """Tensors by the names of MPDiT.state_dict(); emptied by `copy_to`, so that they aren't kept while training."""
    notes: tuple[str, ...]
    """What a user should know of how they are used, a line each."""
    classes: tuple[int, ...]
    """The classes that they were trained with and whose rows are taken over."""

    def copy_to(self, model: MPDiT) -> None:
        """Replace the fresh weights of `model`; of a class table of another size only the null class, its last row."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                value = self.state.pop(name)
                if value.shape == parameter.shape:
                    parameter.copy_(value)
                else:
                    parameter[-1].copy_(value[-1])


def weights_digest(source: str) -> str:
    """Return the SHA-256, in hex, of the file with the weights of `source`. Raises CheckpointError for none."""
    if source == GIVEN_LATER:
        raise CheckpointError("init_from is still to be given: add --init-from with the weights to start from")
    from mpdit.interop.source import is_foreign, weights_file  # with the readers of others' files, which few runs need

    path = Path(source)
    file = weights_file(path) if is_foreign(path) else weights_folder(path) / "model.safetensors"
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"init_from {source} can't be read: {error}") from error


def recorded_digest(out: Path, source: str) -> str | None:
    """Return the digest that the run in `out` wrote down when it began from `source`, whatever is there by now."""
    try:
        described = json.loads((out / "config.json").read_bytes())
        digest = described["identity"]["init_from"]
        return str(digest) if described["training"]["init_from"] == source else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_initial(source: str, config: ModelConfig, data: DatasetInfo) -> InitialWeights:
    """Load and check weights for a model of `config` that is to be trained on `data`.

    A run's folder gives its EMA, another project's checkpoint its entry "ema" or, being a plain state dict, itself.

    Raises:
        CheckpointError: nothing there, damaged, not finite, or of a model that differs in more than input_size and
            num_classes.
    """
    from mpdit.interop.official import read_official
    from mpdit.interop.source import is_foreign

    path = Path(source)
    # Heads and convention, which no shape shows, are the file's where it says them, else the run's.
    model, metadata = read_official(path, fallback=config) if is_foreign(path) else load_weights(path)
    theirs, ours = _what_weights_mean(model.config), _what_weights_mean(config)
    for name in {**ours, **theirs}:
        if theirs.get(name) != ours.get(name):
            raise CheckpointError(
                f"init_from {source} has {name} {theirs.get(name)} and this run's model {ours.get(name)}: give the "
                f"--model and --override it was trained with; only {' and '.join(_MAY_DIFFER)} may differ"
            )
    training = metadata.get("training") or {}
    notes = [f"{source}: {note}" for note in training.get("notes", ())]
    if training.get("objective") and not notes:
        notes.append(f"{source} was trained to predict {training['objective']}: its structure is a start, no more")
    data_before = metadata.get("data", {})
    classes = tuple(data_before.get("present_classes", range(config.num_classes)))
    if model.config.num_classes != config.num_classes:
        classes = ()
        notes.append(
            f"{source} has {model.config.num_classes} classes and this run {config.num_classes}: they start afresh, "
            "the null class is kept"
        )
    if remark := average_remark(metadata):
        notes.append(
            f"{source}: {remark}; to start from its last weights, `mpdit convert RUN OUT --weights raw`, and give OUT"
        )
    written = data_before.get("normalization")
    if not written:
        notes.append(f"{source} does not say how its latents were normalised: make sure that these are alike")
    elif not _alike(Normalization(**written), data.normalization):
        notes.append(
            f"warning: {source} was trained on latents normalised by {show_constants(Normalization(**written))}; this "
            f"data by {show_constants(data.normalization)}: what the model knows is shifted, so normalise alike unless "
            "it is meant"
        )
    state = {name: value.detach() for name, value in model.named_parameters()}
    return InitialWeights(source, state, tuple(notes), classes)


def _what_weights_mean(config: ModelConfig) -> dict[str, Any]:
    """Return the fields that decide what the weights mean, without those that this configuration doesn't read."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(ModelConfig)}
    unread = {
        "class_tokens": config.class_conditioning == "added",
        "transition": len(config.stages) == 1,
        "skip": len(config.stages) == 1,
    }
    kinds = TIME_EMBEDDINGS.values()
    unread |= {name: name not in TIME_EMBEDDINGS[config.time_embedding].reads for kind in kinds for name in kind.reads}
    fields["stages"] = [[stage.patch, stage.blocks] for stage in config.stages]
    return {name: value for name, value in fields.items() if name not in _MAY_DIFFER and not unread.get(name)}


def _alike(theirs: Normalization, ours: Normalization) -> bool:
    """Return whether latents normalised by either differ by less than a hundredth of their std."""
    if len(theirs.mean) != len(ours.mean):
        return False
    off = np.abs(np.subtract([theirs.mean, theirs.std], [ours.mean, ours.std]))  # [2, C]
    return bool((off <= 0.01 * np.array(ours.std)).all())


def show_constants(constants: Normalization) -> str:
    """Return them as text, three digits of each channel's."""
    mean, std = (" ".join(f"{value:.3g}" for value in values) for values in (constants.mean, constants.std))
    return f"mean {mean}, std {std}"
