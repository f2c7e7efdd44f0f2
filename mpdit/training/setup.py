"""Sets a run up: arguments, DeepSpeed configuration, data, model and folder, all checked, nothing written yet."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpdit_kernels import dispatch
from mpdit_kernels.hardware import GPUS, Gpu, find_gpu

from mpdit.core.dist_env import DistEnv
from mpdit.core.errors import CheckpointError, ConfigError, DataError
from mpdit.core.files import expand_path, is_utf8
from mpdit.data.digits import VERSION, build_digits
from mpdit.data.latents import LatentDataset
from mpdit.data.loaders import BatchPlan
from mpdit.data.manifest import DatasetInfo
from mpdit.data.open import open_latents
from mpdit.data.quarantine import QUARANTINE_NAME, Quarantine
from mpdit.model.config import ModelConfig
from mpdit.training.arguments import parse_arguments
from mpdit.training.checkpoint.format import Checkpoint, committed_folders
from mpdit.training.checkpoint.resume import check_same
from mpdit.training.checkpoint.weights import is_checkpoint
from mpdit.training.config import DIGITS, RENAMED, TrainConfig, with_defaults
from mpdit.training.deepspeed_config import arguments_from, complete, read_ds_config
from mpdit.training.init_weights import GIVEN_LATER, InitialWeights, load_initial, recorded_digest, weights_digest

FORMAT = "mpdit-run-1"

MAY_CHANGE_ON_RESUME = {
    *("ds_config", "model", "override", "data", "data_scale", "normalization", "init_from"),
    *("out", "resume", "force", "dry_run", "plan_gpu", "plan_gpus", "progress", "tensorboard", "wandb"),
    *("bad_records", "gpu_stage", "grad_accum_steps", "activation_checkpointing", "max_skips", "hang_timeout"),
    *("log_every", "sample_every", "sample_steps", "sample_guidance", "checkpoint_every", "keep"),
    *("profile", "profile_steps", "profile_ranks"),
}
"""Fields of TrainConfig that may differ when a run is resumed: they don't decide what is learnt (model, data and
initial weights are compared whole)."""

WANDB_NAME = "wandb.json"
"""The file in a run's folder that names its run in Weights & Biases."""

_BEFORE_A_RUN = {"hang", "profile", ".config.json.partial", WANDB_NAME, f".{WANDB_NAME}.partial"}
"""What an attempt that ended before it was a run may have left in its folder."""


@dataclass(frozen=True)
class Run:
    """Everything a training run is made of."""

    config: TrainConfig
    """With the precision that "auto" stands for here."""
    model: ModelConfig
    ds: dict[str, Any]
    """DeepSpeed's configuration, complete."""
    dataset: Quarantine
    plan: BatchPlan
    env: DistEnv
    out: Path
    identity: dict[str, Any]
    """What decides the weights, flat, in JSON types; a folder holds only one identity."""
    initial: InitialWeights | None = None
    """What a fresh start begins from, other than the seed's weights."""
    notes: tuple[str, ...] = ()
    """What nobody gave and was decided otherwise than by default, a line each."""

    @property
    def manifest(self) -> DatasetInfo:
        return self.dataset.manifest

    @property
    def zero_stage(self) -> int:
        return int(self.ds["zero_optimization"].get("stage", 0))

    @cached_property
    def present_classes(self) -> list[int]:
        """The data's classes that have samples; all of them where labels are read with the samples alone."""
        labels = self.dataset.labels
        return list(range(self.manifest.num_classes)) if labels is None else np.unique(labels).tolist()

    def data_metadata(self) -> dict[str, Any]:
        """Return what weights say of their data; with "present_classes" where others were never trained."""
        metadata = self.manifest.metadata()
        if "init_from" not in self.identity and len(self.present_classes) < self.model.num_classes:
            metadata["present_classes"] = self.present_classes
        return metadata

    def describe(self) -> dict[str, Any]:
        """Return the run's config.json."""
        names = {new: old for old, new in RENAMED.items()}  # as the file has always called them
        settings = {names.get(name, name): value for name, value in asdict(self.config).items()}
        return {
            "format": FORMAT,
            "identity": self.identity,
            "training": settings | {"out": str(self.out)},
            "model": self.model.to_dict(),
            "data": self.data_metadata() | {"num_samples": self.manifest.num_samples},
            "deepspeed": self.ds,
            "world_size": self.env.size,
            "kernels": dispatch.mode(),
        }


def prepare(arguments: Sequence[str], env: DistEnv) -> Run:
    """Check everything that can be checked without the other ranks; the same outcome on every rank.

    Raises:
        UserError: naming what is wrong, where, and how to mend it. Nothing has been written then, except that the
            embedded digits may have been prepared in the user's cache.
    """
    try:
        return _prepare(arguments, env)
    except OSError as error:  # a name that is too long, a folder that may not be read, ...
        raise ConfigError(f"{error.filename or 'input'} can't be used: {error.strerror or error}") from error


def _prepare(arguments: Sequence[str], env: DistEnv) -> Run:
    # Settings: what was given, in the arguments and in DeepSpeed's file, then defaults, then what follows from both.
    given = parse_arguments(arguments)
    planned_gpus = given.get("plan_gpus", 0) if given.get("dry_run") and env.size == 1 else 0
    if planned_gpus > 0:  # a dry run of one process stands for the first of so many ranks
        env = DistEnv(size=planned_gpus, local_size=planned_gpus)
    ds = read_ds_config(given.get("ds_config", TrainConfig.ds_config))
    given |= arguments_from(ds, given, env.size)
    settings = with_defaults(given)
    # What nobody gives and machines decide: a run that was begun on another goes on as it was.
    decided: dict[str, list[Any]] = {}
    precisions = _precisions(settings, env)
    if settings["precision"] == "auto":
        settings["precision"], decided["precision"] = precisions[0], precisions
    if settings["precision"] not in precisions:
        raise ConfigError("precision is bf16, which this GPU lacks: give --precision fp32")
    if "global_batch" not in given:  # a default must not refuse to run on, say, six GPUs
        default = settings["global_batch"]
        parts = env.size * max(1, settings["grad_accum_steps"])
        settings["global_batch"] = -(-default // parts) * parts
        decided["global_batch"] = [default, settings["global_batch"]]  # before, a run was known by the latter
    config = TrainConfig(**settings)
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError("--wandb needs the wandb package: pip install 'mpdit[wandb]', or leave --wandb out")
    if config.profile == "none" and (unread := given.keys() & {"profile_steps", "profile_ranks"}):
        raise ConfigError(f"{min(unread)} is given but nothing is profiled: add --profile torch, or leave it out")
    config.profiling.check(env.size)
    try:
        plan = BatchPlan(config.global_batch, env.size, env.rank, config.grad_accum_steps)
    except ConfigError as error:
        why = " (the number of ranks is that of plan_gpus)" if planned_gpus else ""
        raise ConfigError(f"{error}{why}") from error

    # Data and the model that fits it
    alone = config.model_config({})  # what is wrong with the model itself is said before the data are read
    dataset = _open_data(config)
    manifest = dataset.manifest
    fields = {"channels": manifest.channels, "num_classes": manifest.num_classes}
    if manifest.height == manifest.width and manifest.height % alone.stages[0].patch == 0:
        fields["input_size"] = manifest.height
    model = config.model_config(fields)
    manifest.check_model(model)

    # The run's folder: new, or of a run that may be continued
    identity = fingerprint(config, model, dataset)
    if config.init_from and not (config.dry_run and config.init_from == GIVEN_LATER):
        goes_on = config.out and not _is_fresh(config, Path(config.out))
        # What the weights were when the run began, where that is known.
        known = recorded_digest(Path(config.out), config.init_from) if goes_on else None
        identity["init_from"] = known or weights_digest(config.init_from)
    identity, out = _known_by(config, identity, decided)
    config = replace(config, precision=identity["precision"])
    for name, path in {"out": out, "resume": out if config.resume in ("auto", "never") else config.resume}.items():
        if not is_utf8(whole := os.path.abspath(path)):
            raise ConfigError(f"{name} {whole!a} is not UTF-8, and safetensors opens no such path: give another")
    check_folder(out, identity, config.resume, config.force)

    # Reads as `dataset` does, but a damaged record becomes the next sound one, up to --bad-records of them.
    sound = Quarantine(dataset, config.bad_records, out / QUARANTINE_NAME, identity["data"], write=not config.dry_run)
    initial = None
    if config.normalization == "auto" and _is_fresh(config, out):
        manifest.check_normalization()
    if "init_from" in identity and _is_fresh(config, out):
        initial = load_initial(config.init_from, model, manifest)
    notes = []
    if (batch := decided.get("global_batch")) and batch[0] != batch[1]:
        notes.append(
            f"global_batch is {batch[1]}, as {env.size} ranks x {config.grad_accum_steps} micro steps can't share the "
            f"default of {batch[0]}: give --global-batch to have the same on any number of ranks"
        )
    if (default_precision := settings["precision"]) != config.precision:
        notes.append(
            f"precision is {config.precision}, as the run in {out} has it; the default here is {default_precision}"
        )
    if model.input_size != alone.input_size:
        notes.append(
            f"input_size is {model.input_size}, as the data's latents are; {config.model} has {alone.input_size}"
        )
    return Run(config, model, complete(ds, config, env.size), sound, plan, env, out, identity, initial, tuple(notes))


def _known_by(
    config: TrainConfig, identity: dict[str, Any], decided: Mapping[str, list[Any]]
) -> tuple[dict[str, Any], Path]:
    """Return the identity and folder of the run that is there under any of the values decided, else by the first."""
    named = [identity | dict(zip(decided, values, strict=True)) for values in itertools.product(*decided.values())]
    places = [Path(config.out or _default_folder(config, each)) for each in named]
    begun = None if config.resume in ("auto", "never") else _recorded_identity(Path(config.resume))
    for each, out in zip(named, places, strict=True):
        theirs = _recorded_identity(out) or begun
        if theirs is not None and all(theirs.get(name) == each[name] for name in decided):
            return each, out
    return named[0], places[0]


def _is_fresh(config: TrainConfig, out: Path) -> bool:
    """Return whether no checkpoint will be continued, so that initial weights are needed."""
    return config.resume == "never" or (config.resume == "auto" and not committed_folders(out))


def planned_gpu(name: str) -> Gpu | None:
    """Return the GPU that --plan-gpu names, for a dry run; None for "". Raises ConfigError for one not listed."""
    gpu = find_gpu(name) if name else None
    if name and gpu is None:
        raise ConfigError(f"plan_gpu {name!r} is not one of {', '.join(GPUS)}: choose one of them")
    return gpu


def _precisions(settings: Mapping[str, Any], env: DistEnv) -> list[str]:
    """Return what this GPU, the planned one or this CPU computes in, what "auto" stands for first."""
    planned = planned_gpu(settings["plan_gpu"]) if settings["dry_run"] else None
    if planned is None and not torch.cuda.is_available():
        return ["fp32", "bf16"]
    capability = planned.capability if planned else torch.cuda.get_device_capability(env.local_rank)
    return ["bf16", "fp32"] if capability[0] >= 8 else ["fp32"]


def _open_data(config: TrainConfig) -> LatentDataset:
    if config.data != DIGITS:
        classes = config.model_overrides.get("num_classes")
        scale, normalization = config.data_scale, config.normalization
        return open_latents(config.data, scale=scale, normalization=normalization, num_classes=classes)
    folder = Path(expand_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "mpdit", f"digits-{VERSION}")
    try:
        return build_digits(folder)
    except OSError as error:
        raise DataError(f"the digits can't be prepared in {folder} ({error}): set XDG_CACHE_HOME elsewhere") from error
    except DataError as error:
        raise DataError(
            f"the embedded digits in {folder} are damaged: delete it, it will be made again ({error})"
        ) from error


def _default_folder(config: TrainConfig, identity: Mapping[str, Any]) -> str:
    """Return a folder of its own for each run that can't continue another's; any ranks and ZeRO stage can."""
    data = config.data if config.data == DIGITS else Path(config.data).absolute().name
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{data}-{config.model}")
    return f"runs/{name}-{short_digest(identity)}"


def check_folder(out: Path, identity: Mapping[str, Any], resume: str, force: bool = False) -> None:
    """Raise ConfigError unless `out` is new, empty, or holds a run to be continued: of this identity, or by force."""
    at = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
    if not at.is_dir() or not os.access(at, os.W_OK | os.X_OK):
        raise ConfigError(f"out {out} can't be written: {at} is not a folder we may write to; give another --out")
    if not out.exists() or all(path.name in _BEFORE_A_RUN for path in out.iterdir()):
        return
    if resume == "never":
        raise ConfigError(f"out {out} is not empty and resume is 'never': give another --out, or --resume auto")
    theirs = _recorded_identity(out)
    if theirs is None:
        raise ConfigError(f"out {out} holds files but no run ({out / 'config.json'} can't be read): give another --out")
    check_same(theirs, identity, f"out {out} holds", force, ConfigError)


def _recorded_identity(out: Path) -> dict[str, Any] | None:
    """Return a checkpoint's, or a run's by its newest; config.json's may be of settings forced since."""
    for folder in [out] if is_checkpoint(out) else reversed(committed_folders(out)):
        with contextlib.suppress(CheckpointError):
            return Checkpoint.open(folder).identity
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        return dict(json.loads((out / "config.json").read_bytes())["identity"])
    return None


def fingerprint(config: TrainConfig, model: ModelConfig, dataset: LatentDataset) -> dict[str, Any]:
    """Return what decides the weights, flat, in JSON types: settings, model and data; not yet the initial weights."""
    training = {name: value for name, value in asdict(config).items() if name not in MAY_CHANGE_ON_RESUME}
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
