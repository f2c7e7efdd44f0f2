"""Sets a run up: arguments, DeepSpeed configuration, data, model and folder, all checked, nothing written yet."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import itertools
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from mpdit_kernels.hardware import GPUS, Gpu, find_gpu

from mpdit.core.dist_env import DistEnv
from mpdit.core.errors import CheckpointError, ConfigError, DataError
from mpdit.core.files import check_links, expand_path, is_utf8
from mpdit.core.gpu import gpu_problem
from mpdit.core.text import counted
from mpdit.data.digits import VERSION, build_digits
from mpdit.data.latents import LatentDataset
from mpdit.data.loaders import BatchPlan
from mpdit.data.open import open_latents
from mpdit.data.quarantine import QUARANTINE_NAME, Quarantine
from mpdit.model.config import ModelConfig
from mpdit.training.arguments import parse_arguments
from mpdit.training.checkpoint.format import Checkpoint, committed_folders
from mpdit.training.checkpoint.resume import check_same
from mpdit.training.checkpoint.weights import is_checkpoint
from mpdit.training.config import DIGITS, TrainConfig, with_defaults
from mpdit.training.deepspeed_config import arguments_from, complete, read_ds_config
from mpdit.training.init_weights import GIVEN_LATER, load_initial, recorded_digest, weights_digest
from mpdit.training.run import WANDB_NAME, Run

MAY_CHANGE_ON_RESUME = {
    *("ds_config", "model", "override", "data", "data_scale", "normalization", "init_from"),
    *("out", "resume", "force", "dry_run", "plan_gpu", "plan_gpus", "progress", "tensorboard", "wandb"),
    *("bad_records", "gpu_stage", "grad_accum_steps", "activation_checkpointing", "max_skips", "hang_timeout"),
    *("log_every", "sample_every", "sample_steps", "sample_guidance", "checkpoint_every", "keep"),
    *("profile", "profile_steps", "profile_ranks"),
}
"""Fields of TrainConfig that may differ when a run is resumed: they don't decide what is learnt (model, data and
initial weights are compared whole)."""

_BEFORE_A_RUN = {"hang", "profile", ".config.json.partial", WANDB_NAME, f".{WANDB_NAME}.partial"}
"""What an attempt that ended before it was a run may have left in its folder."""


@contextlib.contextmanager
def _os_errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except OSError as error:  # a name that is too long, a folder that may not be read, ...
        raise ConfigError(f"{error.filename or 'input'} can't be used: {error.strerror or error}") from error


@_os_errors_in_one_line()
def prepare(arguments: Sequence[str], env: DistEnv) -> Run:
    """Check everything that can be checked without the other ranks; the same outcome on every rank.

    Raises:
        UserError: naming what is wrong, where, and how to mend it. Nothing has been written then, except that the
            embedded digits may have been prepared in the user's cache.
    """
    # Settings as asked for, in the arguments and in DeepSpeed's file, then defaults. What nobody gave and machines
    # decide, precision and batch, is settled below: a run that was begun on another goes on as it was.
    given = parse_arguments(arguments)
    planned_gpus = given.get("plan_gpus", 0) if given.get("dry_run") and env.size == 1 else 0
    if planned_gpus > 0:  # a dry run of one process stands for the first of so many ranks
        env = DistEnv(size=planned_gpus, local_size=planned_gpus)
    ds = read_ds_config(given.get("ds_config", TrainConfig.ds_config))
    places = [Path(path) for path in (given.get("out"), given.get("resume")) if path not in (None, "", "auto", "never")]
    given |= arguments_from(ds, given, env.size, _begun(places)[1].get("global_batch"))
    asked = TrainConfig(**with_defaults(given))
    if not asked.dry_run and (problem := gpu_problem()):
        raise ConfigError(problem)
    precisions = _precisions(asked, env)
    if asked.precision not in ("auto", *precisions):
        raise ConfigError("precision is bf16, which this GPU lacks: give --precision fp32")
    if asked.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError("--wandb needs the wandb package: pip install 'mpdit[wandb]', or leave --wandb out")
    if asked.profile == "none" and (unread := given.keys() & {"profile_steps", "profile_ranks"}):
        raise ConfigError(f"{min(unread)} is given but nothing is profiled: add --profile torch, or leave it out")
    asked.profiling.check(env.size)

    # Data and the model that fits it
    alone = asked.model_config({})  # what is wrong with the model itself is said before the data are read
    dataset = _open_data(asked)
    manifest = dataset.manifest
    fields = {"channels": manifest.channels, "num_classes": manifest.num_classes}
    if manifest.height == manifest.width and manifest.height % alone.stages[0].patch == 0:
        fields["input_size"] = manifest.height
    model = asked.model_config(fields)
    manifest.check_model(model)

    # The run's folder, and the run that is continued, if any
    identity = fingerprint(asked, model, dataset)
    if asked.init_from and not (asked.dry_run and asked.init_from == GIVEN_LATER):
        # What the weights were when the run began, where that is known.
        goes_on = asked.out and not _is_fresh(asked, Path(asked.out))
        known = recorded_digest(Path(asked.out), asked.init_from) if goes_on else None
        identity["init_from"] = known or weights_digest(asked.init_from)
    parts = env.size * asked.grad_accum_steps
    # Micro steps of a given size leave the batch nothing to follow.
    free = {"global_batch"} - given.keys() if "train_micro_batch_size_per_gpu" not in ds else set()
    default_batch = with_defaults({"data": asked.data})["global_batch"]
    batches = [asked.global_batch, _rounded(asked.global_batch, parts) if free else default_batch]
    named = {"precision": precisions if asked.precision == "auto" else [asked.precision], "global_batch": batches}
    out = Path(asked.out) if asked.out else _default_folder(asked, identity, named, free)
    places = [out] if asked.resume in ("auto", "never") else [out, Path(asked.resume)]
    for name, path in zip(("out", "resume"), places, strict=False):
        if not is_utf8(whole := os.path.abspath(path)):
            raise ConfigError(f"{name} {whole!a} is not UTF-8, and safetensors opens no such path: give another")
    begun, theirs = _begun(places)
    begun = begun or out

    # What is trained with
    precision: Any = asked.precision
    if precision == "auto":
        precision = theirs["precision"] if theirs.get("precision") in precisions else precisions[0]
    recorded = theirs.get("global_batch")
    before = recorded if free and isinstance(recorded, int) else asked.global_batch
    batch = _rounded(before, parts) if free else before
    config = replace(asked, precision=precision, global_batch=batch)
    identity |= {"precision": precision, "global_batch": batch}
    try:
        BatchPlan(batch, env.size, env.rank, config.grad_accum_steps)
    except ConfigError as error:
        why = " (the number of ranks is that of plan_gpus)" if planned_gpus else ""
        raise ConfigError(f"{error}{why}") from error
    check_folder(out, identity, config.resume, config.force, free)
    fresh = _is_fresh(config, out)
    if fresh and config.normalization == "auto":
        manifest.check_normalization()
    initial = load_initial(config.init_from, model, manifest) if fresh and "init_from" in identity else None
    classes_before = initial.classes if initial else ()
    if not fresh and ("init_from" in identity or theirs.get("data") != identity["data"]):
        classes_before = _recorded_classes(begun, model.num_classes)
    notes = []
    if batch != before:
        whose = f"{before} of the run in {begun}" if theirs else f"default of {before}"
        notes.append(
            f"global_batch is {batch}, as {counted(env.size, 'rank')} x "
            f"{counted(config.grad_accum_steps, 'micro step')} can't share the {whose}: give --global-batch to have "
            "the same on any number of ranks"
        )
    elif batch != asked.global_batch:
        notes.append(f"global_batch is {batch}, as the run in {begun} has it; the default is {asked.global_batch}")
    if asked.precision == "auto" and precision != precisions[0]:
        notes.append(f"precision is {precision}, as the run in {begun} has it; the default here is {precisions[0]}")
    if model.input_size != alone.input_size:
        notes.append(
            f"input_size is {model.input_size}, as the data's latents are; {config.model} has {alone.input_size}"
        )
    ds = complete(ds, config, env.size, torch.cuda.is_available())
    if config.compile and ds["zero_optimization"].get("stage") == 3:
        raise ConfigError("compile needs weights that stay where they are, and ZeRO-3 moves them: take a lower stage")
    return Run(
        config,
        model,
        ds,
        # Reads as `dataset` does, but a damaged record becomes the next sound one, up to --bad-records of them.
        Quarantine(dataset, config.bad_records, out / QUARANTINE_NAME, identity["data"], write=not config.dry_run),
        env,
        out,
        identity,
        frozenset(free),
        initial,
        classes_before,
        tuple(notes),
    )


def _rounded(batch: int, parts: int) -> int:
    """Return the batch, or the next that can be shared: a default must not refuse to run on, say, six GPUs."""
    return -(-batch // parts) * parts


def _is_fresh(config: TrainConfig, out: Path) -> bool:
    """Return whether no checkpoint will be continued, so that initial weights are needed."""
    return config.resume == "never" or (config.resume == "auto" and not committed_folders(out))


def planned_gpu(name: str) -> Gpu | None:
    """Return the GPU that --plan-gpu names, for a dry run; None for "". Raises ConfigError for one not listed."""
    gpu = find_gpu(name) if name else None
    if name and gpu is None:
        raise ConfigError(f"plan_gpu {name!r} is not one of {', '.join(GPUS)}: choose one of them")
    return gpu


def _precisions(config: TrainConfig, env: DistEnv) -> list[str]:
    """Return what this GPU, the planned one or this CPU computes in, what "auto" stands for first."""
    planned = planned_gpu(config.plan_gpu) if config.dry_run else None
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


def _default_folder(
    config: TrainConfig, identity: Mapping[str, Any], named: Mapping[str, Sequence[Any]], free: Collection[str]
) -> Path:
    """Return a folder of its own for each run that can't continue another's; any ranks and ZeRO stage can.

    Its name comes from data, model and identity, with the first values of the fields `named`, or with others of them by
    which there is a run already; in that a field that is `free` may have changed since.
    """
    data = config.data if config.data == DIGITS else Path(config.data).absolute().name
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{data}-{config.model}")
    places = []
    for values in itertools.product(*named.values()):
        by = dict(zip(named, values, strict=True))
        places.append(Path(f"runs/{name}-{short_digest({**identity, **by})}"))
        wanted = {"precision": by["precision"], "global_batch": config.global_batch}
        theirs = _recorded_identity(places[-1])
        if theirs and all(theirs.get(field) == value for field, value in wanted.items() if field not in free):
            return places[-1]
    return places[0]


def check_folder(
    out: Path, identity: Mapping[str, Any], resume: str, force: bool = False, free: Collection[str] = ()
) -> None:
    """Raise ConfigError unless `out` is new, empty, or holds a run to be continued: of this identity, or by force.

    Fields of it that are `free` may differ.
    """
    check_links(out, *(out.iterdir() if out.is_dir() else ()))
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
    check_same(theirs, identity, f"out {out} holds", force, ConfigError, free)


def _begun(places: Sequence[Path]) -> tuple[Path | None, dict[str, Any]]:
    """Return the first of some folders and checkpoints that says what run it is of, and what it says."""
    return next(((path, found) for path in places if (found := _recorded_identity(path))), (None, {}))


def _recorded_identity(out: Path) -> dict[str, Any] | None:
    """Return a checkpoint's, or a run's by its newest; config.json's may be of settings forced since."""
    for folder in [out] if is_checkpoint(out) else reversed(committed_folders(out)):
        with contextlib.suppress(CheckpointError):
            return Checkpoint.open(folder).identity
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        return dict(json.loads((out / "config.json").read_bytes())["identity"])
    return None


def _recorded_classes(begun: Path, num_classes: int) -> tuple[int, ...]:
    """Return the classes that the run of a folder or checkpoint wrote down as trained; all where it names none."""
    folder = begun.absolute().parents[1] if is_checkpoint(begun) else begun
    try:
        named = json.loads((folder / "config.json").read_bytes())["data"]["present_classes"]
        return tuple(set(range(num_classes)).intersection(named))
    except (OSError, ValueError, KeyError, TypeError):
        return tuple(range(num_classes))


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
