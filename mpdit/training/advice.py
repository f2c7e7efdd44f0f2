"""Says, before a run begins, what its settings and its data will come to that few would want."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator

import torch

from mpdit.core.gpu import too_old
from mpdit.core.text import counted, readable_bytes
from mpdit.planning.account import account
from mpdit.training.checkpoint.format import KINDS, committed_folders
from mpdit.training.config import GRID, with_defaults
from mpdit.training.run import Run
from mpdit.training.safety.launcher import missing_hostfile

_SHOWN = 6
"""Classes that a line names."""
_MANY = 3000
"""Epochs that nobody trains on purpose: DiT's 7 million steps (Peebles and Xie, ICCV 2023) are 1400 of ImageNet."""
_LONG = 1000
"""Steps that are worth a checkpoint before the last."""


def advice(run: Run) -> list[str]:
    """Return what is worth knowing of a run before it begins, a line each; for rank 0."""
    initial = run.initial.notes if run.initial else ()
    return [*run.notes, *initial, *_launch(run), *_data(run), *_learning(run), *_saving(run)]


def _launch(run: Run) -> Iterator[str]:
    env, nodes = run.env, os.environ.get("SLURM_JOB_NUM_NODES", "")
    if env.hosts == 1 and (file := missing_hostfile()):
        yield f"deepspeed was given --hostfile {file}, which is no file: it trains on this machine alone"
    if nodes.isdigit() and int(nodes) > env.hosts:
        yield f"the SLURM job has {nodes} nodes, the run is on {env.hosts}: start it by srun, as launch/slurm.sh does"
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if (size := os.environ.get(name, "")).isdigit() and int(size) > env.size:
            yield f"MPI has started {size} processes, each a run of its own: use deepspeed, torchrun or srun ({name})"
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and (old := too_old(env.local_rank)):
        yield old
    if gpus > env.local_size and not run.config.plan_gpus:
        yield f"this machine has {gpus} GPUs, the run takes {env.local_size}: deepspeed --module mpdit train takes all"


def _data(run: Run) -> Iterator[str]:
    config, info = run.config, run.manifest
    yield from info.remarks()
    empty = set(range(run.model.num_classes)).difference(run.present_classes)
    never = empty.difference(run.classes_before)
    told = {"are not trained, and drawn only on request": never, "were trained before, not here": empty - never}
    for so, classes in told.items():
        if classes:
            named = ", ".join(map(str, sorted(classes)[:_SHOWN])) + (", ..." if len(classes) > _SHOWN else "")
            yield f"{len(classes)} of {run.model.num_classes} classes are empty ({named}): they {so}"
    if config.global_batch > info.num_samples:
        yield f"a step takes {config.global_batch} samples of {info.num_samples}: each comes several times a step"
    if (seen := config.steps * config.global_batch) < info.num_samples:
        yield f"the run ends within its first epoch: it sees {seen:,} of {info.num_samples:,} samples"
    if (epochs := seen // info.num_samples) > _MANY:
        yield f"the run goes over the {info.num_samples:,} samples {epochs:,} times: give fewer --steps"


def _learning(run: Run) -> Iterator[str]:
    config, default = run.config, with_defaults({"data": run.config.data})
    if (kept := config.ema_decay**config.steps) > 0.1:
        better = 1 - float(f"{1 - 0.01 ** (1 / config.steps):.1g}")  # leaves about a hundredth
        yield (
            f"the average of the weights (EMA) keeps {kept:.0%} of what it starts with, {config.ema_decay:g} ** "
            f"{config.steps}: give --ema-decay {better:g} or more steps, or draw with `mpdit sample --weights raw`"
        )
    if config.warmup >= config.steps > 1:
        yield f"the warm-up of {config.warmup} steps is as long as the run of {config.steps}: give a smaller --warmup"
    if config.lr == default["lr"] and not 1 / 4 < config.global_batch / default["global_batch"] < 4:
        yield (
            f"lr {config.lr:g} is the default, made for a global batch of {default['global_batch']}, and this one is "
            f"{config.global_batch}: give the --lr that suits it"
        )
    if config.lr == 0:
        yield "lr is 0, so nothing is learnt"
    if config.lr > 0.1:
        yield f"lr is {config.lr:g}, by which AdamW changes each weight at each step, and weights are mostly below 1"
    if 0 < config.clip <= 1e-6:
        yield f"clip is {config.clip:g}, so gradients vanish beside AdamW's epsilon: give about 1, or 0 for none"
    if config.time_sampler == "logit_normal" and abs(config.logit_mean) > 5:
        yield f"logit_mean is {config.logit_mean:g}, so that nearly all times are {int(config.logit_mean > 0)}"
    if config.class_dropout == 1:
        yield "class_dropout is 1, so classes are not trained"
    elif config.class_dropout > 0.5:
        yield f"class_dropout is {config.class_dropout:g}, so most samples are trained without their class"
    if config.class_dropout == 0 and run.model.num_classes > 1:
        yield "class_dropout is 0, so guidance is not trained: draw with --guidance 1 (here --sample-guidance 1)"
    if (kind := run.ds.get("communication_data_type", "fp32")) not in ("fp32", "float32"):
        yield f"gradients are added up over ranks in {kind}: remove communication_data_type from ds_config for fp32"
    if (modules := run.ds["torch_autocast"]["lower_precision_safe_modules"]) and config.precision == "bf16":
        yield f"gradients of {', '.join(map(str, modules))} are added up over ranks in bf16, as ds_config has it"


def _saving(run: Run) -> Iterator[str]:
    config = run.config
    if config.steps >= _LONG and not 0 < config.checkpoint_every < config.steps:
        yield f"nothing is saved before the last of {config.steps:,} steps: give a smaller --checkpoint-every"
    place = next(path for path in (run.out, *run.out.absolute().parents) if path.exists())
    weights, free = 4 * account(run.model).params_trainable, shutil.disk_usage(place).free
    # One checkpoint more while it is written, and the average beside the one that it replaces.
    more = max(0, config.keep + 1 - len(committed_folders(run.out)))
    if free < (wanted := (more * len(KINDS) + 2) * weights):
        yield (
            f"{readable_bytes(free)} are free at {place} and {readable_bytes(wanted)} will be needed, for "
            f"{counted(config.keep, 'checkpoint')}, one more while it is written, and the average: make room, or give "
            "a smaller --keep"
        )
    drawn = math.prod(GRID) * config.sample_steps * (1 if config.sample_guidance == 1 else 2)
    trained = 3 * config.global_batch / run.env.size * config.sample_every  # a backward pass is two forward ones
    if 0 < config.sample_every <= config.steps and drawn > trained:
        yield f"a grid every {config.sample_every} steps takes longer than the steps: give a larger --sample-every"
