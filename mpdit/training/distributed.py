"""Lets the ranks meet, for as long as they wait for one another, and says what is wrong when one doesn't come."""

from __future__ import annotations

import os
import re
import socket
import time
import warnings
from datetime import timedelta
from typing import Any

import torch

from mpdit.core.dist_env import DistEnv, gather
from mpdit.core.errors import ConfigError
from mpdit.core.text import counted
from mpdit.training.engine import import_deepspeed
from mpdit.training.safety.watchdog import PATIENCE

_MEETING_SECONDS = 600.0
_RETRY_SECONDS = 0.5


def init_distributed(env: DistEnv, hang_timeout: float = 0, name: str = "") -> torch.device:
    """Join the ranks through DeepSpeed and return this rank's device; a rank alone needs no free port.

    Ranks wait for one another for `hang_timeout` seconds, at most ten minutes. A run's `name` keeps ranks apart that
    have come to another run's port.

    Raises ConfigError when there is no GPU for this rank where others have one, when several ranks were started and
    MASTER_ADDR or MASTER_PORT doesn't say where they meet, when the port is taken, when a rank doesn't come in time,
    and when MPDIT_KERNELS or its like is not the same on all ranks.
    """
    gpus = torch.cuda.device_count()
    if gpus and env.local_rank >= gpus:
        raise ConfigError(
            f"rank {env.rank} is process {env.local_rank} of its machine, counted from 0, and there "
            f"{'is' if gpus == 1 else 'are'} {counted(gpus, 'GPU')} that it can see: start as many processes a machine "
            "as it has GPUs, and let each see them all (SLURM: GPUs for each node, not for each task)"
        )
    for variable in ("MASTER_ADDR", "MASTER_PORT"):
        if env.size > 1 and variable not in os.environ:
            raise ConfigError(
                f"{env.size} ranks were started but {variable} is not set: use launch/slurm.sh, or set it"
            )
    for variable, value in (("RANK", env.rank), ("WORLD_SIZE", env.size), ("LOCAL_RANK", env.local_rank)):
        os.environ.setdefault(variable, str(value))
    limit = _longest_wait(hang_timeout)
    # NCCL's watch over its own watchdog, 8 minutes by default.
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(int(limit.total_seconds())))
    if env.size == 1:
        # A port of one's own; what torchrun sets would have torch look for torchrun's store there (2.13).
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", TORCHELASTIC_USE_AGENT_STORE="False")
    else:
        store = _meet(env, name, timedelta(seconds=min(hang_timeout or _MEETING_SECONDS, _MEETING_SECONDS)))

    # DeepSpeed calls it; a newer torch wants another name, which older ones lack.
    warnings.filterwarnings("ignore", message=r".*all_gather_into_tensor.*deprecated", category=FutureWarning)
    deepspeed = import_deepspeed()
    accelerator = deepspeed.accelerator.get_accelerator()
    device = torch.device(accelerator.device_name(env.local_rank))
    if device.type != "cpu":
        accelerator.set_device(env.local_rank)
    backend = accelerator.communication_backend_name()
    if env.size > 1:
        torch.distributed.init_process_group(
            backend,
            store=store,
            rank=env.rank,
            world_size=env.size,
            timeout=timedelta(seconds=_MEETING_SECONDS),
            device_id=device if device.type == "cuda" else None,  # as DeepSpeed does it
        )
    deepspeed.init_distributed(dist_backend=backend, timeout=limit, verbose=False)
    extend_timeouts(hang_timeout)
    _check_alike()
    return device


def _check_alike() -> None:
    """Raise ConfigError, on every rank, when this project's own variables are not the same on all."""
    ours = gather({name: value for name, value in os.environ.items() if name.startswith("MPDIT_")})
    for rank, theirs in enumerate(ours):
        for name in sorted(name for name in {**ours[0], **theirs} if ours[0].get(name) != theirs.get(name)):
            values = [repr(values[name]) if name in values else "not set" for values in (ours[0], theirs)]
            raise ConfigError(
                f"{name} is {values[0]} on rank 0 and {values[1]} on rank {rank}: set it alike on all machines "
                "(deepspeed passes on what stands in ~/.deepspeed_env, a line NAME=VALUE each)"
            )


def extend_timeouts(hang_timeout: float) -> None:
    """Let no group of processes, DeepSpeed's too, give up before the watchdog has told where each rank stands."""
    groups = torch.distributed.distributed_c10d
    for group in list(groups._world.pg_map):
        groups._set_pg_timeout(_longest_wait(hang_timeout), group)


def _longest_wait(hang_timeout: float) -> timedelta:
    """Return a time longer than the watchdog's; where that is off, one long enough to debug."""
    return timedelta(seconds=max(1800, 2 * PATIENCE * hang_timeout)) if hang_timeout else timedelta(days=7)


def _meet(env: DistEnv, name: str, timeout: timedelta) -> Any:
    """Return the store that all ranks have come to: rank 0 keeps it at MASTER_ADDR:MASTER_PORT, or torchrun does."""
    address, port, seconds = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], timeout.total_seconds()
    place = f"{address}:{port}"
    if not port.isdigit() or not 0 < int(port) < 2**16:
        raise ConfigError(f"MASTER_PORT is {port!r}: give a port from 1 to 65535, as in deepspeed --master_port 29501")
    try:
        socket.getaddrinfo(address, int(port))
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"MASTER_ADDR {address!r} can't be found ({error}): give the name or IP address of rank 0's machine, as in "
            "deepspeed --master_addr"
        ) from error
    kept_here = env.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not kept_here and not _answers(address, int(port), seconds):  # torch (2.13) would write pages of stacks
        raise ConfigError(
            f"there was no answer from {place} (MASTER_ADDR, MASTER_PORT) in {seconds:g} s: was rank 0 started there, "
            "and is the port open between the machines?"
        )
    try:
        store = next(torch.distributed.rendezvous("env://", env.rank, env.size, timeout=timeout))[0]
        return torch.distributed.PrefixStore(f"mpdit {name}", store)
    except Exception as error:
        reason = " ".join(str(error).split())
        if "address already in use" in reason.lower():
            raise ConfigError(
                f"{place}, where the ranks are to meet, is in use by another program, perhaps another run on this "
                "machine: give another port, as in deepspeed --master_port 29501 (MASTER_PORT elsewhere)"
            ) from error
        if came := re.search(r"(\d+)/(\d+) clients joined", reason):
            raise ConfigError(
                f"only {came[1]} of {came[2]} ranks came to {place} in {seconds:g} s: did the others start, and can "
                "their machines reach this address (MASTER_ADDR, MASTER_PORT)?"
            ) from error
        raise ConfigError(f"the ranks can't meet at {place} (MASTER_ADDR, MASTER_PORT): {reason[:200]}") from error


def _answers(address: str, port: int, seconds: float) -> bool:
    """Wait until a server is there, at most so long."""
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=max(0.1, end - time.monotonic())).close()
            return True
        except OSError:
            if time.monotonic() >= end:
                return False
            time.sleep(_RETRY_SECONDS)
