"""Says with which settings a run whose GPU memory ran out would fit, by the planner."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from mpdit_kernels.hardware import GPUS, Gpu, find_gpu

from mpdit.planning.memory import MEMORY_ERROR, memory
from mpdit.planning.plan import Request
from mpdit.training.optimizers import OPTIMIZERS
from mpdit.training.run import Run
from mpdit.training.setup import planned_gpu

_DEFAULT_GPU = "a100-40gb"


def gpu_of(run: Run) -> tuple[Gpu, bool]:
    """Return the GPU that is planned for, and whether it was named or is here."""
    named = planned_gpu(run.config.plan_gpu)
    if named is None and torch.cuda.is_available():
        named = find_gpu(torch.cuda.get_device_name(run.env.local_rank))
    return named or GPUS[_DEFAULT_GPU], named is not None


def request_of(run: Run, gpu: Gpu) -> Request:
    """Return the run as the planner is asked about it."""
    config = run.config
    return Request(
        gpu,
        run.env.size,
        config.global_batch,
        run.zero_stage,
        config.grad_accum_steps,
        config.precision,
        config.activation_checkpointing,
        epochs=config.steps * config.global_batch / run.manifest.num_samples,
        images=run.manifest.num_samples,
        optimizer_bytes=OPTIMIZERS[config.optimizer].step_bytes,
    )


def what_fits(run: Run) -> str:
    """Return what the plan says the run takes, and the first settings that fit.

    More micro steps are tried first, then checkpointing, then higher ZeRO stages. As the plan has just been wrong, or
    something else was in the memory, what fits leaves room for the plan's error, and takes less than was predicted for
    this run by as much.
    """
    gpu, _ = gpu_of(run)
    if torch.cuda.is_available():  # the one that is here, with the memory it has
        name = torch.cuda.get_device_name(run.env.local_rank)
        total = torch.cuda.get_device_properties(run.env.local_rank).total_memory
        gpu = replace(find_gpu(name) or gpu, name=name, memory=total)
    request = request_of(run, gpu)
    predicted = _bytes(run, request)
    room = min(gpu.memory, predicted) / (1 + MEMORY_ERROR)
    planned = (
        f"by the plan this run takes {predicted / 2**30:.2f} of {gpu.memory / 2**30:.2f} GiB on each {gpu.name}, with "
        f"{run.ds['train_micro_batch_size_per_gpu']} images a micro step"
    )
    for other in _alternatives(request):
        if (needed := _bytes(run, other)) <= room:
            given = []
            if other.grad_accum_steps != request.grad_accum_steps:
                given.append(f"--grad-accum-steps {other.grad_accum_steps}")
            if other.activation_checkpointing != request.activation_checkpointing:
                given.append("--activation-checkpointing")
            if other.zero != request.zero:
                given.append(f"--ds_config zero{other.zero}")
            return f"{planned}: give {' '.join(given)}, which takes {needed / 2**30:.2f} GiB"
    return f"{planned}, and nothing that leaves room fits: use a smaller model, more GPUs, or GPUs with more memory"


def _alternatives(request: Request) -> Iterator[Request]:
    """Yield the same step split otherwise, cheapest in speed first."""
    first, each = request.grad_accum_steps or 1, request.images_per_gpu
    for zero in range(request.zero, 4 if request.gpus > 1 else request.zero + 1):
        for activation_checkpointing in (False, True)[request.activation_checkpointing :]:
            for grad_accum_steps in (count for count in range(first, each + 1) if each % count == 0):
                yield replace(
                    request,
                    zero=zero,
                    activation_checkpointing=activation_checkpointing,
                    grad_accum_steps=grad_accum_steps,
                )


def _bytes(run: Run, request: Request) -> float:
    grad_accum_steps = request.grad_accum_steps or 1
    return memory(run.model, request.setting(request.images_per_gpu // grad_accum_steps, grad_accum_steps)).total
