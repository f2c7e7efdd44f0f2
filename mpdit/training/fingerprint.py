"""Tells runs apart by what decides their weights: a folder holds one, which is continued as what it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mpdit.core.differences import differences
from mpdit.core.errors import UserError
from mpdit.data.dataset import LatentDataset
from mpdit.model.config import ModelConfig
from mpdit.training.config import TrainConfig

MAY_CHANGE_ON_RESUME = {
    *(
        "ds_config",
        "model",
        "override",
        "data",
        "data_scale",
        "normalization",
        "init_from",
    ),
    *("out", "resume", "force", "dry_run", "plan_gpu", "plan_gpus", "progress", "tensorboard", "wandb"),
    *("bad_records", "gpu_stage", "grad_accum_steps", "activation_checkpointing", "max_skips", "hang_timeout"),
    *("log_every", "sample_every", "sample_steps", "sample_guidance", "checkpoint_every", "keep"),
    *("profile", "profile_steps", "profile_ranks"),
}
"""Fields of TrainConfig that may differ when a run is resumed: they don't decide what is learnt (model, data and
initial weights are compared whole)."""

_UNFORCED = {
    "model.": "its weights don't fit another model",
    "optimizer": "what an optimizer keeps does not fit another",
}
"""What --force can't change of a run that is continued, by the beginning of its names, and why."""


def fingerprint(config: TrainConfig, model: ModelConfig, dataset: LatentDataset) -> dict[str, Any]:
    """Return what decides the weights, flat, in JSON types: settings, model and data; not yet the initial weights."""
    training = {name: value for name, value in config.to_dict().items() if name not in MAY_CHANGE_ON_RESUME}
    if config.lr_schedule == "constant":
        del training["steps"]  # such a run may be made longer
    return {
        **training,
        **{f"model.{name}": value for name, value in model.to_dict().items()},
        "data": f"{dataset.manifest.kind} {short_digest(dataset.manifest.to_json() + dataset.digest)}",
    }


def short_digest(value: Any) -> str:
    """Return the first 8 hex digits of the SHA-256 of a value in JSON types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def check_same(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], holder: str, force: bool, error: type[UserError]
) -> str:
    """Return what `force` lets a run be continued with, in words; "" when both fingerprints are the same.

    Raises `error`, beginning with `holder`, which is a place and "holds" or "is of": for any difference
    without force, with it for one of the model or the optimizer.
    """
    # What was not written down was the only optimizer there was; a loader was once let pass.
    theirs = {"optimizer": "adamw_ema", "loader": ours.get("loader"), **theirs}
    words = differences(theirs, ours)
    if words and not force:
        raise error(
            f"{holder} another run ({', '.join(words.values())}): give the same settings or another --out, or --force "
            "to go on with these"
        )
    for start, reason in _UNFORCED.items():
        if fixed := [text for name, text in words.items() if name.startswith(start)]:
            raise error(
                f"{holder} another run ({', '.join(fixed)}) and --force can't change that, as {reason}: give the same, "
                "or another --out"
            )
    return ", ".join(words.values())
