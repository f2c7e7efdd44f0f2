"""A run, prepared: arguments, DeepSpeed configuration, data, model and folder all checked, nothing written yet."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mpdit_kernels import dispatch

from mpdit.config import ModelConfig
from mpdit.data.digits import VERSION, build_digits
from mpdit.data.latents import PackedLatents
from mpdit.data.manifest import Manifest
from mpdit.data.order import BatchPlan
from mpdit.errors import ConfigError, DataError
from mpdit.training.arguments import parse_arguments
from mpdit.training.config import DIGITS, TrainConfig
from mpdit.training.deepspeed_config import arguments_from, complete, read_ds_config, zero_stage
from mpdit.training.world import World

FORMAT = "mpdit-run-1"

_CASUAL = {"ds_config", "model", "override", "data", "out", "resume"} | {
    *("loader", "gpu_stage", "accumulation", "checkpointing", "progress", "tensorboard", "wandb"),
    *("log_every", "sample_every", "sample_steps", "sample_guidance", "checkpoint_every", "keep"),
    *("profile", "profile_steps", "profile_ranks"),
}
"""Fields a run may be continued with changed: they don't decide what is learnt (model and data are compared whole)."""


@dataclass(frozen=True)
class Run:
    """Everything a training run is made of; `config` is resolved: a precision, a folder."""

    config: TrainConfig
    model: ModelConfig
    ds: dict[str, Any]
    dataset: PackedLatents
    plan: BatchPlan
    world: World
    out: Path
    identity: dict[str, Any]
    """What decides the weights, flat, in JSON types; a folder holds only one identity."""

    @property
    def manifest(self) -> Manifest:
        return self.dataset.manifest

    @property
    def zero_stage(self) -> int:
        return zero_stage(self.ds)

    def describe(self) -> dict[str, Any]:
        """The run's config.json."""
        return {
            "format": FORMAT,
            "identity": self.identity,
            "training": self.config.to_dict(),
            "model": self.model.to_dict(),
            "data": self.manifest.metadata() | {"num_samples": self.manifest.num_samples},
            "deepspeed": self.ds,
            "world_size": self.world.size,
            "kernels": dispatch.mode(),
        }


def prepare(arguments: Sequence[str], world: World) -> Run:
    """Check everything that can be checked without the other ranks; the same outcome on every rank.

    Raises:
        UserError: naming what is wrong, where, and how to mend it. Nothing has been written then, except that the
            embedded digits may have been prepared in the user's cache.
    """
    given = parse_arguments(arguments)
    ds = read_ds_config(given["ds_config"])
    given |= arguments_from(ds, given, world.size)
    config = TrainConfig.create(**given)
    config = config.replace(precision=_precision(config.precision, world))
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError("--wandb needs the wandb package: pip install 'mpdit[wandb]', or leave --wandb out")
    if config.profile == "none" and (unread := given.keys() & {"profile_steps", "profile_ranks"}):
        raise ConfigError(f"{min(unread)} is given but nothing is profiled: add --profile torch, or leave it out")
    config.profiling.check(world.size)
    if not given.keys() & {"global_batch", "accumulation"}:  # a default must not refuse to run on, say, six GPUs
        parts = world.size
        config = config.replace(global_batch=-(-config.global_batch // parts) * parts)
    plan = BatchPlan(config.global_batch, world.size, world.rank, config.accumulation)
    config.model_config({})
    dataset = _embedded_digits() if config.data == DIGITS else PackedLatents.open(config.data)
    manifest = dataset.manifest
    model = config.model_config({"channels": manifest.channels, "num_classes": manifest.num_classes})
    manifest.check_model(model)
    ds = complete(ds, config, world.size)
    identity = _identity(config, model, manifest)
    if not config.out:
        config = config.replace(out=_default_folder(config, identity, world.size, zero_stage(ds)))
    check_folder(Path(config.out), identity, config.resume)
    return Run(config, model, ds, dataset, plan, world, Path(config.out), identity)


def check_folder(out: Path, identity: Mapping[str, Any], resume: str) -> None:
    """ConfigError unless `out` is new, empty, or holds a run of this identity that may be continued."""
    at = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not at.is_dir() or not os.access(at, os.W_OK | os.X_OK):
        raise ConfigError(f"out {out} can't be written: {at} is not a folder we may write to; give another --out")
    if not out.exists() or not any(out.iterdir()):
        return
    if resume == "never":
        raise ConfigError(f"out {out} is not empty and resume is 'never': give another --out, or --resume auto")
    path = out / "config.json"
    try:
        theirs = json.loads(path.read_text())["identity"]
        differences = compare(theirs, identity)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"out {out} holds files but no run ({path} can't be read): give another --out") from None
    if differences:
        raise ConfigError(f"out {out} holds another run ({differences}): give another --out, or the same settings")


def compare(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """How two identities differ, in words; empty when they don't."""
    ours = json.loads(json.dumps(ours))
    theirs = {"optimizer": "adamw_ema", **theirs}  # the only one there was when it was not written down
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    return ", ".join(f"{name} {theirs.get(name)} there, {ours.get(name)} here" for name in names)


def _embedded_digits() -> PackedLatents:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mpdit", f"digits-{VERSION}")
    try:
        return build_digits(folder)
    except OSError as error:
        raise DataError(f"the digits can't be prepared in {folder} ({error}): set XDG_CACHE_HOME elsewhere") from error
    except DataError as error:
        raise DataError(
            f"the embedded digits in {folder} are damaged: delete it, it will be made again ({error})"
        ) from error


def _identity(config: TrainConfig, model: ModelConfig, manifest: Manifest) -> dict[str, Any]:
    training = {name: value for name, value in config.to_dict().items() if name not in _CASUAL}
    if config.lr_schedule == "constant":
        del training["steps"]  # such a run may be made longer
    return {
        **training,
        **{f"model.{name}": value for name, value in model.to_dict().items()},
        "data": f"{manifest.kind} {_digest(manifest.to_json())}",
    }


def _default_folder(config: TrainConfig, identity: Mapping[str, Any], world_size: int, stage: int) -> str:
    """A folder of its own for each combination that can't continue another's checkpoints."""
    data = config.data if config.data == DIGITS else Path(config.data).absolute().name
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{data}-{config.model}")
    return f"runs/{name}-{_digest([identity, world_size, stage, config.steps])}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def _precision(wanted: str, world: World) -> str:
    gpu = torch.cuda.is_available()
    supported = gpu and torch.cuda.get_device_capability(world.local_rank)[0] >= 8
    if wanted == "auto":
        return "bf16" if supported else "fp32"
    if wanted == "bf16" and gpu and not supported:
        raise ConfigError("precision is bf16, which this GPU lacks: give --precision fp32")
    return wanted
