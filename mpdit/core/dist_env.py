"""Finds which of a job's processes this is, and asks the others.

Torch is imported where it is used, since training answers to signals before it loads torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from mpdit.core.errors import ConfigError
from mpdit.core.text import counted


@dataclass(frozen=True)
class DistEnv:
    """This process's place among the ranks, as launchers put it into the environment; alone by default."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    hosts: int = 1

    @classmethod
    def from_environment(cls) -> DistEnv:
        """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_SIZE, CROSS_SIZE (DeepSpeed), or torchrun's or srun's of these.

        Of SLURM's variables those of a job step of several tasks count, and only where no launcher has set its own: a
        plain command in a batch script or an interactive shell has only the job's, and is alone.
        """
        if not {"RANK", "WORLD_SIZE"} & os.environ.keys() and _number("SLURM_STEP_NUM_TASKS", 1, 1) > 1:
            size, nodes = _number("SLURM_STEP_NUM_TASKS", 1, 1), _number("SLURM_STEP_NUM_NODES", 1, 1)
            found = cls(_number("SLURM_PROCID", 0), size, _number("SLURM_LOCALID", 0), -(-size // nodes), nodes)
        else:
            size = _number("WORLD_SIZE", 1, 1)
            local_size = _number("LOCAL_SIZE", _number("LOCAL_WORLD_SIZE", size, 1), 1)
            found = cls(
                rank=_number("RANK", 0),
                size=size,
                local_rank=_number("LOCAL_RANK", 0),
                local_size=local_size,
                hosts=_number("CROSS_SIZE", _number("GROUP_WORLD_SIZE", -(-size // local_size), 1), 1),
            )
        if found.rank >= found.size:
            raise ConfigError(
                f"the environment says rank {found.rank} of {counted(found.size, 'rank')}, counted from 0: unset RANK "
                "and WORLD_SIZE for a run of one process, or start all by a launcher, which sets both"
            )
        return found


def set_threads(env: DistEnv) -> None:
    """Share this machine's cores out over its ranks, unless OMP_NUM_THREADS is set.

    Ranks that each start a thread per core wait for one another most of the time.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // env.local_size))


def gather(value: Any, group: Any = None) -> list[Any]:
    """Return every rank's value (anything that can be pickled), in the order of ranks.

    All ranks must call it; by default it goes over training's group. In a process that isn't connected to others, as in
    a dry run, return its own alone.
    """
    import torch

    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def _number(name: str, default: int, least: int = 0) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) < least:
        wanted = f"a whole number{' of at least 1' if least else ''}"
        raise ConfigError(f"environment variable {name} is {text!r}: expected {wanted}, as launchers set it")
    return int(text)
