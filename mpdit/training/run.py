"""A run, prepared: arguments, DeepSpeed configuration, data, model and folder all checked, nothing written yet."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mpdit_kernels import dispatch
from mpdit_kernels.hardware import GPUS, Gpu, find_gpu

from mpdit.core.dist_env import DistEnv
from mpdit.core.errors import CheckpointError, ConfigError, DataError
from mpdit.data.dataset import LatentDataset
from mpdit.data.digits import VERSION, build_digits
from mpdit.data.manifest import DatasetInfo
from mpdit.data.open import open_latents
from mpdit.data.order import BatchPlan
from mpdit.data.quarantine import QUARANTINE_NAME, Quarantine
from mpdit.model.config import ModelConfig
from mpdit.training.arguments import parse_arguments
from mpdit.training.config import DIGITS, TrainConfig
from mpdit.training.deepspeed_config import arguments_from, complete, read_ds_config, zero_stage
from mpdit.training.identity import check_same
from mpdit.training.initial import GIVEN_LATER, InitialWeights, load_initial, recorded_digest, weights_digest

FORMAT = "mpdit-run-1"
CHECKPOINT_NAME = re.compile(r"step-\d{8,}")
"""Of a checkpoint's folder in OUT/checkpoints."""

MARKER = "COMMITTED"
"""The file in a checkpoint's folder that is written last."""

MAY_CHANGE_ON_RESUME = {"ds_config", "model", "override", "data", "data_scale", "normalization", "out", "resume"} | {
    *("force", "bad_records", "gpu_stage", "accumulation", "checkpointing", "progress", "tensorboard", "wandb"),
    *("max_skips", "log_every", "sample_every", "sample_steps", "sample_guidance", "checkpoint_every", "keep"),
    *("hang_timeout",),
    *("profile", "profile_steps", "profile_ranks", "init_from", "dry_run", "plan_gpu", "plan_gpus"),
}
"""Fields a run may be continued with changed: they don't decide what is learnt (model, data and initial weights are
compared whole)."""

_BEFORE_A_RUN = {"hang", "profile", ".config.json.partial"}
"""What an attempt that ended before it was a run may have left in its folder."""


@dataclass(frozen=True)
class Run:
    """Everything a training run is made of; `config` is resolved: a precision, a folder."""

    config: TrainConfig
    model: ModelConfig
    ds: dict[str, Any]
    dataset: Quarantine
    plan: BatchPlan
    env: DistEnv
    out: Path
    identity: dict[str, Any]
    """What decides the weights, flat, in JSON types; a folder holds only one identity."""
    initial: InitialWeights | None = None
    """What a fresh start begins from, other than the seed's weights."""

    @property
    def manifest(self) -> DatasetInfo:
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
    given = parse_arguments(arguments)
    started, env = env, _planned_env(given, env)
    ds = read_ds_config(given["ds_config"])
    given |= arguments_from(ds, given, env.size)
    config = TrainConfig.create(**given)
    config = config.replace(precision=_precision(config, env))
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError("--wandb needs the wandb package: pip install 'mpdit[wandb]', or leave --wandb out")
    if config.profile == "none" and (unread := given.keys() & {"profile_steps", "profile_ranks"}):
        raise ConfigError(f"{min(unread)} is given but nothing is profiled: add --profile torch, or leave it out")
    config.profiling.check(env.size)
    if not given.keys() & {"global_batch", "accumulation"}:  # a default must not refuse to run on, say, six GPUs
        parts = env.size
        config = config.replace(global_batch=-(-config.global_batch // parts) * parts)
    try:
        plan = BatchPlan(config.global_batch, env.size, env.rank, config.accumulation)
    except ConfigError as error:
        if env is started:
            raise
        raise ConfigError(f"{error} (the number of ranks is that of plan_gpus)") from error
    config.model_config({})
    dataset = _open_data(config)
    manifest = dataset.manifest
    model = config.model_config({"channels": manifest.channels, "num_classes": manifest.num_classes})
    manifest.check_model(model)
    ds = complete(ds, config, env.size)
    identity = _identity(config, model, dataset)
    if not config.out:
        config = config.replace(out=_default_folder(config, identity))
    out = Path(config.out)
    for name, path in (("out", out), ("resume", Path(config.resume))):
        try:
            str(path.absolute()).encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"{name} {str(path)!a} is not UTF-8, and safetensors opens no such path: give another"
            ) from None
    check_folder(out, identity, config.resume, config.force)
    sound = Quarantine(dataset, config.bad_records, out / QUARANTINE_NAME, identity["data"], write=not config.dry_run)
    initial = load_initial(config.init_from, model, manifest) if "init_from" in identity and _is_fresh(config) else None
    return Run(config, model, ds, sound, plan, env, out, identity, initial)


def planned_gpu(config: TrainConfig) -> Gpu | None:
    """The GPU that --plan-gpu names, for a dry run; None when it is not given. ConfigError for one not listed."""
    if not config.plan_gpu:
        return None
    gpu = find_gpu(config.plan_gpu)
    if gpu is None:
        raise ConfigError(f"plan_gpu {config.plan_gpu!r} is not one of {', '.join(GPUS)}: choose one of them")
    return gpu


def check_folder(out: Path, identity: Mapping[str, Any], resume: str, force: bool = False) -> None:
    """ConfigError unless `out` is new, empty, or holds a run that may be continued: of this identity, or by force."""
    at = next(path for path in (out, *out.absolute().parents) if path.exists())
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
    """Of the run in a folder, as its newest checkpoint has it; config.json's may be of settings forced since."""
    for folder in (*reversed(committed_folders(out)), None):
        try:
            fields = json.loads((out / "config.json").read_bytes() if folder is None else committed_manifest(folder))
            named = folder is None or fields["step"] == step_of(folder)  # it may be a copy of an older one
            if named and isinstance(fields["identity"], dict):
                return dict(fields["identity"])
        except (CheckpointError, OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    return None


def check_identity(run: Run, theirs: Mapping[str, Any], where: str) -> None:
    """CheckpointError, showing the differences, when a checkpoint that lies in `where` is of another run.

    With --force rank 0 says what changes instead, and only what can't be changed is an error.
    """
    changes = check_same(theirs, run.identity, f"{where} is of", run.config.force, CheckpointError)
    if changes and run.env.rank == 0:
        print(f"forced: {where} goes on with other settings: {changes}", file=sys.stderr, flush=True)


def _open_data(config: TrainConfig) -> LatentDataset:
    if config.data == DIGITS:
        return _embedded_digits()
    return open_latents(
        config.data,
        scale=config.data_scale,
        normalization=config.normalization,
        num_classes=config.model_overrides.get("num_classes"),
    )


def _embedded_digits() -> LatentDataset:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mpdit", f"digits-{VERSION}")
    try:
        return build_digits(folder)
    except OSError as error:
        raise DataError(f"the digits can't be prepared in {folder} ({error}): set XDG_CACHE_HOME elsewhere") from error
    except DataError as error:
        raise DataError(
            f"the embedded digits in {folder} are damaged: delete it, it will be made again ({error})"
        ) from error


def _identity(config: TrainConfig, model: ModelConfig, dataset: LatentDataset) -> dict[str, Any]:
    training = {name: value for name, value in config.to_dict().items() if name not in MAY_CHANGE_ON_RESUME}
    if config.lr_schedule == "constant":
        del training["steps"]  # such a run may be made longer
    return {
        **training,
        **{f"model.{name}": value for name, value in model.to_dict().items()},
        "data": f"{dataset.manifest.kind} {_digest(dataset.manifest.to_json() + dataset.digest)}",
        **_origin(config),
    }


def _origin(config: TrainConfig) -> dict[str, str]:
    """The digest of the weights a run starts from, if any: what it was when the run began, where that is known."""
    if not config.init_from or (config.dry_run and config.init_from == GIVEN_LATER):
        return {}
    known = recorded_digest(Path(config.out), config.init_from) if config.out and not _is_fresh(config) else None
    return {"init_from": known or weights_digest(config.init_from)}


def _is_fresh(config: TrainConfig) -> bool:
    """Whether no checkpoint will be continued, so that initial weights are needed."""
    return config.resume == "never" or (config.resume == "auto" and not committed_folders(Path(config.out)))


def committed_folders(out: Path) -> list[Path]:
    """The checkpoints' folders of a run, oldest first; whether they are sound is not looked at."""
    folder = out / "checkpoints"
    found = folder.iterdir() if folder.is_dir() else iter(())
    named = (path for path in found if CHECKPOINT_NAME.fullmatch(path.name) and (path / MARKER).is_file())
    return sorted(named, key=step_of)


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(folder.name.removeprefix("step-"))


def committed_manifest(folder: Path) -> bytes:
    """A checkpoint's manifest.json. CheckpointError unless it is what was committed."""
    path, marker = folder / "manifest.json", folder / MARKER
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{folder} is not a complete checkpoint ({path}: {error})") from error
    try:
        expected = marker.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder} was never committed ({marker}: {error})") from error
    if hashlib.sha256(text).hexdigest() != expected:
        raise CheckpointError(f"{path} does not match the SHA-256 in {marker}: it was altered; use an older one")
    return text


def _planned_env(given: Mapping[str, Any], env: DistEnv) -> DistEnv:
    """A dry run of one process may stand for the first of --plan-gpus ranks."""
    gpus = given.get("plan_gpus", 0)
    if not given.get("dry_run") or env.size > 1 or gpus < 1:
        return env
    return DistEnv(size=gpus, local_size=gpus)


def _default_folder(config: TrainConfig, identity: Mapping[str, Any]) -> str:
    """A folder of its own for each run that can't continue another's checkpoints; any ranks and ZeRO stage can."""
    data = config.data if config.data == DIGITS else Path(config.data).absolute().name
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{data}-{config.model}")
    return f"runs/{name}-{_digest(identity)}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def _precision(config: TrainConfig, env: DistEnv) -> str:
    planned = planned_gpu(config) if config.dry_run else None
    gpu = planned is not None or torch.cuda.is_available()
    capability = planned.capability if planned else torch.cuda.get_device_capability(env.local_rank) if gpu else (0, 0)
    supported = capability[0] >= 8
    if config.precision == "auto":
        return "bf16" if supported else "fp32"
    if config.precision == "bf16" and gpu and not supported:
        raise ConfigError("precision is bf16, which this GPU lacks: give --precision fp32")
    return config.precision
