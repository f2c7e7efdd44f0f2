"""Which of the run's processes this is, and how it meets the others."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from mpdit.errors import ConfigError


@dataclass(frozen=True)
class World:
    """This process's place among the ranks, as launchers put it into the environment; alone when there is none."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls) -> World:
        """From RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_SIZE (DeepSpeed) or LOCAL_WORLD_SIZE (torchrun), or from srun.

        Of SLURM's variables those of a job step of several tasks count, and only where no launcher has set its own: a
        plain command in a batch script or an interactive shell has only the job's, and is alone.
        """
        if not {"RANK", "WORLD_SIZE"} & os.environ.keys() and _number("SLURM_STEP_NUM_TASKS", 1) > 1:
            return cls._from_srun()
        size = _number("WORLD_SIZE", 1)
        return cls(
            rank=_number("RANK", 0),
            size=size,
            local_rank=_number("LOCAL_RANK", 0),
            local_size=_number("LOCAL_SIZE", _number("LOCAL_WORLD_SIZE", size)),
        )

    @classmethod
    def _from_srun(cls) -> World:
        size = _number("SLURM_STEP_NUM_TASKS", 1)
        nodes = max(1, _number("SLURM_STEP_NUM_NODES", 1))
        return cls(_number("SLURM_PROCID", 0), size, _number("SLURM_LOCALID", 0), -(-size // nodes))


def choose_accelerator() -> None:
    """Tell DeepSpeed, before it is imported, that it computes on the CPU where there is no GPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def set_threads(world: World) -> None:
    """Share this machine's cores out over its ranks, unless OMP_NUM_THREADS is set.

    Ranks that each start a thread per core wait for one another most of the time.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_size))


def connect(world: World) -> torch.device:
    """Join the ranks through DeepSpeed and return this rank's device; a rank alone needs no free port.

    ConfigError when several were started and MASTER_ADDR or MASTER_PORT doesn't say where they meet.
    """
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if world.size > 1 and name not in os.environ:
            raise ConfigError(f"{world.size} ranks were started but {name} is not set: use launch/slurm.sh, or set it")
    choose_accelerator()
    for name, value in (("RANK", world.rank), ("WORLD_SIZE", world.size), ("LOCAL_RANK", world.local_rank)):
        os.environ.setdefault(name, str(value))
    if world.size == 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")

    # DeepSpeed calls it; a newer torch wants another name, which older ones lack.
    warnings.filterwarnings("ignore", message=r".*all_gather_into_tensor.*deprecated", category=FutureWarning)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # Shared-memory collectives for inference: compiled at start-up (a minute, with g++), used by nothing here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        accelerator.set_device(world.local_rank)
    deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), verbose=False)
    return torch.device(accelerator.device_name(world.local_rank))


def gather(value: Any) -> list[Any]:
    """Every rank's value (anything that can be pickled), in the order of ranks, on every rank."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until every rank is here."""
    torch.distributed.barrier()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise ConfigError(f"environment variable {name} is {text!r}: expected a whole number, as launchers set it")
    return int(text)
